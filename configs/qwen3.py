"""Qwen3's dense shapes, 0.6 to 32 billion parameters, T = 4096: heads of 128, with norms of each query and key.

The sizes up to 4b are for 16 TPU v6e or a node of 8 GPUs, the larger ones for 64 TPU v5p. We have not run them on such
hardware yet, so no time or loss is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  qwen3:0.6b      on h100:8        fits:   9.6 of 72.8 GiB, at best   1.69 s a step (compute)
  qwen3:0.6b      on v6e:4x4       fits:   6.9 of 31.2 GiB, at best   0.91 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {"grad_accum_steps": 4, "model.qk_norm": "head", "model.head_dim": 128, "model.num_kv_heads": 8,
          "model.rope_theta": 1e6, "model.norm_eps": 1e-6}  # fmt: skip
LARGE = {"model.tie_embeddings": False, "optimizer.peak_lr": 3e-4, "optimizer.end_lr": 3e-5}
SIZES = {
    "0.6b": {"model.num_layers": 28, "model.num_heads": 16, "model.embed_dim": 1024, "model.mlp_dim": 3072},
    "1.7b": {"model.num_layers": 28, "model.num_heads": 16, "model.embed_dim": 2048, "model.mlp_dim": 6144},
    "4b": {"model.num_layers": 36, "model.num_heads": 32, "model.embed_dim": 2560, "model.mlp_dim": 9728},
    "8b": LARGE | {"model.num_layers": 36, "model.num_heads": 32, "model.embed_dim": 4096, "model.mlp_dim": 12288},
    "14b": LARGE | {"model.num_layers": 40, "model.num_heads": 40, "model.embed_dim": 5120, "model.mlp_dim": 17408},
    "32b": LARGE | {"model.num_layers": 64, "model.num_heads": 64, "model.embed_dim": 5120, "model.mlp_dim": 25600},
}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("qwen3", variant, SHARED, SIZES)
