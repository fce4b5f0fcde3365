"""A Llama of 1.1 billion parameters (TinyLlama's shape): 22 layers, 32 heads, 4 key-value heads, 2048 wide, T = 2048.

Meant for 16 or more TPU v5e or 8 H100, parameters split over all devices (fsdp). Not run by us yet on such hardware,
so no time or loss is claimed here. Name a prepared dataset with --config.data.path.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 100_000
    config.global_batch_size = 512
    config.data.update(path="datasets/web", seq_len=2048)
    config.model.update(
        num_layers=22, num_heads=32, num_kv_heads=4, embed_dim=2048, mlp_dim=5632, tie_embeddings=False,
        dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000, b2=0.95)
    config.checkpoint.update(every_steps=1000, every_minutes=20.0, keep_every_steps=10_000)
    config.eval.update(every_steps=1000, num_windows=1024)
    return config
