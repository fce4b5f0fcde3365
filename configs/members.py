"""What the recipes of model families share: a member is a size, or a size on other machines than its usual ones."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from configs import default

Fields = Mapping[str, Any]  # values by dotted name
# Of all families: bfloat16, parameters sharded over all devices, each layer recomputed in the backward pass.
SHARED = {
    "num_train_steps": 100_000, "global_batch_size": 512, "data.path": "datasets/web", "data.seq_len": 4096,
    "model.dtype": "bfloat16", "model.remat": "full", "mesh.data": 1, "mesh.fsdp": -1,
    "optimizer.peak_lr": 4e-4, "optimizer.end_lr": 4e-5, "optimizer.warmup_steps": 2000, "optimizer.b2": 0.95,
    "checkpoint.every_steps": 1000, "checkpoint.every_minutes": 20.0, "checkpoint.keep_every_steps": 10_000,
    "eval.every_steps": 1000, "eval.num_windows": 1024,
}  # fmt: skip


def member(
    family: str,
    variant: str,
    shared: Fields,
    sizes: Mapping[str, Any],
    machines: Mapping[str, Any] = MappingProxyType({}),
) -> ConfigDict:
    """The configuration of 'SIZE' or 'SIZE-MACHINE'; '' is the first size.

    Args:
      shared: what all sizes of the family have.
      sizes: what each size has, by its name.
      machines: what 'SIZE-MACHINE' changes, by this name.
    """
    variant = variant or next(iter(sizes))
    size = variant.partition("-")[0]
    if variant not in sizes and variant not in machines:
        raise ValueError(f"{family} has no variant {variant!r}; it has {', '.join([*sizes, *machines])}")
    config = default.get_config()
    config.update_from_flattened_dict({**SHARED, **shared, **sizes[size], **machines.get(variant, {})})
    return config
