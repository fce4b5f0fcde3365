"""Gemma 3's text shapes, 0.27 to 4 billion parameters, T = 8192: five layers with a short window, then one without.

The sizes are for 16 TPU v6e or a node of 8 GPUs. We have not run them on such hardware yet, so no time or loss is
claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  gemma3:1b       on h100:8        fits:  19.2 of 72.8 GiB, at best   3.97 s a step (compute)
  gemma3:1b       on v6e:4x4       fits:  11.0 of 31.2 GiB, at best   2.14 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {
    "data.seq_len": 8192, "grad_accum_steps": 16, "model.mlp": "geglu", "model.norm_plus_one": True,
    "model.norm_at": "both", "model.norm_eps": 1e-6, "model.qk_norm": "head", "model.head_dim": 256,
    "model.attention_scale": 256**-0.5, "model.layer_pattern": ("local",) * 5 + ("global",), "model.window": 512,
    "model.rope_theta": 1e6, "model.local_rope_theta": 1e4,
}  # fmt: skip
SIZES = {
    "1b": {"model.num_layers": 26, "model.num_heads": 4, "model.num_kv_heads": 1, "model.embed_dim": 1152,
           "model.mlp_dim": 6912, "model.embedding_scale": 1152**0.5},
    "270m": {"model.num_layers": 18, "model.num_heads": 4, "model.num_kv_heads": 1, "model.embed_dim": 640,
             "model.mlp_dim": 2048, "model.embedding_scale": 640**0.5},
    "4b": {"model.num_layers": 34, "model.num_heads": 8, "model.num_kv_heads": 4, "model.embed_dim": 2560,
           "model.mlp_dim": 10240, "model.embedding_scale": 2560**0.5, "model.window": 1024},
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    return members.member("gemma3", variant, SHARED, SIZES)
