"""Checks that documents end with the token of data.mask_documents; a token that never occurs would mask nothing."""

from collections.abc import Iterable, Iterator

import numpy as np

from data.dataset import Dataset
from data.errors import DataError
from data.token_files import fingerprint

DOCUMENTS_WITH_ENDS = 0.9  # the least share of an index's documents with this end; below, they end with another token


def check_documents_end(datasets: Iterable[Dataset], eos_id: int) -> None:
    """Raises DataError if the training tokens of a dataset of several documents do not contain their end, `eos_id`."""
    for data in datasets:
        documents = data.manifest.splits["train"].documents
        if not data.external_files and (documents <= 1 or data.manifest.eos_id == eos_id):
            continue  # a single text is one document; otherwise, launch.prepare wrote an end after each document
        shards = data.files("train").shards
        whole = sum(len(shard) for shard in shards) * shards[0].itemsize <= fingerprint.WHOLE_BYTES
        looked = found = 0
        for tokens in _parts(shards, whole):
            looked, found = looked + len(tokens), found + int(np.count_nonzero(tokens == eos_id))
        if not found or (whole and found < DOCUMENTS_WITH_ENDS * documents):
            of = f", which has {documents:,} documents," if documents else ""
            raise DataError(
                f"token {eos_id} ends documents for data.mask_documents, but {data.path}{of} has it {found:,} times in "
                f"{looked:,} tokens; set data.eos_id to the token that ends them, write the tokens again with one "
                "after each document (Megatron's --append-eod), or leave data.mask_documents false"
            )


def _parts(shards: list[np.ndarray], whole: bool) -> Iterator[np.ndarray]:
    """Chunks of all tokens if `whole`, else blocks that are spread evenly over each shard."""
    for tokens in shards:
        size = (fingerprint.CHUNK_BYTES if whole else fingerprint.BLOCK_BYTES) // tokens.itemsize
        if whole or len(tokens) <= fingerprint.SAMPLED_BLOCKS * size:
            starts = np.arange(0, len(tokens), size)
        else:
            starts = np.linspace(0, len(tokens) - size, fingerprint.SAMPLED_BLOCKS).astype(np.int64)
        for start in starts.tolist():
            yield tokens[start : start + size]
