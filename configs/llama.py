"""Llama: 1.1 billion parameters (TinyLlama's shape, T = 2048), 8 and 70 billion (Llama 3.1's, T = 8192).

`llama:1b` is for a slice of 16 TPU v5e or v6e, `llama:1b-one` for one H100 or H200. `llama:8b` is for 64 TPU v5p
(v5p-128), `llama:8b-gpus` for a node of 8 GPUs, `llama:8b-v6e` for 256 TPU v6e. `llama:70b` is for 512 TPU v5p
(v5p-1024), `llama:70b-two` for two such slices, which split a batch of the same size; each slice holds all parameters,
so only gradients cross the network between the slices. A size is the same experiment on all its machines. We have not
run them on such hardware yet, so no time or loss is claimed here. Pass a prepared dataset with --config.data.path.
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {"model.tie_embeddings": False}
LLAMA_3 = {"num_train_steps": 250_000, "data.seq_len": 8192, "model.num_kv_heads": 8, "model.rope_theta": 500_000.0}
SIZES = {
    "1b": {
        "data.seq_len": 2048, "grad_accum_steps": 2, "model.num_layers": 22, "model.num_heads": 32,
        "model.num_kv_heads": 4, "model.embed_dim": 2048, "model.mlp_dim": 5632,
    },
    "8b": LLAMA_3 | {
        "grad_accum_steps": 2, "model.num_layers": 32, "model.num_heads": 32, "model.embed_dim": 4096,
        "model.mlp_dim": 14336, "optimizer.peak_lr": 3e-4, "optimizer.end_lr": 3e-5,
    },
    "70b": LLAMA_3 | {
        "global_batch_size": 1024, "model.num_layers": 80, "model.num_heads": 64, "model.embed_dim": 8192,
        "model.mlp_dim": 28672, "optimizer.peak_lr": 1.5e-4, "optimizer.end_lr": 1.5e-5,
        "checkpoint.every_steps": 500,
    },
}  # fmt: skip
MACHINES = {
    # launch.plan --search found this for an H100; the microbatch is half the largest that fits.
    "1b-one": {"grad_accum_steps": 128, "model.remat": "none"},
    "8b-gpus": {"grad_accum_steps": 64},
    "8b-v6e": {"grad_accum_steps": 1},
    "70b-two": {"mesh.data": 2},
}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("llama", variant, SHARED, SIZES, MACHINES)
