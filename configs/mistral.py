"""Mistral's shape, 7 billion parameters: Llama's with a window of 4096 in all layers, T = 8192.

`mistral:7b` is for 64 TPU v5p, `mistral:7b-gpus` for a node of 8 GPUs. We have not run it on such hardware yet, so no
time or loss is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  mistral:7b-gpus on h100:8        fits:  22.1 of 72.8 GiB, at best  31.87 s a step (compute)
  mistral:7b      on v5p:4x4x4     fits:  19.8 of 95.7 GiB, at best   8.58 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {"data.seq_len": 8192, "grad_accum_steps": 2, "model.tie_embeddings": False, "model.window": 4096,
          "model.layer_pattern": ("local",)}  # fmt: skip
SIZES = {
    "7b": {
        "model.num_layers": 32, "model.num_heads": 32, "model.num_kv_heads": 8, "model.embed_dim": 4096,
        "model.mlp_dim": 14336, "optimizer.peak_lr": 3e-4, "optimizer.end_lr": 3e-5,
    },
}  # fmt: skip
MACHINES = {"7b-gpus": {"grad_accum_steps": 64}}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("mistral", variant, SHARED, SIZES, MACHINES)
