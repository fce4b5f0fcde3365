"""Kernels: tests which kernel is chosen, and compares splash (interpreted) with the plain kernel.
tests/attention_test.py compares the plain kernel with its definition, and tests/partitioner_test.py all kernels on a
mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kernels
from model.config import ModelConfig
from model.kernels import AttentionSpec, Mask
from tests.tiny_models import random_documents

GOOD = {  # for each kernel, a configuration that it accepts
    "xla": {"platform": "cpu", "dtype": "float32"},
    "cudnn": {"platform": "gpu", "dtype": "bfloat16"},
    "splash": {"platform": "tpu", "dtype": "bfloat16"},
}


def situation(**changes) -> tuple[ModelConfig, dict]:
    """A model with heads of size 64 and the conditions it runs under, with these changes."""
    model = {"embed_dim": 256, "num_heads": 4, "attention": "auto"}
    around = {"platform": "cpu", "seq_len": 512, "context": 1, "documents": False, "capability": ""}
    for name, value in changes.items():
        (around if name in around else model)[name] = value
    return ModelConfig(**model), around


def refusal(kernel: str, **changes) -> str:
    config, around = situation(**GOOD[kernel] | changes)
    return kernels.refusal(kernel, config, **around)


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        *[("xla", {"platform": platform}) for platform in ("cpu", "gpu", "cuda", "tpu")],
        *[("xla", {"dtype": "bfloat16", "seq_len": 30, "head_dim": head}) for head in (6, 256)],
        ("xla", {"documents": True, "context": 2}),
        ("xla", {"dropout": 0.1, "documents": True}),
        ("cudnn", {}),
        ("cudnn", {"platform": "cuda", "head_dim": 128, "seq_len": 30}),
        ("cudnn", {"head_dim": 8}),
        ("cudnn", {"head_dim": 256, "capability": "9.0"}),
        *[(kernel, {"window": 100}) for kernel in GOOD],
        *[(kernel, {"attention_softcap": 50.0}) for kernel in ("xla", "splash")],
        *[("cudnn", {"capability": capability}) for capability in ("", "8.0", "8.9", "9.0", "10.0", "12.0")],
        ("splash", {}),
        ("splash", {"documents": True, "context": 4}),
        ("splash", {"dtype": "float32", "head_dim": 256}),
    ],
    ids=str,
)
def test_nothing_against_it(kernel, changes):
    assert refusal(kernel, **changes) == ""


@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        ("xla", {"dropout": 0.1, "context": 2}, "dropout of attention weights needs whole rows"),
        ("xla", {"dropout_end": 0.1, "context": 2}, "dropout of attention weights needs whole rows"),
        ("cudnn", {"dropout": 0.1}, "no dropout"),
        ("cudnn", {"platform": "cpu"}, "NVIDIA GPUs, and this is cpu"),
        ("cudnn", {"platform": "tpu"}, "NVIDIA GPUs, and this is tpu"),
        ("cudnn", {"dtype": "float32"}, "no float32"),
        ("cudnn", {"head_dim": 136}, "multiple of 8 up to 128, not 136"),
        ("cudnn", {"head_dim": 100}, "multiple of 8 up to 128, not 100"),
        ("cudnn", {"head_dim": 256, "capability": "8.9"}, "multiple of 8 up to 128, not 256"),
        ("cudnn", {"head_dim": 264, "capability": "9.0"}, "multiple of 8 up to 256, not 264"),
        ("cudnn", {"attention_softcap": 50.0}, "no soft cap"),
        ("cudnn", {"documents": True}, "no documents"),
        ("cudnn", {"context": 2}, "split over devices"),
        ("cudnn", {"capability": "7.5"}, "compute capability 8.0 (Ampere), and this GPU has 7.5"),
        ("cudnn", {"platform": "cuda", "capability": "7.0"}, "this GPU has 7.0"),
        ("cudnn", {"capability": "gfx90a"}, "NVIDIA GPUs, and this is gfx90a"),
        ("splash", {"dropout": 0.1}, "no dropout"),
        ("splash", {"platform": "cpu"}, "TPUs, and this is cpu"),
        ("splash", {"platform": "gpu"}, "TPUs, and this is gpu"),
        ("splash", {"seq_len": 200}, "multiples of 128 a device, not 200"),
        ("splash", {"context": 8}, "multiples of 128 a device, not 64"),
    ],
    ids=str,
)
def test_refusals(kernel, changes, said):
    assert said in refusal(kernel, **changes)
    # If the configuration names the kernel, the error is one line that ends with a way out.
    config, around = situation(**GOOD[kernel] | changes | {"attention": kernel})
    with pytest.raises(
        ValueError, match=f"model.attention is '{kernel}', which refuses: .*; auto chooses another"
    ) as e:
        kernels.choose(config, **around)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("context", [1, 2, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_choice(platform, dtype, documents, context, dropout):
    config, around = situation(
        platform=platform, dtype=dtype, documents=documents, context=context, dropout=dropout, seq_len=512
    )
    if dropout and context > 1:  # splash and cudnn do not support dropout
        with pytest.raises(ValueError, match=r"no kernel for this: .*; lower mesh.context to 1") as e:
            kernels.choose(config, **around)
        assert "\n" not in str(e.value)
        return
    kernel, reason = kernels.choose(config, **around)
    best = {
        "cpu": False,
        "tpu": not dropout and context <= 4,
        "gpu": not dropout and not documents and context == 1 and dtype == "bfloat16",
    }[platform.replace("cuda", "gpu")]
    assert kernel == ({"tpu": "splash"}.get(platform, "cudnn") if best else "xla")
    if best or platform == "cpu":
        assert reason == f"the best on {platform}"
    else:
        assert reason.split(" ")[:2] == [{"tpu": "splash"}.get(platform, "cudnn"), "refuses:"]


@pytest.mark.parametrize("kernel", GOOD)
def test_the_one_it_names_is_taken(kernel):
    config, around = situation(**GOOD[kernel], attention=kernel)
    assert kernels.choose(config, **around) == (kernel, "as configured")


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 1.5)])
def test_splash_is_the_plain_kernel(monkeypatch, size, documents, window, softcap):
    """Compares outputs and gradients of 4 query heads on 2 key-value heads, in float32; one of the blocks is skipped.

    The scale is not 1 / sqrt(head size), which a kernel might use by default.
    """
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 128)
    t, draw, spec = 256, np.random.default_rng(0), AttentionSpec(0.2, window, softcap)
    q, k, v, g = (draw.standard_normal((1, t, n, size)).astype(np.float32) for n in (4, 2, 2, 4))
    segment_ids = jnp.asarray(random_documents(1, t)) if documents else None
    index = np.arange(t, dtype=np.int32)
    mask = Mask(jnp.asarray(index), segment_ids, segment_ids)
    kernel = kernels.splash_kernel(index, 4, spec, context=1, documents=documents, interpret=True)

    def both(attend):
        y, pull = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
        return y, *pull(jnp.asarray(g))

    expected = jax.jit(lambda: both(lambda q, k, v: kernels.xla(q, k, v, mask, spec)))()
    actual = jax.jit(lambda: both(lambda q, k, v: kernels.splash(kernel, q, k, v, mask, spec=spec)))()
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("seq_len", [128, 384, 640, 768, 1024, 1152])
def test_splash_takes_every_length_that_it_does_not_refuse(seq_len):
    assert refusal("splash", seq_len=seq_len) == ""
    index = np.arange(seq_len, dtype=np.int32)
    spec = AttentionSpec(scale=0.125)
    kernel = kernels.splash_kernel(index, 1, spec, context=1, documents=False, interpret=True)
    x = jax.ShapeDtypeStruct((1, seq_len, 1, 64), jnp.float32)

    def summed(q, k, v):
        return kernels.splash(kernel, q, k, v, Mask(jnp.asarray(index)), spec=spec).sum()

    gradients = jax.eval_shape(jax.grad(summed, (0, 1, 2)), x, x, x)
    assert [leaf.shape for leaf in gradients] == [x.shape] * 3


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [2, 3], [3, 0, 1, 2]])
@pytest.mark.parametrize("documents", [None, [[0, 0, 1, 1], [0, 1, 2, 2]], [[0, 0, 0, 0], [7, 0, 0, 3]]])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_a_mask_shows_a_query_the_keys_up_to_its_own_of_its_document(index, documents, window):
    keys = None if documents is None else np.array(documents, np.int32)
    queries = None if keys is None else keys[:, index]
    visible = Mask(jnp.asarray(index), queries, keys).visible(4, window)
    for row in range(1 if keys is None else 2):
        for t, at in enumerate(index):
            for s in range(4):
                same = keys is None or keys[row, at] == keys[row, s]
                assert bool(visible[row, t, s]) == (s <= at and same and (window is None or at - s < window))
    assert visible.shape == (1 if keys is None else 2, len(index), 4)
