"""Llama: 1.1 billion parameters (TinyLlama's shape, T = 2048), 8 and 70 billion (Llama 3.1's, T = 8192).

`llama:1b` is for a slice of 16 TPU v5e or v6e, `llama:1b-one` for one H100 or H200. `llama:8b` is for 64 TPU v5p
(v5p-128), `llama:8b-gpus` for a node of 8 GPUs, `llama:8b-v6e` for 256 TPU v6e. `llama:70b` is for 512 TPU v5p
(v5p-1024), `llama:70b-two` for two such slices, which split a batch of the same size; each slice holds all parameters,
so only gradients cross the network between the slices. A size is the same experiment on all its machines. We have not
run them on such hardware yet, so no time or loss is claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  llama:1b-one    on h100:1        fits:  43.1 of 72.8 GiB, at best   7.27 s a step (compute)
  llama:1b-one    on h200:1        fits:  43.1 of 129.2 GiB, at best   7.27 s a step (compute)
  llama:1b        on v5e:4x4       fits:   7.2 of 15.8 GiB, at best   2.82 s a step (compute)
  llama:1b        on v6e:4x4       fits:   8.0 of 31.2 GiB, at best   0.60 s a step (compute)
  llama:1b        on v5p:2x2x2     fits:  15.1 of 95.7 GiB, at best   2.42 s a step (compute)
  llama:8b-gpus   on h100:8        fits:  27.1 of 72.8 GiB, at best  34.40 s a step (compute)
  llama:8b        on v5p:4x4x4     fits:  25.0 of 95.7 GiB, at best   9.27 s a step (compute)
  llama:8b-v6e    on v6e:16x16     fits:  10.8 of 31.2 GiB, at best   1.16 s a step (compute)
  llama:70b       on v5p:8x8x8     fits:  33.8 of 95.7 GiB, at best  20.16 s a step (compute)
  llama:70b-two   on 2 x v5p:8x8x8 fits:  21.0 of 95.7 GiB, at best  10.08 s a step (compute)
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
