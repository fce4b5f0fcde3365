"""Gemma 2's shapes, 2 to 27 billion parameters, T = 8192: every other layer has a window of 4096, scores and logits
have soft caps, and each sub-layer has a norm before and after it.

`gemma2:2b` is for 16 TPU v6e, `gemma2:2b-gpus` for a node of 8 GPUs, the larger sizes for 64 TPU v5p. On GPUs the plain
kernel computes attention, because cuDNN has no soft cap. We have not run them on such hardware yet, so no time or loss
is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  gemma2:2b-gpus  on h100:8        fits:  17.5 of 72.8 GiB, at best  12.65 s a step (compute)
  gemma2:2b       on v6e:4x4       fits:  14.3 of 31.2 GiB, at best   6.30 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {
    "data.seq_len": 8192, "grad_accum_steps": 16, "model.mlp": "geglu", "model.norm_plus_one": True,
    "model.norm_at": "both", "model.norm_eps": 1e-6, "model.window": 4096, "model.layer_pattern": ("local", "global"),
    "model.attention_softcap": 50.0, "model.logits_softcap": 30.0, "optimizer.peak_lr": 3e-4, "optimizer.end_lr": 3e-5,
}  # fmt: skip
SIZES = {
    "2b": {"model.num_layers": 26, "model.num_heads": 8, "model.num_kv_heads": 4, "model.head_dim": 256,
           "model.embed_dim": 2304, "model.mlp_dim": 9216, "model.attention_scale": 256**-0.5,
           "model.embedding_scale": 2304**0.5},
    "9b": {"grad_accum_steps": 8,
           "model.num_layers": 42, "model.num_heads": 16, "model.num_kv_heads": 8, "model.head_dim": 256,
           "model.embed_dim": 3584, "model.mlp_dim": 14336, "model.attention_scale": 256**-0.5,
           "model.embedding_scale": 3584**0.5},
    "27b": {"grad_accum_steps": 8,
            "model.num_layers": 46, "model.num_heads": 32, "model.num_kv_heads": 16, "model.head_dim": 128,
            "model.embed_dim": 4608, "model.mlp_dim": 36864, "model.attention_scale": 144**-0.5,
            "model.embedding_scale": 4608**0.5},
}  # fmt: skip
MACHINES = {"2b-gpus": {"grad_accum_steps": 64}}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("gemma2", variant, SHARED, SIZES, MACHINES)
