"""Losses on held-out text."""

import math
from collections.abc import Callable

import jax
from jax import Array

from data import loader
from data.batch import Batch
from data.token_files import formats
from trainer import sharding
from trainer.config import Config


def microbatch_rows(config: Config, batch_sharding: jax.sharding.NamedSharding) -> int:
    """Rows per evaluation batch: as many as a training microbatch has, so that evaluation needs no more memory than a
    step, rounded up to a multiple of the batch shards. Padded rows do not count in the loss."""
    rows = config.global_batch_size // config.grad_accum_steps
    shards = sharding.batch_shards(batch_sharding.mesh.shape)
    return -(-rows // shards) * shards


def evaluate(
    eval_step: Callable[[dict, Batch], tuple[Array, Array]],
    params: dict,
    sources: dict[str, formats.TokenFiles],
    config: Config,
    *,
    batch_sharding: jax.sharding.NamedSharding,
    num_windows: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """val/loss (nats a token), val/perplexity and, if the text's bytes are known, val/bits_per_byte. With task dpo only
    val/loss, the mean over pairs.

    The number of bytes is unknown for token files of other programs, and if the tokenizer loses text (losses.py).

    Evaluates `num_windows` fixed windows of each source; 0: its full split. With several sources, val/loss is the mean
    over all their targets, and val/loss/NAME is the mean over those of source NAME. `interrupted` is called after each
    batch; if it returns true, the result is None.
    """
    totals, counts = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0.0)
    for name, files in sources.items():
        batches = loader.evaluation_batches(
            files,
            seq_len=config.data.seq_len,
            batch_size=microbatch_rows(config, batch_sharding),
            sharding=batch_sharding,
            limit=num_windows,
            document_end=config.data.document_end,
        )
        for batch in batches:
            nats, weight = eval_step(params, batch)
            totals[name] += float(nats)
            counts[name] += float(weight)
            if interrupted():
                return None
    loss = sum(totals.values()) / sum(counts.values())
    result = {"val/loss": loss}
    if config.task != "dpo":
        result["val/perplexity"] = math.exp(min(loss, 700))
    if all(files.text_bytes for files in sources.values()):
        tokens, text_bytes = (sum(getattr(f, what) for f in sources.values()) for what in ("tokens", "text_bytes"))
        result["val/bits_per_byte"] = loss / math.log(2) * tokens / text_bytes
    if len(sources) > 1:
        result |= {f"val/loss/{name}": totals[name] / counts[name] for name in sources}
    return result
