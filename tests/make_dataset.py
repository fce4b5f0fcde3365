"""Writes dataset folders with chosen tokens and shards, so that a test knows what each window must hold."""

import itertools
import pathlib

import numpy as np

from data.token_files import formats


def write(
    folder: pathlib.Path,
    train: list[np.ndarray],
    val: list[np.ndarray] | None = None,
    *,
    vocab_size: int = 60_000,
    dtype: str = "uint16",
) -> formats.Manifest:
    """Writes a dataset with these arrays as its shards. Without `val`, the dataset has no validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, arrays in (("train", train), ("val", val)):
        if arrays is None:
            continue
        shards = []
        for i, array in enumerate(arrays):
            path = folder / f"{name}-{i:05d}.bin"
            path.write_bytes(np.asarray(array).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
            shards.append(formats.Shard(path.name, len(array), formats.sha256_file(path)))
        tokens = sum(map(len, arrays))
        splits[name] = formats.Split(tokens, text_bytes=2 * tokens, documents=1, shards=tuple(shards))
    manifest = formats.Manifest(dtype, vocab_size, None, tokenizer_sha256="0" * 64, splits=splits, request={})
    (folder / formats.MANIFEST).write_text(manifest.to_json())
    return manifest


def counting_shards(*lengths: int) -> list[np.ndarray]:
    """Shards that count 0, 1, 2, … through all of them: each token equals its offset. Needs dtype uint32 past 65536."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(ends)]
