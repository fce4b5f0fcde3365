"""nanoGPT's shakespeare_char: 6 layers, 6 heads, 384 wide, T = 256, batch 64, dropout 0.2, 5,000 steps.

`shakespeare_char:cpu` is a smaller variant for two CPU cores: 4 layers, 4 heads, 128 wide, T = 64, batch 12, no
dropout, 2,000 steps. Measured: val/loss 1.667 over the full validation split, 3:15 on two (busy) CPU cores. We have
not trained the large variant to completion; nanoGPT reports a best val/loss of 1.4697 for it.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 5000
    config.global_batch_size = 64
    config.data.update(path="datasets/tinyshakespeare", source="tinyshakespeare", seq_len=256)
    config.model.update(num_layers=6, embed_dim=384, num_heads=6, dropout=0.2, scan_layers=False)
    config.optimizer.update(peak_lr=1e-3, end_lr=1e-4, warmup_steps=100, b2=0.99)
    config.checkpoint.update(every_steps=500)
    config.eval.update(every_steps=250, num_windows=0)
    config.sample.update(max_new_tokens=500)
    if variant == "cpu":
        config.num_train_steps = 2000
        config.global_batch_size = 12
        config.data.seq_len = 64
        config.model.update(num_layers=4, embed_dim=128, num_heads=4, dropout=0.0)
    elif variant:
        raise ValueError(f"shakespeare_char has no variant {variant!r}; it has 'cpu'")
    return config
