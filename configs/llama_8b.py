"""Llama 3.1 8B's shape: 32 layers, 32 heads, 8 key-value heads, 4096 wide, T = 8192, 4 million tokens a step.

`llama_8b` is for 64 TPU v5p (v5p-128), `llama_8b:gpus` for a node of 8 GPUs, `llama_8b:v6e` for 256 TPU v6e: all are
the same experiment with a different number of microbatches. Parameters are sharded over all devices
(fsdp). We have not run it on such hardware yet, so no time or loss is claimed here. Pass a prepared dataset with
--config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  llama_8b:gpus  on h100:8        fits:  27.1 of 72.8 GiB, at best  34.40 s a step (compute)
  llama_8b       on v5p:4x4x4     fits:  25.0 of 95.7 GiB, at best   9.27 s a step (compute)
  llama_8b:v6e   on v6e:16x16     fits:  10.8 of 31.2 GiB, at best   1.16 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import default

PARTS = {"": 2, "gpus": 64, "v6e": 1}  # microbatches, by variant


def get_config(variant: str = "") -> ConfigDict:
    if variant not in PARTS:
        raise ValueError(f"llama_8b has no variant {variant!r}; it has 'gpus' and 'v6e'")
    config = default.get_config()
    config.num_train_steps = 250_000
    config.global_batch_size = 512
    config.grad_accum_steps = PARTS[variant]
    config.data.update(path="datasets/web", seq_len=8192)
    config.model.update(
        num_layers=32, num_heads=32, num_kv_heads=8, embed_dim=4096, mlp_dim=14336, tie_embeddings=False,
        rope_theta=500_000.0, dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(peak_lr=3e-4, end_lr=3e-5, warmup_steps=2000, b2=0.95)
    config.checkpoint.update(every_steps=1000, every_minutes=20.0, keep_every_steps=10_000)
    config.eval.update(every_steps=1000, num_windows=1024)
    return config
