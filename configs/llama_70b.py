"""Llama 3.1 70B's shape: 80 layers, 64 heads, 8 key-value heads, 8192 wide, T = 8192, 8 million tokens a step.

`llama_70b` is for 512 TPU v5p (v5p-1024), with parameters sharded over all of them (fsdp). `llama_70b:two` is for two
such slices, which split a batch of the same size; each slice holds all parameters, so only gradients cross the network
between the slices. We have not run it on such hardware yet, so no time or loss is claimed here. Pass a prepared dataset
with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  llama_70b      on v5p:8x8x8     fits:  33.8 of 95.7 GiB, at best  20.16 s a step (compute)
  llama_70b:two  on 2 x v5p:8x8x8 fits:  21.0 of 95.7 GiB, at best  10.08 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 250_000
    config.global_batch_size = 1024
    config.data.update(path="datasets/web", seq_len=8192)
    config.model.update(
        num_layers=80, num_heads=64, num_kv_heads=8, embed_dim=8192, mlp_dim=28672, tie_embeddings=False,
        rope_theta=500_000.0, dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(peak_lr=1.5e-4, end_lr=1.5e-5, warmup_steps=2000, b2=0.95)
    config.checkpoint.update(every_steps=500, every_minutes=20.0, keep_every_steps=10_000)
    config.eval.update(every_steps=1000, num_windows=1024)
    if variant == "two":
        config.mesh.data = 2
    elif variant:
        raise ValueError(f"llama_70b has no variant {variant!r}; it has 'two'")
    return config
