"""The dataset folder: manifest.json, raw little-endian token shards, document offsets, tokenizer/. It is written once.
Every file is checked when it is read: a truncated, missing or unrelated file is an error that names the file and both
sizes.

    DATASET/manifest.json                 the fields of Manifest
    DATASET/train-00000.bin               tokens, uint16 or uint32, no header; likewise val-00000.bin
    DATASET/train.documents.bin           uint64 offsets, in tokens, of the first token of each document of the split
    DATASET/train.loss_mask.bin           chats: a byte for each token of the split, 1 if it is supervised
    DATASET/tokenizer/                    the tokenizer's own file
    DATASET/summary.json                  what launch.prepare counted
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from data import order
from data.config import Task
from data.errors import DataError

if TYPE_CHECKING:
    from data import packing

FORMAT = "meshlm-tokens"
VERSION = 1
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
# The mark must be at the beginning of the file: another program's manifest may mention our format further on.
MARK = re.compile(rb'\s*(\{\s*"format"\s*:\s*)?"%s"' % FORMAT.encode())
MARK_BYTES = 1024
NOT_IN_FINGERPRINT = ("request", "files", "loses_text")  # fields that do not affect the tokens
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")  # the name of a file in the folder itself
# If a split is at most this large, every start of a run reads and hashes all its shards (in under a second). Otherwise
# only their sizes are checked. In both cases, the largest id of every batch is checked.
HASH_AT_START_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    tokens: int
    text_bytes: int  # UTF-8 bytes of the encoded text, for bits per byte
    documents: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    dtype: str  # 'uint16' or 'uint32', little-endian
    vocab_size: int
    eos_id: int | None  # the token after each document, if any
    tokenizer_sha256: str
    splits: dict[str, Split]
    request: dict  # the settings of launch.prepare; not part of the fingerprint
    # The sha256 of each other file of the folder, by name; not part of the fingerprint; earlier versions left it empty.
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    # Whether the tokenizer lost text: the tokens then stand for less than text_bytes; not part of the fingerprint.
    loses_text: bool = False
    # Of chats: the sha256 of the loss mask of each split. Versions that do not know this field refuse the dataset.
    loss_masks: dict[str, str] = dataclasses.field(default_factory=dict)
    # Whether the chats are pairs: each preferred one is followed by the one that it is preferred to.
    pairs: bool = False

    def fields(self) -> dict[str, Any]:
        """All fields by name; those of chats only if set, so that other manifests are what they were before."""
        fields = dataclasses.asdict(self)
        unset = {name for name in ("loss_masks", "pairs") if not fields[name]}
        return {name: value for name, value in fields.items() if name not in unset}

    @property
    def task(self) -> Task:
        """What the dataset is for: pretrain, sft, or dpo."""
        return "dpo" if self.pairs else "sft" if self.loss_masks else "pretrain"

    def fingerprint(self) -> str:
        """16 hex digits that change with any token, the tokenizer, or the algorithm that orders the sequences."""
        content = {k: v for k, v in self.fields().items() if k not in NOT_IN_FINGERPRINT}
        canonical = json.dumps([VERSION, order.VERSION, content], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint()}
        content = head | self.fields()
        if self.files:
            content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content, indent=1) + "\n"


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_dataset(folder: pathlib.Path) -> bool:
    """Whether the folder is a dataset of any version, damaged or not: its manifest begins with our mark.

    Raises:
      OSError: the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return MARK.match(f.read(MARK_BYTES)) is not None


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a dataset. Raises FileNotFoundError if it is missing, DataError if it cannot be used."""
    path = folder / MANIFEST
    text = path.read_bytes()
    try:
        raw = json.loads(text.decode("utf-8"))
        if raw.pop("format") != FORMAT or raw.pop("version") != VERSION:
            raise ValueError(f"not format {FORMAT!r} version {VERSION}")
        fingerprint = raw.pop("fingerprint")
        raw.pop("sha256", None)  # checked only by launch.inspect: `request` may be edited by hand
        splits = {
            name: Split(**(s | {"shards": tuple(Shard(**shard) for shard in s["shards"])}))
            for name, s in raw.pop("splits").items()
        }
        manifest = Manifest(splits=splits, **raw)
        _check_values(manifest)
        found = manifest.fingerprint()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(
            f"{path} is not a manifest that this version reads ({e}); prepare again with --overwrite"
        ) from None
    if found != fingerprint:
        raise DataError(f"{path} was changed by hand or by another version; prepare again with --overwrite")
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError for values that no version writes, so that a forged manifest names only files of the folder."""
    if not isinstance(manifest.request, dict):
        raise ValueError(f"request {manifest.request!r}")
    if not isinstance(manifest.loses_text, bool):
        raise ValueError(f"loses_text {manifest.loses_text!r}")
    for file, sha256 in manifest.files.items():
        if not all(map(PLAIN_NAME.fullmatch, file.split("/"))) or not isinstance(sha256, str):
            raise ValueError(f"file {file!r}")
    counts: list[object] = [manifest.vocab_size, 0 if manifest.eos_id is None else manifest.eos_id]
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {manifest.dtype!r}")
    for name, split in manifest.splits.items():
        counts += [split.tokens, split.text_bytes, split.documents, *(s.tokens for s in split.shards)]
        for file in (f"{name}.documents.bin", *(s.file for s in split.shards)):
            if not PLAIN_NAME.fullmatch(file):
                raise ValueError(f"file name {file!r}")
        if not all(isinstance(s.sha256, str) for s in split.shards):
            raise ValueError(f"a hash of the {name} split is not text")
    if wrong := [n for n in counts if type(n) is not int or n < 0]:
        raise ValueError(f"number {wrong[0]!r}")
    masks = manifest.loss_masks
    if masks and (set(masks) != set(manifest.splits) or not all(isinstance(sha256, str) for sha256 in masks.values())):
        raise ValueError(f"loss masks {manifest.loss_masks!r}")
    if not isinstance(manifest.pairs, bool) or (manifest.pairs and not masks):
        raise ValueError(f"pairs {manifest.pairs!r}")
    if manifest.pairs and any(split.documents % 2 for split in manifest.splits.values()):
        raise ValueError("an odd number of chats in pairs")
    if manifest.eos_id is not None and manifest.eos_id >= manifest.vocab_size:
        raise ValueError(f"end of text {manifest.eos_id} of a vocabulary of {manifest.vocab_size}")
    if "train" not in manifest.splits:
        raise ValueError("no split to train on")
    for name, split in manifest.splits.items():
        if split.tokens != sum(s.tokens for s in split.shards):
            raise ValueError(f"{split.tokens} tokens in the {name} split, but its shards have another number")


