"""Inspect the data of a run: what it is, whether it is intact, and what it contains.

  python -m launch.inspect PATH [--seq_len=64 --batch_size=4 --seed=0 --sample=G --packed] [--json]

PATH is a dataset folder of launch.prepare, or token files of other programs as in --config.data.path (a file, a
folder or a glob; --format, --dtype, --val_path, --tokenizer_path and --vocab_size then say what the files do not), on
this machine or in an object store (gs://, s3://).
It reads and checks every byte (--nocheck: only what the start of a run checks), counts the tokens that a run never
reads, and shows some text and the batch that begins at sequence G, exactly as a run with this seed, seq_len and
data.packed trains on it (of chats also the targets); step n begins at sequence (n - 1) x batch size. It writes nothing.
Exit codes: 0 intact, 2 flags, 3 damaged or missing.
"""

import dataclasses
import itertools
import json
import time
from typing import Any

import numpy as np
from absl import flags

from data import dataset, loader, packing, sources
from data.config import DTYPES, DataConfig
from data.errors import DataError
from data.loader import ChatWindows, PackedWindows, Unreached, Windows
from data.token_files import external, integrity
from data.tokenizers.base import MAX_ID, Tokenizer
from launch import cli
from trainer.errors import ConfigError

SEQ_LEN = flags.DEFINE_integer("seq_len", 64, "As config.data.seq_len of the run.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Sequences to show.", lower_bound=1, upper_bound=1 << 16)
SEED = flags.DEFINE_integer("seed", 0, "As config.seed of the run.", lower_bound=0, upper_bound=2**32 - 1)
SAMPLE = flags.DEFINE_integer(
    "sample",
    0,
    "The first sequence of the batch, counted from the start of the run.",
    lower_bound=0,
    upper_bound=1 << 62,
)
PACKED = flags.DEFINE_bool("packed", False, "As config.data.packed of the run.")
FORMAT = flags.DEFINE_enum("format", "", ["", *external.format_names()], "As config.data.format; empty: detected.")
DTYPE = flags.DEFINE_enum("dtype", "", ["", *DTYPES], "As config.data.dtype.")
VAL_PATH = cli.define_data_path("val_path", "", "As config.data.val_path.")
TOKENIZER_PATH = cli.define_data_path("tokenizer_path", "", "As config.data.tokenizer_path.")
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 0, "As config.model.vocab_size; 0: not known.", lower_bound=0, upper_bound=MAX_ID + 1
)
CHECK = flags.DEFINE_bool("check", True, "Read and check every byte.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object, and nothing else on stdout.")

EXCERPTS, EXCERPT_TOKENS = 3, 64  # how much of each split is shown


def main(path: str = "") -> int:
    if not path:
        raise ConfigError("name a dataset folder or token files: python -m launch.inspect PATH")
    path = cli.expanded(path)
    config = DataConfig(
        path=path,
        format=FORMAT.value,
        dtype=DTYPE.value,
        val_path=VAL_PATH.value,
        tokenizer_path=TOKENIZER_PATH.value,
    )
    try:
        data = dataset.open_dataset(config, VOCAB_SIZE.value)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is neither a dataset folder of launch.prepare nor a token file") from None
    if VOCAB_SIZE.value not in (0, data.vocab_size):
        raise ConfigError(f"--vocab_size={VOCAB_SIZE.value}, but {path} has {data.vocab_size}; leave it out")
    report: dict[str, Any] = about(data)
    if CHECK.value:
        start = time.monotonic()
        found = integrity.verify_dataset(data)
        report["check"] = {name: dataclasses.asdict(split) for name, split in found.items()}
        if not data.external_files:
            splits = data.manifest.splits if data.manifest.loss_masks else ("train",)
            found_rows = [packing.verify_packings(data.folder, data.manifest, split) for split in splits]
            report["packed"] = [packed(index) for index in itertools.chain(*found_rows)]
        report["check_s"] = round(time.monotonic() - start, 3)
    tokenizer = data.load_tokenizer()
    report["text"] = {name: excerpts(data, name, tokenizer) for name in data.manifest.splits if data.has(name)}
    order = windows_of(data)
    report["left_out"] = left_out(data, order)
    report["batch"] = batch(order, tokenizer)
    print(json.dumps(report) if JSON.value else format_report(report))
    return 0


def about(data: dataset.Dataset) -> dict[str, Any]:
    """The content of the manifest, or of the headers of external files."""
    manifest = data.manifest
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = {
            "tokens": split.tokens,
            "documents": split.documents or None,
            "text_bytes": split.text_bytes or None,
            "bytes_per_token": split.text_bytes / split.tokens if split.text_bytes and split.tokens else None,
            "files": [str(f.path) for f in data.external_files[name]]
            if data.external_files
            else [str(data.folder / shard.file) for shard in split.shards],
        }
    return {
        "path": data.path,
        "format": manifest.request["format"] if data.external_files else "meshlm",
        "fingerprint": manifest.fingerprint(),
        "dtype": manifest.dtype,
        "vocab_size": data.vocab_size or None,
        "eos_id": manifest.eos_id,
        "request": None if data.external_files else manifest.request,
        "splits": splits,
        "other_files": external.unread_files(data.path, data.external_files),
    }


def shown(ids: np.ndarray, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"ids": ids.tolist()} | ({"text": tokenizer.decode(ids)} if tokenizer is not None else {})


