"""Which parameters are trained. The others keep their values: they have no gradients and no optimizer state."""

import fnmatch
from collections.abc import Collection, Iterable

from flax import traverse_util

from trainer.config import Config
from trainer.errors import ConfigError


def chosen(config: Config, all_paths: Iterable[str]) -> frozenset[str]:
    """The dotted paths, of `all_paths`, of the parameters that are trained: those that config.frozen does not match.

    Raises:
      ConfigError: a pattern matches no parameter, or all parameters are frozen.
    """
    every = sorted(all_paths)
    for pattern in config.frozen:
        if not fnmatch.filter(every, pattern):
            raise ConfigError(f"config.frozen has {pattern!r}, which matches none of the parameters {', '.join(every)}")
    left = frozenset(filter(config.trains, every))
    if not left:
        raise ConfigError(f"config.frozen = {', '.join(config.frozen)} leaves no parameter to train")
    return left


def paths(params: dict) -> list[str]:
    """The dotted paths of a nested dict: 'layers.mlp.up.kernel'."""
    return list(traverse_util.flatten_dict(params, sep="."))


def part(params: dict, of_paths: Collection[str]) -> dict:
    """The parameters of these dotted paths, nested as in `params`."""
    flat = traverse_util.flatten_dict(params, sep=".")
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path in of_paths}, sep=".")


def whole(params: dict, changed: dict) -> dict:
    """`params` with the values of `changed`, a part of it."""
    flat = traverse_util.flatten_dict(params, sep=".") | traverse_util.flatten_dict(changed, sep=".")
    return traverse_util.unflatten_dict(flat, sep=".")
