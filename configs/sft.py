"""Supervised fine-tuning of a converted model on chats (docs/finetuning.md): all parameters, rows of 512 tokens.

  python -m launch.train --config=configs/sft.py --workdir=runs/sft --config.init_from=RUN --config.data.path=DATASET

RUN is a run of launch.convert or a folder of Hugging Face; DATASET is made by launch.prepare --format=chat and
launch.pack --seq_len=512. The weights decide the architecture. 32 rows a step suit some thousands of chats; give a
number of steps that is two or three epochs (train/epoch in metrics.jsonl).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_train_steps = 100
    config.global_batch_size = 32
    config.grad_accum_steps = 8
    config.data.update(seq_len=512, packed=True, mask_documents=True)
    # A tenth of a usual rate of pretraining: the weights are good already. No weight decay pulls them towards 0.
    config.optimizer.update(peak_lr=3e-5, end_lr=3e-6, warmup_steps=10, b2=0.999, weight_decay=0.0)
    config.checkpoint.update(every_steps=50)
    config.eval.update(every_steps=25, num_windows=0)
    config.sample.update(max_new_tokens=64)
    return config
