"""The analytic FLOPs agree with what XLA counts in the compiled program, and with published figures."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from model.config import REMATS
from tests import runs, tiny_models
from trainer.config import Config, from_dict
from trainer.planning import plan
from trainer.reporting import flops

ROWS = 2
# The models are so wide, with few wide heads, that everything except matrix products is under 2 % of the work.
MODELS = {
    "gpt2": {"mlp": "gelu", "norm": "layernorm", "position": "learned"},
    "llama": {"num_kv_heads": 1, "mlp": "swiglu", "tie_embeddings": False},
    "wide_heads": {"num_kv_heads": 2, "head_dim": 192, "mlp": "relu2", "mlp_dim": 640, "vocab_size": 450},
}


def config(frozen: tuple[str, ...] = (), **model) -> Config:
    defaults = {"num_layers": 2, "embed_dim": 512, "num_heads": 2, "vocab_size": 512, "max_seq_len": 256}
    model = defaults | {"scan_layers": False} | model
    data = {"seq_len": model["max_seq_len"]}
    return from_dict({"global_batch_size": ROWS, "data": data, "model": model, "frozen": frozen})


def xla_flops_per_token(config: Config, *, backward: bool = True) -> float:
    """What XLA counts in the compiled loss on one device, or in its gradient, per token."""
    apply, variables = tiny_models.applier(config.model), tiny_models.abstract(config.model)[1]
    params = traverse_util.unflatten_dict({path: v.get_value() for path, v in variables.items()})
    tokens = jax.ShapeDtypeStruct((ROWS, config.data.seq_len + 1), jnp.int32)

    def loss(params, tokens):
        logits, targets = apply(params)(tokens[:, :-1])[0], tokens[:, 1:, None]
        return (jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets, axis=-1)[..., 0]).mean()

    compiled = jax.jit(jax.grad(loss) if backward else loss).lower(params, tokens).compile()
    return compiled.cost_analysis()["flops"] / (ROWS * config.data.seq_len)


def xla_flops_of_step(config: Config) -> float:
    """What XLA counts in the full train step on a mesh of one device, per token."""
    compiled = plan.lower(config, jax.devices()[:1])[1].compile()
    return compiled.cost_analysis()["flops"] / config.tokens_per_step


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_forward_and_backward_are_what_xla_counts(model):
    of = config(**model)
    expected = flops.flops_per_token(of)
    assert xla_flops_per_token(of) == pytest.approx(expected, rel=0.02)
    assert xla_flops_per_token(of, backward=False) == pytest.approx(expected / 3, rel=0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"rank": 64}},
        {"lora": {"rank": 64, "targets": ["layers.mlp.*"]}, "num_kv_heads": 1},
        {"frozen": ("embedding", "layers.attention.*.kernel", "layers.mlp.gate.kernel")},
    ],
)
def test_what_is_frozen_has_no_gradient(fields):
    """A layer's share: the first layer's input has no gradient if nothing before it is trained."""
    two, three = (config(**fields, num_layers=layers) for layers in (2, 3))
    expected = flops.flops_per_token(three) - flops.flops_per_token(two)
    assert xla_flops_of_step(three) - xla_flops_of_step(two) == pytest.approx(expected, rel=0.02)
    full = flops.flops_per_token(config(num_layers=3)) - flops.flops_per_token(config(num_layers=2))
    assert expected < 0.9 * full


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_recomputation_is_what_xla_counts(remat):
    """The layers are a compiled loop, whose body XLA counts once: in unrolled layers XLA may undo the recomputation."""
    of, without = (config(scan_layers=True, remat=r, num_heads=1, head_dim=512) for r in (remat, "none"))
    counted = xla_flops_of_step(of) - xla_flops_of_step(without)
    expected = (flops.hardware_flops_per_token(of) - flops.flops_per_token(of)) / of.model.num_layers
    assert expected > 0 and counted == pytest.approx(expected, rel=0.05)


def test_recomputation_is_never_model_flops():
    counts = {remat: config(remat=remat) for remat in REMATS}
    assert len({flops.flops_per_token(of) for of in counts.values()}) == 1
    hardware = {remat: flops.hardware_flops_per_token(of) for remat, of in counts.items()}
    assert hardware["none"] == flops.flops_per_token(counts["none"])
    assert hardware["none"] < hardware["attention"] < hardware["dots"] < hardware["full"] == hardware["offload"]
    flash = {remat: flops.hardware_flops_per_token(of, flash=True) for remat, of in counts.items()}
    # A flash kernel computes seven products instead of six, each half as large.
    attention = flops.attention_flops_per_token(config())
    assert flash["none"] == hardware["none"] - 2.5 * attention and flash["attention"] == flash["none"] + attention


GPT2 = {
    "num_layers": 12, "num_heads": 12, "embed_dim": 768, "max_seq_len": 1024, "mlp": "gelu", "norm": "layernorm",
    "position": "learned",
}  # fmt: skip


def test_published_figures_of_gpt2_124m():
    """Published MFLOP per token at T = 1024: 854.8 for nanoGPT (N = 123.59 M), and 803.3 for llm.c (N includes
    positions and biases).

    GPT-2's vocabulary of 50257 is padded to 50304 rows, as nanoGPT does.
    """
    of = config(**GPT2, vocab_size=50257)
    assert flops.nanogpt_flops_per_token(of, 123_590_000 + 1024 * 768) == pytest.approx(854.8e6, rel=1e-4)
    assert flops.matmul_params(of) == 12 * 12 * 768**2 + 50304 * 768
    assert flops.flops_per_token(of) == pytest.approx(854.8e6, rel=3e-4)
    attention = flops.flops_per_token(of) - flops.flops_per_token(of, causal=True)
    assert attention == 6 * 12 * 768 * 1024
    positions_and_biases = 124_439_808 - flops.matmul_params(of)
    assert flops.flops_per_token(of, causal=True) + 6 * positions_and_biases == pytest.approx(803.3e6, rel=1e-4)


def test_peaks_take_the_longest_name_and_never_guess():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5") == 459e12
    for unknown in ("cpu", "NVIDIA GeForce RTX 5090", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA", ""):
        assert flops.peak_flops(unknown) is None


def test_no_jax_is_loaded():
    code = "import sys, trainer.reporting.flops; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 0
