"""Corpus to dataset folder: train the tokenizer, encode, split, write shards and manifest."""

import collections
import hashlib
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from data import corpus, formats, tokenizers
from data.errors import DataError

SHARD_TOKENS = 100_000_000


class _ShardWriter:
    """Writes one split, shard by shard, and remembers what the manifest needs."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: str):
        self.folder, self.split = folder, split
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[formats.Shard] = []
        self.offsets: list[int] = []
        self.tokens = self.text_bytes = 0
        self._pending: collections.deque[np.ndarray] = collections.deque()
        self._pending_tokens = 0

    def document(self, ids: np.ndarray, text_bytes: int) -> None:
        self.offsets.append(self.tokens)
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._pending.append(ids.astype(self.dtype))
        self._pending_tokens += len(ids)
        while self._pending_tokens >= SHARD_TOKENS:
            self._write(SHARD_TOKENS)

    def _write(self, tokens: int) -> None:
        # dtype: left to itself, concatenate turns the byte order into the machine's.
        joined = np.concatenate([*self._pending, np.empty(0, self.dtype)], dtype=self.dtype)
        path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
        raw = joined[:tokens].tobytes()
        path.write_bytes(raw)
        self.shards.append(formats.Shard(path.name, min(tokens, len(joined)), hashlib.sha256(raw).hexdigest()))
        self._pending = collections.deque([joined[tokens:]])
        self._pending_tokens = len(joined) - tokens

    def close(self) -> formats.Split:
        if self._pending_tokens or not self.shards:
            self._write(self._pending_tokens)
        np.array(self.offsets, "<u8").tofile(self.folder / f"{self.split}.documents.bin")
        return formats.Split(self.tokens, self.text_bytes, len(self.offsets), tuple(self.shards))


def prepare(
    out: pathlib.Path,
    *,
    source: str,
    tokenizer: str,
    val_fraction: float = 0.1,
    min_frequency: int = 1,
    special_tokens: Sequence[str] = (),
    invalid_utf8: str = "error",
    overwrite: bool = False,
) -> formats.Manifest:
    """Writes the dataset folder `out` and returns its manifest.

    One document is split as nanoGPT does it: the first 1 - val_fraction of the characters (bytes for the byte
    tokenizer) train. Several documents are split whole, by a hash of their names, and each ends with `<eos>`.

    The folder appears under its name only when it is complete: a killed run leaves `OUT.partial`, which the next
    removes. A folder made by the same request, and whole, is left as it is.

    Raises:
      DataError: the source cannot be used; `out` is no dataset; or it is damaged or of another request and `overwrite`
        is false.
    """
    request = {
        "source": source,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "min_frequency": min_frequency,
        "special_tokens": list(special_tokens),
        "invalid_utf8": invalid_utf8,
    }
    if out.exists():
        if not formats.is_dataset(out):  # never replaced, whatever the flags
            raise DataError(f"{out} exists and is not a dataset; choose another --out")
        if not overwrite:
            return _intact(out, request)
    documents = corpus.find(source, cache=out.parent)
    specials = list(special_tokens)
    if len(documents) > 1 and tokenizers.END_OF_TEXT not in specials:
        specials.append(tokenizers.END_OF_TEXT)
    codec = _make_tokenizer(tokenizer, documents, min_frequency, specials, invalid_utf8)
    eos = codec.eos_id if len(documents) > 1 else None

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writers = {s: _ShardWriter(partial, s, formats.token_dtype(codec.vocab_size)) for s in ("train", "val")}
    for split, text in _split_texts(documents, codec, val_fraction, invalid_utf8):
        ids = codec.encode(text) if isinstance(text, str) else tokenizers.ByteTokenizer.encode_bytes(text)
        if eos is not None:
            ids = np.append(ids, np.uint32(eos))
        writers[split].document(ids, len(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text))

    tokenizer_file = tokenizers.save(codec, partial / "tokenizer")
    splits = {name: writer.close() for name, writer in writers.items()}
    manifest = formats.Manifest(
        dtype=formats.token_dtype(codec.vocab_size),
        vocab_size=codec.vocab_size,
        eos_id=eos,
        tokenizer_sha256=formats.sha256_file(tokenizer_file),
        splits=splits,
        request=request,
    )
    (partial / formats.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return manifest


def _intact(out: pathlib.Path, request: dict) -> formats.Manifest:
    """The manifest of the dataset that is there; DataError when it is damaged or was made by another request."""
    manifest = formats.read_manifest(out)
    if manifest.request != request:
        raise DataError(
            f"{out} was prepared by another request ({manifest.request}); choose another --out, or --overwrite"
        )
    for split in manifest.splits:
        formats.TokenFiles(out, manifest, split)
    tokenizers.load(out / "tokenizer", manifest.tokenizer_sha256)
    return manifest


def _make_tokenizer(
    kind: str, documents: list[corpus.Document], min_frequency: int, specials: list[str], invalid_utf8: str
) -> tokenizers.Tokenizer:
    if kind not in tokenizers.KINDS:
        raise DataError(f"--tokenizer={kind} is not one of {', '.join(tokenizers.KINDS)}")
    if kind == "byte":
        return tokenizers.ByteTokenizer(specials)
    texts = (d.read_text(invalid_utf8) for d in documents)
    return tokenizers.CharTokenizer.train(texts, min_frequency=min_frequency, special_tokens=specials)


def _split_texts(
    documents: list[corpus.Document], codec: tokenizers.Tokenizer, val_fraction: float, invalid_utf8: str
) -> Iterator[tuple[str, str | bytes]]:
    """(split, text) of each document; text is bytes for the byte tokenizer, which takes any."""

    def read(document: corpus.Document) -> str | bytes:
        return document.read_bytes() if codec.kind == "byte" else document.read_text(invalid_utf8)

    if len(documents) == 1:
        text = read(documents[0])
        cut = int(len(text) * (1 - val_fraction))
        yield "train", text[:cut]
        yield "val", text[cut:]
        return
    train, val = corpus.split(documents, val_fraction)
    for split, part in (("train", train), ("val", val)):
        for document in part:
            yield split, read(document)
