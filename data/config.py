"""What the data package needs to know. No heavy imports: a launcher validates this before it loads JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str = ""  # dataset folder written by launch.prepare
    seq_len: int = 64  # tokens predicted per sample, T; a sample is T + 1 tokens long
    prefetch: int = 2  # batches read ahead by the loader's thread
    source: str = ""  # what launch.prepare makes `path` from; quoted when `path` does not exist yet
    tokenizer: str = "char"  # likewise

    def __post_init__(self):
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len is {self.seq_len}; it must be at least 1 token")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch is {self.prefetch}; it must be at least 1 batch")
