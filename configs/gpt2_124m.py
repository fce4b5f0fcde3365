"""GPT-2 124M as nanoGPT trains it: 12 layers, 12 heads, 768 wide, T = 1024, 480 x 1024 tokens a step, 600,000 steps.

`gpt2_124m` is for a node of 8 GPUs; `gpt2_124m:one` is the same experiment on one GPU, in 15 microbatches. We have not
run it on such hardware yet, so no time or loss is claimed here. nanoGPT reports a validation loss of 2.85 on
OpenWebText for this recipe. To compare, pass its train.bin and val.bin with --config.data.path and GPT-2's
merge ranks with --config.data.tokenizer_path, or prepare the text with --tokenizer=gpt2.tiktoken.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  gpt2_124m:one  on h100:1        fits:  14.8 of 72.8 GiB, at best   0.40 s a step (compute)
  gpt2_124m      on h100:8        fits:  24.3 of 72.8 GiB, at best   0.05 s a step (compute)
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 600_000
    config.global_batch_size = 480
    config.data.update(path="datasets/openwebtext", seq_len=1024)
    config.model.update(
        num_layers=12, num_heads=12, embed_dim=768, mlp="gelu", norm="layernorm", position="learned",
        bias=False, dtype="bfloat16", scan_layers=False,
    )  # fmt: skip
    config.optimizer.update(peak_lr=6e-4, end_lr=6e-5, warmup_steps=2000, b2=0.95)
    config.checkpoint.update(every_steps=2000, every_minutes=30.0)
    config.eval.update(every_steps=1000, num_windows=1920)
    config.metrics.every_steps = 10
    if variant == "one":
        config.grad_accum_steps = 15
    elif variant:
        raise ValueError(f"gpt2_124m has no variant {variant!r}; it has 'one'")
    return config
