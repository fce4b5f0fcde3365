"""The pure functions that advance a run: train_step and eval_step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from data.batch import Batch
from model.context import Aux
from model.dropout import dropout_rate
from trainer import sharding, xla_options
from trainer.finetuning import preference, trainable
from trainer.loss import make_loss, make_token_scores
from trainer.reliability import divergence
from trainer.state import Program, TrainState

ROWS, SAME = PartitionSpec("data"), PartitionSpec()  # specs of by_replica: own rows; the same for all


def make_train_step(program: Program):
    """(state, batch of global_batch_size rows, seed) -> (state, metrics); the state is donated."""
    config = program.config
    gradient = make_gradient(program)

    def train_step(state: TrainState, batch: Batch, seed: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if config.model.is_random else None
        loss, reported, grads = gradient(state.params, batch, key, state.step)
        # With mesh.shard_optimizer, each replica gets the sum of its own shard only, and then updates that shard.
        grads = jax.lax.with_sharding_constraint(grads, program.part(program.moments))
        before = program.part(state.params)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, before, step=state.step)
        params = trainable.whole(state.params, optax.apply_updates(before, updates))
        grad_norm, guard = optax.tree.norm(grads), state.guard
        judged: dict[str, Array] = {}
        if guard:
            guard, bad, judged = divergence.detect(config.divergence, guard, loss, grad_norm)
            # A bad step still counts: its batch is used up, and the schedule advances.
            params, opt_state = jax.tree.map(
                lambda before, after: jnp.where(bad, before, after),
                (state.params, state.opt_state),
                (params, opt_state),
            )
        metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/param_norm": optax.tree.norm(params),
            "train/lr": program.schedule(state.step),
            **{f"train/{name}": value for name, value in reported.items()},
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


def make_gradient(program: Program):
    """(params, batch, key or None, step) -> (loss, what layers report, gradients), of the whole batch.

    The gradients are those of the parameters that are trained. The loss is the weighted mean over the targets. Each
    replica processes its own rows; at the end all sum their results, once a step, however many microbatches there are.
    """
    accum, partitioner = program.config.grad_accum_steps, program.partitioner
    loss_of_rows = make_total_loss(program)
    with_mean_weights = preference.with_mean_weights if program.config.task == "dpo" else _with_mean_weights

    def gradient(params: dict, batch: Batch, key: Array | None, step: Array) -> tuple[Array, dict, dict]:
        batch = with_mean_weights(batch.widened())
        return sharding.by_replica(summed, program.mesh, (SAME, ROWS, SAME, SAME), SAME)(params, batch, key, step)

    def summed(*arguments: Any) -> tuple[Array, dict, dict]:
        loss, reported, grads = of_replica(*arguments)
        loss, reported = jax.tree.map(lambda x: partitioner.collectives.psum(x, "data"), (loss, reported))
        return loss, reported, partitioner.sum_of_replicas(grads)

    def of_replica(params: dict, batch: Batch, key: Array | None, step: Array) -> tuple[Array, dict, dict]:
        """What the rows of one replica add to the loss, the reports and the gradients."""
        trained = program.part(params)

        def total_loss(trained: dict, *arguments: Any) -> tuple[Array, tuple[Array, dict]]:
            return loss_of_rows(trainable.whole(params, trained), *arguments)

        grad_fn = jax.value_and_grad(total_loss, has_aux=True)
        if accum == 1:
            (_, (loss, reported)), grads = grad_fn(trained, batch, key, step)
            return loss, reported, grads

        def add(total: Any, of_microbatch: tuple[Batch, Array]) -> tuple[Any, dict]:
            microbatch, i = of_microbatch
            microbatch_key = None if key is None else jax.random.fold_in(key, i)
            (_, (loss, reported)), grads = grad_fn(trained, microbatch, microbatch_key, step)
            return jax.tree.map(jnp.add, total, (loss, grads)), reported

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        microbatches = (_microbatches(batch, accum, partitioner), jnp.arange(accum))
        (loss, grads), reported = jax.lax.scan(add, zero, microbatches)
        return loss, jax.tree.map(lambda x: x.sum(0), reported), grads

    return gradient


def make_total_loss(program: Program):
    """(params, batch, key or None, step) -> (total loss, (its value to show, what layers report)) of a replica's rows.

    Only the gradient of the total loss counts; what is shown is the cross-entropy or, with task dpo, the loss of pairs.
    """
    if program.config.task == "dpo":
        return _make_loss_of_pairs(program)
    weighted_loss = make_loss(program)
    model_config = program.config.model

    def total_loss(params: dict, batch: Batch, key: Array | None, step: Array) -> tuple[Array, tuple[Array, dict]]:
        out = forward(program, params, batch, dropout_rate=dropout_rate(model_config, step), dropout_key=key)
        total, loss = weighted_loss(out.hidden, out.table, out.batch.targets, out.batch.loss_weights)
        if not any(out.aux):
            return total, (loss, {})
        share = batch.loss_weights.sum()  # the share of this microbatch in the whole batch
        losses, metrics = jax.tree.map(lambda x: share * x, out.aux)
        return total + sum(losses.values()), (loss, losses | metrics)

    return total_loss


def _make_loss_of_pairs(program: Program):
    """make_total_loss for task dpo (trainer/finetuning/preference.py)."""
    weighted_loss, compared = make_loss(program), _make_compared(program)
    model_config = program.config.model

    def total_loss(params: dict, batch: Batch, key: Array | None, step: Array) -> tuple[Array, tuple[Array, dict]]:
        out = forward(program, params, batch, dropout_rate=dropout_rate(model_config, step), dropout_key=key)
        pairs, share = jax.lax.stop_gradient((compared(params, batch, out), preference.shares(out.batch)))
        total, _ = weighted_loss(out.hidden, out.table, out.batch.targets, share[:, None] * pairs.slopes)
        shown = {"accuracy": pairs.margin > 0, "margin": pairs.margin}
        return total, ((share * pairs.loss).sum(), {name: (share * x).sum() for name, x in shown.items()})

    return total_loss


def _make_compared(program: Program):
    """(params, batch, the model's forward pass of it) -> preference.Pairs of a replica's rows."""
    log_ratio, beta = make_log_ratio(program), program.config.dpo.beta

    def compared(params: dict, batch: Batch, out: Forward) -> preference.Pairs:
        params, out = jax.lax.stop_gradient((params, out))
        if program.config.stores_reference:
            reference = out.batch.reference[:, 0]
        else:
            reference = log_ratio(forward(program, preference.reference(params), batch))
        return preference.compare(out.batch, log_ratio(out), reference, beta=beta)

    return compared


def make_log_ratio(program: Program):
    """(a forward pass of a replica's rows of pairs) -> float32 [b], log p(chosen) - log p(rejected) of each row."""
    scores = make_token_scores(program)

    def log_ratio(out: Forward) -> Array:
        return preference.log_ratio(out.batch, scores(out.hidden, out.table, out.batch.targets)[0])

    return log_ratio


def _with_mean_weights(batch: Batch) -> Batch:
    """`batch` with weights divided by their sum, so that a weighted sum is the mean over all targets of the batch."""
    if batch.loss_weights is None:
        return batch.replace(loss_weights=jnp.full(batch.targets.shape, 1 / jnp.float32(batch.targets.size)))
    total = batch.loss_weights.sum()
    return batch.replace(loss_weights=batch.loss_weights / jnp.where(total > 0, total, 1))


def _microbatches(batch: Batch, accum: int, partitioner: Any) -> Batch:
    """[accum, rows, t]: microbatch a takes rows a, a + accum, …, so that every device keeps the rows it has."""

    def cut(x: Array) -> Array:
        x = x.reshape(-1, accum, x.shape[1]).swapaxes(0, 1)
        return partitioner.constrain(x, (None, "batch", None))

    return jax.tree.map(cut, batch)


def make_eval_step(program: Program):
    """(params, batch) -> (sum of weight * nats over the targets, sum of the weights), both float32.

    With task dpo: (sum of the losses of pairs, their number).
    """
    of_pairs = program.config.task == "dpo"
    weighted_loss, compared = make_loss(program), _make_compared(program)

    def of_replica(params: dict, batch: Batch) -> Array:
        out = forward(program, params, batch)
        if of_pairs:
            loss = (preference.shares(out.batch) * compared(params, batch, out).loss).sum()
        else:
            _, loss = weighted_loss(out.hidden, out.table, out.batch.targets, out.batch.loss_weights)
        return program.partitioner.collectives.psum(loss, "data")

    by_replica = sharding.by_replica(of_replica, program.mesh, (SAME, ROWS), SAME)

    def eval_step(params: dict, batch: Batch) -> tuple[Array, Array]:
        batch = batch.widened()
        weights = preference.shares(batch) if of_pairs else batch.loss_weights
        return by_replica(params, batch), weights.sum()

    return jax.jit(eval_step, out_shardings=program.replicated)


class Forward(NamedTuple):
    """What the loss needs of a forward pass.

    Attributes:
      hidden: [b, t, embed].
      table: the parameter that turns `hidden` into logits.
      batch: the batch, with its tokens in the order of `hidden`.
      aux: what the layers report.
    """

    hidden: Array
    table: Array
    batch: Batch
    aux: Aux


def forward(program: Program, params: dict, batch: Batch, **dropout: Any) -> Forward:
    """Runs the model on a replica's rows, with the tokens of each row in the partitioner's order.

    Args:
      dropout: the dropout arguments of Transformer.hidden.
    """
    partitioner = program.partitioner
    index = None
    if partitioner.order is not None:
        assert batch.inputs.shape[1] == len(partitioner.order), "the order is that of rows of seq_len tokens"
        index = jnp.asarray(partitioner.order)
        batch = jax.tree.map(lambda x: x[:, partitioner.order], batch)
    batch = jax.tree.map(lambda x: partitioner.constrain(x, ("batch", "seq")), batch)
    model = program.model(params)
    hidden, aux, _ = model.hidden(
        batch.inputs, index=index, positions=batch.positions, segment_ids=batch.segment_ids, **dropout
    )
    return Forward(hidden, model.output_table(), batch, aux)
