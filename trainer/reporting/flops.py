"""FLOPs of a train step, from its configuration only; the formula of MFU, and the chips' peaks for it. No JAX.

A matrix product costs 2 FLOPs per parameter and token, and its backward pass twice that. Attention multiplies queries
with keys, and weights with values: 2 products of 2 H Q T FLOPs per token and layer (H heads of size Q, T keys), and
twice that in the backward pass. So, per token, with P the parameters in matrix products and L layers:

    flops_per_token                  6 P + 12 L H Q T     attention counted full: used for MFU here
    flops_per_token(causal=True)     6 P +  6 L H Q T     only the keys that a query may see (llm.c)
    nanogpt_flops_per_token          6 N + 12 L H Q T     N: all parameters except learned positions (nanoGPT)
    hardware_flops_per_token         the first, plus what model.remat recomputes

The first is PaLM's (Chowdhery et al., 2022, appendix B): model FLOPs, whether or not a kernel skips or recomputes some.
For a GPT-2, P and N differ only by norms and biases (0.02 %), so the figures can be compared with nanoGPT's.
Element-wise operations, norms, the embedding look-up and the optimizer are not counted: they take under 2 % at the
sizes that matter.
"""

import math

from model.config import ModelConfig
from trainer import chips
from trainer.config import Config

FORMULA = "6 P + 12 L H Q T (attention counted full, nothing recomputed)"  # how to name the formula beside an MFU


def attention_params(model: ModelConfig) -> int:
    """Parameters of one layer's query, key, value and output projections."""
    return 2 * model.embed_dim * model.head_size * (model.num_heads + model.kv_heads)


def mlp_params(model: ModelConfig) -> int:
    """Parameters of one layer's feed-forward: up and down, and the gate if it has one."""
    return (3 if model.gated else 2) * model.embed_dim * model.mlp_size


def head_params(model: ModelConfig) -> int:
    """Parameters of the output head, tied or not, including rows that pad the vocabulary, which are also computed."""
    return model.padded_vocab_size * model.embed_dim


def matmul_params(config: Config) -> int:
    """P, the number of parameters in matrix products: without the embedding look-up, norms, biases and positions."""
    model = config.model
    of_layer = attention_params(model) + mlp_params(model) + adapter_params(model)
    return model.num_layers * of_layer + head_params(model)


def adapter_params(model: ModelConfig) -> int:
    """Parameters of one layer's adapters."""
    return model.lora.rank * sum(sum(shape) for path, shape in model.projections.items() if model.lora.adapts(path))


def frozen_matmul_params(config: Config) -> int:
    """The part of P that is not trained: the products that would make its gradients are not computed."""
    model = config.model
    shapes = model.projections.items()
    frozen = sum(math.prod(shape) for path, shape in shapes if not config.trains(f"{path}.kernel"))
    table = "embedding" if model.tie_embeddings else "head.kernel"
    return model.num_layers * frozen + (0 if config.trains(table) else head_params(model))


def attention_flops_per_token(config: Config, *, causal: bool = False) -> int:
    """2 L H Q T: one of the two products of attention in the forward pass, in all layers.

    A query has T keys, or W in a local layer with window W. With `causal`, only the keys that a query sees count, on
    average T / 2, or W (1 - W / 2T).
    """
    model, length = config.model, config.data.seq_len
    keys = 0.0
    for local in model.local_layers:
        most = min(model.window or length, length) if local else length
        keys += most * (1 - most / (2 * length)) if causal else most
    return round(2 * model.num_heads * model.head_size * keys)


def flops_per_token(config: Config, *, causal: bool = False) -> int:
    """Model FLOPs of one token, forward and backward: 6 P + 12 L H Q T, or with `causal` 6 P + 6 L H Q T.

    Parameters that are frozen count 4 times instead of 6 times, because they have no gradient.
    """
    return _of_products(config) + 6 * attention_flops_per_token(config, causal=causal)


def _of_products(config: Config) -> int:
    """6 P without the gradients of frozen parameters."""
    return 6 * matmul_params(config) - 2 * frozen_matmul_params(config)


def nanogpt_flops_per_token(config: Config, num_params: int) -> int:
    """6 N + 12 L H Q T as nanoGPT computes it, for comparison with nanoGPT's figures.

    Args:
      num_params: the number of all parameters of the model; this function subtracts learned positions.
    """
    model = config.model
    if model.position == "learned":
        num_params -= model.max_seq_len * model.embed_dim
    return 6 * num_params + 6 * attention_flops_per_token(config)


def hardware_flops_per_token(config: Config, *, flash: bool = False) -> int:
    """FLOPs of a token's products that devices execute: flops_per_token plus what model.remat recomputes.

    The policies recompute: none: nothing. attention: the scores (the weighted sum is not needed again). dots: scores
    and weighted sum, because the products with weights are kept. full, offload: a layer's forward pass except its last
    product, which the backward pass does not need. tests/flops_test.py compares each with XLA's count.

    Args:
      flash: whether the kernel (cudnn, splash) skips what is masked and recomputes scores in its own backward pass;
        remat then repeats the kernel's full forward pass. The plain kernel computes up to twice the keys of a window,
        which is not counted.
    """
    model, attention = config.model, attention_flops_per_token(config)
    layer = attention_params(model) + mlp_params(model)
    last = model.embed_dim * model.mlp_size
    weights_again = 2 * model.num_layers * (layer - last) if model.remat in ("full", "offload") else 0
    if flash:
        products = 7 + (0 if model.remat == "none" else 2)
        return _of_products(config) + weights_again + products * attention_flops_per_token(config, causal=True)
    scores_again = {"none": 0, "attention": 1, "dots": 2, "full": 2, "offload": 2}[model.remat]
    return flops_per_token(config) + weights_again + scores_again * attention


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a jax.Device.device_kind; None if not known, because a guessed MFU would mislead."""
    if "PCIe" in device_kind or "NVL" in device_kind:  # named like the SXM cards, but a fifth slower or more
        return None
    chip = chips.chip_of(device_kind)
    return None if chip is None else chip.flops
