"""A Llama of 1.1 billion parameters (TinyLlama's shape): 22 layers, 32 heads, 4 key-value heads, 2048 wide, T = 2048.

`llama_1b` is for a slice of 16 TPU v5e or v6e, with parameters sharded over all devices (fsdp); `llama_1b:one` is the
same experiment on one H100 or H200, in 128 microbatches. We have not run it on such hardware yet, so no time or loss is
claimed here. Pass a prepared dataset with --config.data.path.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  llama_1b:one   on h100:1        fits:  43.1 of 72.8 GiB, at best   7.27 s a step (compute)
  llama_1b:one   on h200:1        fits:  43.1 of 129.2 GiB, at best   7.27 s a step (compute)
  llama_1b       on v5e:4x4       fits:   7.2 of 15.8 GiB, at best   2.82 s a step (compute)
  llama_1b       on v6e:4x4       fits:   8.0 of 31.2 GiB, at best   0.60 s a step (compute)
  llama_1b       on v5p:2x2x2     fits:  15.1 of 95.7 GiB, at best   2.42 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 100_000
    config.global_batch_size = 512
    config.grad_accum_steps = 2
    config.data.update(path="datasets/web", seq_len=2048)
    config.model.update(
        num_layers=22, num_heads=32, num_kv_heads=4, embed_dim=2048, mlp_dim=5632, tie_embeddings=False,
        dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000, b2=0.95)
    config.checkpoint.update(every_steps=1000, every_minutes=20.0, keep_every_steps=10_000)
    config.eval.update(every_steps=1000, num_windows=1024)
    if variant == "one":  # launch.plan --search found this for an H100; the microbatch is half the largest that fits
        config.grad_accum_steps = 128
        config.model.remat = "none"
    elif variant:
        raise ValueError(f"llama_1b has no variant {variant!r}; it has 'one'")
    return config
