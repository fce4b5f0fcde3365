"""Precision of matrix products, and what counts as too little memory."""

import types

import jax
import numpy as np
import pytest

from trainer import xla_options


@pytest.mark.parametrize(
    ("platform", "dtype", "before", "after"),
    [
        ("gpu", "float32", None, "float32"),
        ("tpu", "float32", None, "float32"),
        ("gpu", "float32", "tensorfloat32", "tensorfloat32"),  # the environment asks for it
        ("gpu", "bfloat16", None, None),
        ("cpu", "float32", None, None),
    ],
)
def test_float32_is_float32_on_accelerators_unless_the_environment_says_otherwise(platform, dtype, before, after):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    found = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", before)
        xla_options.use_precision(dtype, mesh)
        assert jax.config.jax_default_matmul_precision == after
        assert xla_options.precision_shown() == (f" (products: {after})" if after else "")
    finally:
        jax.config.update("jax_default_matmul_precision", found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 393.2GiB.", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 9792744680 bytes.", True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", True),
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm", True),
        ("RESOURCE_EXHAUSTED: CoordinationService: received message larger than max", False),
        ("INTERNAL: Out of memory in the compiler", False),
    ],
)
def test_other_limits_have_the_same_code(text, expected):
    assert xla_options.is_out_of_memory(RuntimeError(text)) == expected