def loss_mask_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{split}.loss_mask.bin"


def hash_files(folder: pathlib.Path, splits: Iterable[str]) -> dict[str, str]:
    """The value of Manifest.files: the hashes of all files of a dataset except the manifest, shards and loss masks."""
    paths = [
        folder / SUMMARY,
        *(folder / f"{name}.documents.bin" for name in splits),
        *(folder / "tokenizer").iterdir(),
    ]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(paths)}


def sha256_file(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_size(path: pathlib.Path, expected: int, what: str) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing: 0 bytes, expected {expected}; prepare again with --overwrite") from None
    if size != expected:
        raise DataError(
            f"{path} is {size} bytes, expected {expected} ({what}); it was truncated or replaced: copy it again or "
            "prepare again with --overwrite"
        )


def check_hash_of(path: pathlib.Path, sha256: str) -> None:
    """Raises DataError if the file does not have this hash."""
    if (found := sha256_file(path)) != sha256:
        raise DataError(
            f"{path} has the right size ({path.stat().st_size} bytes) but not the content of its manifest (sha256 "
            f"{found[:12]}…, expected {sha256[:12]}…); copy it again or prepare again with --overwrite"
        )


class TokenFiles:
    """The shards of one split, memory-mapped and checked.

    Attributes:
      shards: uint16 or uint32 arrays (memory maps), one for each shard.
      tokens: the number of tokens.
      text_bytes: how many bytes of text the tokens stand for; 0 if that is not known, because the tokenizer lost text.
      loss_mask: of chats: uint8 [tokens], 1 for a supervised token; None: every token is a target.
      index: of chats: the rows that they are packed into (packing.Index), if a run reads them.
      reference: of pairs of chats: float32 [index.rows], see data.batch.Batch; None: a run does not need it.
    """

    advice = "it does not belong to this tokenizer: prepare again with --overwrite"
    loss_mask: np.ndarray | None = None
    index: "packing.Index | None" = None
    reference: np.ndarray | None = None

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str):
        if split not in manifest.splits:
            raise DataError(f"{folder} has no {split!r} split; prepare it with --val_fraction above 0")
        spec = manifest.splits[split]
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.vocab_size = manifest.vocab_size
        self.tokens = spec.tokens
        self.text_bytes = 0 if manifest.loses_text else spec.text_bytes
        self.shards = []
        self.paths = [folder / shard.file for shard in spec.shards]
        check_hash = spec.tokens * dtype.itemsize <= HASH_AT_START_BYTES
        for path, shard in zip(self.paths, spec.shards, strict=True):
            _check_size(path, shard.tokens * dtype.itemsize, f"{shard.tokens} tokens of {manifest.dtype}")
            if check_hash:
                check_hash_of(path, shard.sha256)
            self.shards.append(np.memmap(path, dtype=dtype, mode="r") if shard.tokens else np.empty(0, dtype))
        if manifest.loss_masks:
            path = loss_mask_path(folder, split)
            _check_size(path, spec.tokens, f"a loss mask of {spec.tokens} tokens")
            if check_hash:
                check_hash_of(path, manifest.loss_masks[split])
            self.loss_mask = np.memmap(path, np.uint8, mode="r") if spec.tokens else np.empty(0, np.uint8)

    def check_ids(self, tokens: np.ndarray, where: str) -> None:
        """Raises DataError if a token is outside the vocabulary: an embedding lookup would clamp it silently."""
        if tokens.size and (largest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"token id {largest} in {where} is outside the vocabulary of {self.vocab_size}; {self.paths[0]} or a "
                f"file read with it is the cause: {self.advice}"
            )
