"""GPT-2 as nanoGPT trains it: 124M, 350M, 774M and 1558M parameters, T = 1024, 480 x 1024 tokens a step, 600,000 steps.

`gpt2:124m` and `gpt2:350m` are for a node of 8 GPUs, the larger ones shard their parameters over it (fsdp);
`gpt2:124m-one` is the same experiment on one GPU, in 15 microbatches, and `gpt2:124m-tpu` is for 4 TPU v6e. We have not
run them on such hardware yet, so no time or loss is claimed here. nanoGPT reports a validation loss of 2.85 on
OpenWebText for 124M. To compare, pass its train.bin and val.bin with --config.data.path and GPT-2's merge ranks with
--config.data.tokenizer_path, or prepare the text with --tokenizer=gpt2.tiktoken.

Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):
  gpt2:124m-one   on h100:1        fits:  14.8 of 72.8 GiB, at best   0.40 s a step (compute)
  gpt2:124m       on h100:8        fits:  24.3 of 72.8 GiB, at best   0.05 s a step (compute)
  gpt2:124m-tpu   on v6e:2x2       fits:   6.7 of 31.2 GiB, at best   0.14 s a step (memory)
"""

from ml_collections import ConfigDict

from configs import members

SHARED = {
    "num_train_steps": 600_000, "global_batch_size": 480, "data.path": "datasets/openwebtext", "data.seq_len": 1024,
    "model.mlp": "gelu", "model.norm": "layernorm", "model.position": "learned", "model.bias": False,
    "model.scan_layers": False, "model.remat": "none", "mesh.data": -1, "mesh.fsdp": 1,
    "optimizer.peak_lr": 6e-4, "optimizer.end_lr": 6e-5, "checkpoint.every_steps": 2000,
    "checkpoint.every_minutes": 30.0, "checkpoint.keep_every_steps": 0, "eval.num_windows": 1920,
    "metrics.every_steps": 10,
}  # fmt: skip
LARGE = {"model.scan_layers": True, "mesh.data": 1, "mesh.fsdp": -1, "grad_accum_steps": 2}
SIZES = {
    "124m": {"model.num_layers": 12, "model.num_heads": 12, "model.embed_dim": 768},
    "350m": {"model.num_layers": 24, "model.num_heads": 16, "model.embed_dim": 1024, "grad_accum_steps": 3},
    "774m": LARGE | {"model.num_layers": 36, "model.num_heads": 20, "model.embed_dim": 1280},
    "1558m": LARGE | {"model.num_layers": 48, "model.num_heads": 25, "model.embed_dim": 1600},
}
MACHINES = {"124m-one": {"grad_accum_steps": 15}, "124m-tpu": {"grad_accum_steps": 15}}


def get_config(variant: str = "") -> ConfigDict:
    return members.member("gpt2", variant, SHARED, SIZES, MACHINES)
