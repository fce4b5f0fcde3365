"""The pure functions that advance a run: train_step, eval_step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from model.dropout import dropout_rate
from trainer import sharding, xla_options
from trainer.config import Config
from trainer.loss import make_loss
from trainer.reliability import divergence
from trainer.state import Program, TrainState

ROWS, SAME = PartitionSpec("data"), PartitionSpec()  # of sharding.by_replica: each its own rows; the same for all


def document_starts(inputs: Array, eos_id: int) -> Array:
    """Where the document of each token begins in its row, int32 [b, t]: after the last eos_id before it."""
    after_eos = jnp.pad(inputs[:, :-1] == eos_id, ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(after_eos, jnp.arange(inputs.shape[1], dtype=jnp.int32), 0), axis=1)


def starts_for(config: Config, inputs: Array) -> Array | None:
    return document_starts(inputs, config.data.eos_id) if config.data.mask_documents else None


def counted_targets(tokens: Array, eos_id: int) -> Array:
    """Which targets of packed rows [b, seq_len + 1] are no padding, bool [b, seq_len].

    Only padding has an end of text after an end of text, for launch.prepare leaves empty documents out; and where the
    rest of a cut document is its end of text alone, whose text is in another row.
    """
    return (tokens[:, :-1] != eos_id) | (tokens[:, 1:] != eos_id)


def make_train_step(program: Program):
    """(state, tokens [global_batch_size, seq_len + 1], seed) -> (state, metrics); the state is donated."""
    config, accum, placement = program.config, program.config.grad_accum_steps, program.placement
    weighted_loss = make_loss(program)

    def loss_fn(params: dict, tokens: Array, weights: Array, key: Array | None, step: Array) -> tuple[Array, Array]:
        x, table, targets, weights = forward(
            program, params, tokens, weights, dropout_rate=dropout_rate(config.model, step), dropout_key=key
        )
        return weighted_loss(x, table, targets, weights)

    def gradient(params: dict, tokens: Array, key: Array | None, step: Array) -> tuple[Array, dict]:
        """Loss and gradient of the whole batch, as its mean over the targets that count.

        Each replica works through its rows by itself, and all sum what they have at the end: once a step, however many
        parts the batch has.
        """
        counts = counted_targets(tokens, config.data.eos_id) if config.data.packed else jnp.ones_like(tokens[:, 1:])
        weights = counts / jnp.maximum(counts.sum(), 1).astype(jnp.float32)

        def sums(*arguments: Any) -> tuple[Array, dict]:
            loss, grads = of_replica(*arguments)
            return placement.shards.sum(loss, "data"), placement.sum_of_replicas(grads)

        by_replica = sharding.by_replica(program.mesh, sums, (SAME, ROWS, ROWS, SAME, SAME), SAME)
        return by_replica(params, tokens, weights, key, step)

    def of_replica(params: dict, tokens: Array, weights: Array, key: Array | None, step: Array) -> tuple[Array, dict]:
        """What the rows of one replica add to loss and gradient."""
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accum == 1:
            (_, loss), grads = grad_fn(params, tokens, weights, key, step)
            return loss, grads
        # Part a takes rows a, a + accum, …: every device keeps the rows it has.
        parts = [x.reshape(-1, accum, x.shape[1]).swapaxes(0, 1) for x in (tokens, weights)]
        parts = [placement.constrain(x, (None, "batch", None)) for x in parts]

        def part(total: Any, of_part: Any) -> tuple[Any, None]:
            tokens, weights, i = of_part
            of_part_key = None if key is None else jax.random.fold_in(key, i)
            (_, loss), grads = grad_fn(params, tokens, weights, of_part_key, step)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(part, zero, (*parts, jnp.arange(accum)))
        return total

    def train_step(state: TrainState, tokens: Array, seed: Array) -> tuple[TrainState, dict[str, Array]]:
        tokens = tokens.astype(jnp.int32)  # widened here: files and transfers keep their two bytes a token
        key = jax.random.fold_in(jax.random.key(seed), state.step) if config.model.has_dropout else None
        loss, grads = gradient(state.params, tokens, key, state.step)
        # With mesh.shard_optimizer each replica sums, and then updates, its own part.
        grads = jax.lax.with_sharding_constraint(grads, program.moments)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
        lr = program.schedule(state.step)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        grad_norm, guard = optax.tree.norm(grads), state.guard
        judged: dict[str, Array] = {}
        if guard:
            guard, bad, judged = divergence.judge(config.divergence, guard, loss, grad_norm)
            # The step still counts: its batch is used up, and the schedule goes on.
            params, opt_state = jax.tree.map(
                lambda before, after: jnp.where(bad, before, after),
                (state.params, state.opt_state),
                (params, opt_state),
            )
        metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/param_norm": optax.tree.norm(params),
            "train/lr": lr,
        }
        return TrainState(state.step + 1, params, opt_state, guard), metrics | judged

    shardings = jax.tree.map(lambda s: s.sharding, program.state)
    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.named(program.mesh, "batch"), program.replicated),
        out_shardings=(shardings, program.replicated),
        donate_argnums=0,
        compiler_options=xla_options.options(program.mesh),
    )


def make_eval_step(program: Program):
    """(params, tokens [b, seq_len + 1], lengths [b]) -> float32 sum of the losses of the first `lengths` targets."""
    weighted_loss = make_loss(program)

    def of_replica(params: dict, tokens: Array, lengths: Array) -> Array:
        tokens = tokens.astype(jnp.int32)
        counted = (jnp.arange(tokens.shape[1] - 1) < lengths[:, None]).astype(jnp.float32)
        return program.placement.shards.sum(weighted_loss(*forward(program, params, tokens, counted))[1], "data")

    eval_step = sharding.by_replica(program.mesh, of_replica, (SAME, ROWS, ROWS), SAME)
    return jax.jit(eval_step, out_shardings=program.replicated)


def forward(
    program: Program, params: dict, tokens: Array, weights: Array, **dropout: Any
) -> tuple[Array, Array, Array, Array]:
    """From a replica's rows to the arguments of the loss, each row in the order of positions that the mesh wants.

    Args:
      tokens: int32 [b, seq_len + 1].
      weights: float32 [b, seq_len], of each target.
    """
    placement, inputs, targets = program.placement, tokens[:, :-1], tokens[:, 1:]
    starts = starts_for(program.config, inputs)
    if placement.order is not None:
        assert inputs.shape[1] == len(placement.order), "rows must be of seq_len tokens, of which the order is"
        inputs, targets, weights = (x[:, placement.order] for x in (inputs, targets, weights))
        starts = None if starts is None else starts[:, placement.order]
    inputs, targets, weights = (placement.constrain(x, ("batch", "seq")) for x in (inputs, targets, weights))
    model = program.model(params)
    places = None if placement.order is None else jnp.asarray(placement.order)
    x, _ = model.hidden(inputs, places=places, document_starts=starts, placement=placement, **dropout)
    return x, model.output_table(), targets, weights
