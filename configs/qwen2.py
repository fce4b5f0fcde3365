"""Qwen2.5's shapes, 0.5 to 7 billion parameters, T = 4096: Llama's with biases of queries, keys and values.

The sizes up to 3b are for 16 TPU v6e or a node of 8 GPUs, `qwen2:7b` for 64 TPU v5p. We have not run them on such
hardware yet, so no time or loss is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  qwen2:0.5b      on h100:8        fits:   8.3 of 72.8 GiB, at best   1.13 s a step (compute)
  qwen2:0.5b      on v6e:4x4       fits:   6.3 of 31.2 GiB, at best   0.62 s a step (memory)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {"grad_accum_steps": 4, "model.qkv_bias": True, "model.rope_theta": 1e6, "model.norm_eps": 1e-6}
SIZES = {
    "0.5b": {"model.num_layers": 24, "model.num_heads": 14, "model.num_kv_heads": 2, "model.embed_dim": 896,
             "model.mlp_dim": 4864},
    "1.5b": {"model.num_layers": 28, "model.num_heads": 12, "model.num_kv_heads": 2, "model.embed_dim": 1536,
             "model.mlp_dim": 8960},
    "3b": {"model.num_layers": 36, "model.num_heads": 16, "model.num_kv_heads": 2, "model.embed_dim": 2048,
           "model.mlp_dim": 11008},
    "7b": {"model.num_layers": 28, "model.num_heads": 28, "model.num_kv_heads": 4, "model.embed_dim": 3584,
           "model.mlp_dim": 18944, "model.tie_embeddings": False, "optimizer.peak_lr": 3e-4, "optimizer.end_lr": 3e-5},
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    return members.member("qwen2", variant, SHARED, SIZES)