def excerpts(data: dataset.Dataset, split: str, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Evenly spaced excerpts of the first file that has tokens."""
    files = data.files(split)
    tokens = next(shard for shard in files.shards if len(shard))
    out = []
    for i in range(EXCERPTS):
        start = len(tokens) * i // EXCERPTS
        ids = tokens[start : start + EXCERPT_TOKENS]
        files.check_ids(ids, f"the {split} split")
        out.append({"token": start, **shown(ids, tokenizer)})
    return out


def packed(index: packing.Index) -> dict[str, Any]:
    """The report of a packing whose bytes have all been checked."""
    fields = ["seq_len", "rows", "utilisation", "documents", "cut", "cut_by_windows"]
    if index.left_out is not None:
        fields += ["left_out", "unread", "unread_targets"]
    return {name: getattr(index, name) for name in fields}


def windows_of(data: dataset.Dataset) -> Windows:
    """The windows that a run reads; those of chats are always packed."""
    is_packed = PACKED.value or data.manifest.loss_masks
    index = sources.packing_of(data, SEQ_LEN.value) if is_packed else None
    return loader.windows_of(data.files("train"), index, seq_len=SEQ_LEN.value, seed=SEED.value)


def left_out(data: dataset.Dataset, order: Windows) -> dict[str, Any]:
    """The tokens that a run with this seq_len never reads, the documents that are cut, and the empty splits."""
    cut = None
    if isinstance(order, PackedWindows):
        cut = order.index.cut
    elif not data.external_files:
        integrity.check_documents(data.folder / "train.documents.bin", data.manifest.splits["train"])
        cut = packing.count_cut(data.folder, data.manifest, SEQ_LEN.value, "train")[1]
    empty = [name for name in ("train", "val") if not data.has(name)]
    return dataclasses.asdict(order.unreached) | {"documents_cut": cut, "empty_splits": empty}


def batch(order: Windows, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The rows that a run trains on: inputs and targets together, seq_len + 1 tokens each."""
    samples = SAMPLE.value + np.arange(BATCH_SIZE.value)
    targets = []
    if isinstance(order, ChatWindows):
        rows = zip(order.rows(samples)[:, 1:], order.loss_mask(samples), strict=True)
        targets = [shown(row[counts], tokenizer) for row, counts in rows]
    return {
        "sample": SAMPLE.value,
        "seed": SEED.value,
        "seq_len": SEQ_LEN.value,
        "epoch": SAMPLE.value / order.num_windows,
        "samples_per_epoch": order.num_windows,
        "rows": [shown(row, tokenizer) for row in order.rows(samples)],
    } | ({"supervised": targets} if targets else {})


def format_report(report: dict[str, Any]) -> str:
    """The report for people: numbers with units, each text on a line, quoted."""
    vocabulary = f"vocabulary {report['vocab_size'] or 'not known'}, end of text {report['eos_id']}"
    lines = [f"{report['path']}: {report['format']}, {report['dtype']}, {vocabulary}, data {report['fingerprint']}"]
    if report["request"]:
        lines.append("made from " + ", ".join(f"{k} {v}" for k, v in report["request"].items() if v))
    for name, split in report["splits"].items():
        line = f"{name:<6}{split['tokens']:>16,} tokens in {len(split['files'])} file(s)"
        if split["documents"]:
            line += f", {split['documents']:,} document(s)"
        if split["text_bytes"]:
            line += f", {split['text_bytes']:,} bytes of text, {split['bytes_per_token']:.3f} a token"
        lines.append(line)
    if others := report["other_files"]:
        lines.append(f"{len(others)} other entries of the folder are not token files: {', '.join(others[:5])}")
    if "check" in report:
        nbytes = sum(split["nbytes"] for split in report["check"].values())
        largest = max(split["largest_id"] for split in report["check"].values())
        lines.append(f"intact: {nbytes:,} bytes read in {report['check_s']:.1f} s, largest id {largest}")
    for name, shown_of_split in report["text"].items():
        lines += [f"{name} from token {s['token']:,}: {quoted(s)}" for s in shown_of_split]
    rows, missed = report["batch"], report["left_out"]
    for index in report.get("packed", ()):
        lines.append(
            f"packed for seq_len {index['seq_len']}: {index['rows']:,} rows, {index['utilisation']:.2%} of them used, "
            f"{index['cut']:,} of {index['documents']:,} document(s) cut"
        )
    if never := str(Unreached(*(missed[field.name] for field in dataclasses.fields(Unreached)))):
        lines.append(f"never read with seq_len {rows['seq_len']}: {never}")
    if missed["documents_cut"]:
        lines.append(f"{missed['documents_cut']:,} training document(s) are cut: they are not inside one row")
    lines += [f"the {name} split has no token to predict" for name in missed["empty_splits"]]
    lines.append(
        f"batch at sequence {rows['sample']} (epoch {rows['epoch']:.3f} of {rows['samples_per_epoch']:,} sequences), "
        f"seed {rows['seed']}, seq_len {rows['seq_len']}:"
    )
    for i, row in enumerate(rows["rows"]):
        lines.append(f"  {rows['sample'] + i}: {quoted(row)}")
        if "supervised" in rows:
            lines.append(f"  {rows['sample'] + i}, its targets: {quoted(rows['supervised'][i])}")
    return "\n".join(lines)


def quoted(excerpt: dict[str, Any]) -> str:
    """The text as JSON, or the ids."""
    return json.dumps(excerpt["text"], ensure_ascii=False) if "text" in excerpt else " ".join(map(str, excerpt["ids"]))


if __name__ == "__main__":
    cli.run(main, arguments=1)
