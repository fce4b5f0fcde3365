"""OLMo 2's shapes, 1 to 13 billion parameters, T = 4096: norms after each sub-layer, and of all queries and keys.

`olmo2:1b` is for 16 TPU v6e or a node of 8 GPUs, the larger ones for 64 TPU v5p. We have not run them on such hardware
yet, so no time or loss is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  olmo2:1b        on h100:8        fits:  16.1 of 72.8 GiB, at best   2.78 s a step (compute)
  olmo2:1b        on v6e:4x4       fits:   8.1 of 31.2 GiB, at best   1.50 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {"grad_accum_steps": 4, "model.norm_at": "after", "model.qk_norm": "projection", "model.norm_eps": 1e-6,
          "model.rope_theta": 500_000.0, "model.tie_embeddings": False}  # fmt: skip
SIZES = {
    "1b": {"model.num_layers": 16, "model.num_heads": 16, "model.embed_dim": 2048, "model.mlp_dim": 8192},
    "7b": {"model.num_layers": 32, "model.num_heads": 32, "model.embed_dim": 4096, "model.mlp_dim": 11008},
    "13b": {"model.num_layers": 40, "model.num_heads": 40, "model.embed_dim": 5120, "model.mlp_dim": 13824},
}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("olmo2", variant, SHARED, SIZES)
