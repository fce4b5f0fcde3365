"""The pure functions that advance a run: loss, train_step, eval_step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from model.layers import dropout_rate
from trainer import sharding
from trainer.config import Config
from trainer.state import Program, TrainState


def token_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropy and log Z of each token, float32.

    The target's logit is picked by comparison rather than by a gather, so that a vocabulary split over devices needs
    one sum instead of all logits on every device.

    Args:
      logits: float32 [..., vocab].
      targets: integer [...].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None].astype(jnp.int32)
    return log_z - jnp.sum(jnp.where(is_target, logits, 0), axis=-1), log_z


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
    config, accum = program.config, program.config.grad_accum_steps

    def mean(values: Array, tokens: Array, divisor: Array | None) -> Array:
        if divisor is None:  # every target counts
            return values.mean()
        return jnp.sum(jnp.where(counted_targets(tokens, config.data.eos_id), values, 0)) / divisor

    def loss_fn(
        params: dict, tokens: Array, key: Array | None, step: Array, divisor: Array | None
    ) -> tuple[Array, Array]:
        logits, _ = program.model(params)(
            tokens[:, :-1],
            document_starts=starts_for(config, tokens[:, :-1]),
            dropout_rate=dropout_rate(config.model, step),
            dropout_key=key,
            constrain=sharding.constrain,
        )
        losses, log_z = token_losses(logits, tokens[:, 1:])
        loss = mean(losses, tokens, divisor)
        return loss + config.z_loss * mean(jnp.square(log_z), tokens, divisor) if config.z_loss else loss, loss

    def gradient(params: dict, tokens: Array, key: Array | None, step: Array) -> tuple[Array, dict]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        # Counted in the whole batch, however its targets are spread over devices and parts: the mean of the parts,
        # below, is then that of the batch.
        divisor = None
        if config.data.packed:
            divisor = jnp.maximum(counted_targets(tokens, config.data.eos_id).sum(), 1) / accum
        if accum == 1:
            (_, loss), grads = grad_fn(params, tokens, key, step, divisor)
            return loss, grads
        # Part a takes rows a, a + accum, …: every device keeps the rows it has.
        parts = tokens.reshape(-1, accum, tokens.shape[1]).swapaxes(0, 1)
        parts = sharding.constrain(parts, (None, "batch", "seq"))

        def part(total: Any, of_part: Any) -> tuple[Any, None]:
            tokens, i = of_part
            of_part_key = None if key is None else jax.random.fold_in(key, i)
            (_, loss), grads = grad_fn(params, tokens, of_part_key, step, divisor)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(part, zero, (parts, jnp.arange(accum)))
        return jax.tree.map(lambda x: x / accum, total)

    def train_step(state: TrainState, tokens: Array, seed: Array) -> tuple[TrainState, dict[str, Array]]:
        tokens = tokens.astype(jnp.int32)  # widened here: files and transfers keep their two bytes a token
        key = jax.random.fold_in(jax.random.key(seed), state.step) if config.model.has_dropout else None
        loss, grads = gradient(state.params, tokens, key, state.step)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
        lr = program.schedule(state.step)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": optax.tree.norm(grads),
            "train/param_norm": optax.tree.norm(params),
            "train/lr": lr,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda s: s.sharding, program.state)
    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.named(program.mesh, "batch"), program.replicated),
        out_shardings=(shardings, program.replicated),
        donate_argnums=0,
    )


def make_eval_step(program: Program):
    """(params, tokens [b, seq_len + 1], lengths [b]) -> float32 sum of the losses of the first `lengths` targets."""

    def eval_step(params: dict, tokens: Array, lengths: Array) -> Array:
        tokens = tokens.astype(jnp.int32)
        inputs = tokens[:, :-1]
        starts = starts_for(program.config, inputs)
        logits, _ = program.model(params)(inputs, document_starts=starts, constrain=sharding.constrain)
        losses, _ = token_losses(logits, tokens[:, 1:])
        counted = jnp.arange(losses.shape[1]) < lengths[:, None]
        return jnp.sum(jnp.where(counted, losses, 0))

    return jax.jit(eval_step, out_shardings=program.replicated)
