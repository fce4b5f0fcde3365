"""Prepare a dataset for launch.train from text.

  python -m launch.prepare --source=PATH|DIR|GLOB|-|python-stdlib|tinyshakespeare --tokenizer=char|byte|bpe:N|PATH
    --out=DATASET

Files are text (one document each), JSON lines or Parquet (each record is a document, with its text under --text_key),
recognised by their first bytes unless --format is given. Files compressed by gzip and zstd are read directly; - is
standard input. A single text is split as in nanoGPT: the first 90 % of its characters are for training. Several texts
are split as complete files, by a hash of their names, and records by a hash of their text. An end-of-text token follows
each document.

--format=chat reads JSON lines with a chat each, {"messages": [{"role": …, "content": …}, …]} or {"prompt": …,
"completion": …}, for supervised fine-tuning, and --format=preference pairs of answers, {"prompt": …, "chosen": …,
"rejected": …}, for DPO. --tokenizer then names a run or a folder of Hugging Face, whose chat template makes the tokens,
and only the assistant's tokens will be targets (docs/finetuning.md).

Tokenizers: characters, bytes, byte-level BPE trained on a sample of the text (bpe:16384, or bpe:16384:llama3 with Llama
3's split pattern), or an existing one: a tokenizer.json, .tiktoken, minbpe or SentencePiece file (launch.tokenizer).

If it is killed, the same command resumes; the dataset is the same, byte for byte, for any number of kills and workers.
Errors in the input are counted, and the first of each kind are named, at the end and in DATASET/summary.json.
Exit codes: 0 done, 2 flags, 3 the source or --out cannot be used, 130 Ctrl-C, 128 + n other signals.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from data import tokenizers
from data.preparation import chats, corpus, losses, pipeline, recognize, spool
from data.preparation.output import Output
from data.storage import malloc
from data.token_files import formats
from data.tokenizers import base
from launch import cli
from trainer.errors import ConfigError
from trainer.interchange import supervision
from trainer.reporting.console import StatusLine, duration

SOURCE = cli.define_path("source", None, "File, directory, glob, -, python-stdlib or tinyshakespeare.")
TOKENIZER = cli.define_path(
    "tokenizer", "char", "char, byte, bpe:16384 (trained here), or the PATH of a tokenizer or of a dataset with one."
)
OUT = cli.define_path("out", None, "Folder to write, for example datasets/mine.")
VAL_FRACTION = flags.DEFINE_float(
    "val_fraction", 0.1, "Share of the text kept for validation.", lower_bound=0.0, upper_bound=0.9
)
SPLIT = flags.DEFINE_enum(
    "split",
    "auto",
    pipeline.SPLITS,
    "The validation text: the last characters, complete files, or complete documents. auto: last for a single text, "
    "file for several, document if there are records.",
)
TEXT_KEY = flags.DEFINE_string("text_key", "text", "The key of the text in JSON lines, or its column in Parquet.")
MIN_FREQUENCY = flags.DEFINE_integer(
    "min_frequency", 1, "Characters rarer than this become <unk> (char only).", lower_bound=1
)
SPECIAL_TOKENS = flags.DEFINE_list("special_tokens", [], "Additional tokens, such as <unk>, separated by commas.")
INVALID_UTF8 = flags.DEFINE_enum(
    "invalid_utf8", "replace", ["replace", "error"], "If text is not UTF-8: replace it by U+FFFD and count, or stop."
)
BAD_RECORDS = flags.DEFINE_enum(
    "bad_records",
    "error",
    ["error", "skip"],
    "For broken JSON, a record without text, a truncated compressed file: stop, or leave it out and count.",
)
FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    recognize.KINDS,
    "The format of all files; auto: detected from the first bytes and the name of each; chat: JSON lines with chats; "
    "preference: JSON lines with pairs of chats.",
)
STDIN_FORMAT = flags.DEFINE_enum(
    "stdin_format", "txt", ["txt", "jsonl", "parquet", "txt.gz", "jsonl.gz", "jsonl.zst"], "The format of --source=-."
)
MAX_INVALID = flags.DEFINE_float(
    "max_invalid",
    0.01,
    "Largest share of characters that are NUL, or U+FFFD for invalid UTF-8; a corpus with more is refused.",
    lower_bound=0.0,
    upper_bound=1.0,
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Number of processes; 0: one for each core that this job may use.", lower_bound=0
)
COUNT_DUPLICATES = flags.DEFINE_bool("count_duplicates", False, "Count documents whose text occurred before.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a dataset at --out that another request made.")
NOT_OF_CHATS = (SPLIT, TEXT_KEY, MIN_FREQUENCY, SPECIAL_TOKENS, COUNT_DUPLICATES)
cli.check_flag("tokenizer", tokenizers.needs_texts)
cli.check_flag("special_tokens", base.check_special_tokens)


class ProgressLine:
    """Shows MB/s, tokens/s and remaining time of each pass over the corpus, not counting the work of an earlier run."""

    def __init__(self) -> None:
        self.status = StatusLine()
        self.stage = ""
        self.start = 0.0  # time, bytes and tokens when this process began the stage
        self.done = 0
        self.tokens = 0

    def __call__(self, stage: str, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage = stage
            self.start = now
            self.done = done
            self.tokens = tokens
            return
        if (seconds := now - self.start) < 0.5:  # too early for a rate
            return
        speed = (done - self.done) / seconds
        parts = [f"{stage} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", f"{speed / 1e6:.1f} MB/s"]
        if tokens:
            parts.append(f"{(tokens - self.tokens) / seconds:,.0f} tokens/s")
        if speed:
            parts.append(f"{duration((total - done) / speed)} left")
        self.status.show("  ".join(parts))


def main() -> int:
    if not SOURCE.value or not OUT.value:
        raise ConfigError("--source and --out are needed, for example --source=python-stdlib --out=datasets/mine")
    malloc.tune_allocator()
    cli.end_in_one_line()
    out = Output(pathlib.Path(OUT.value)).path  # resolved: the current folder may be the one that is replaced
    with sourced(SOURCE.value, out.parent) as source:
        make(out, source)
    return 0


@contextlib.contextmanager
def sourced(source: str, folder: pathlib.Path) -> Iterator[str]:
    """The path of a source; standard input or a pipe is stored in `folder` meanwhile."""
    if source != "-" and not corpus.is_pipe(source):
        yield source
        return
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if source == "-" else stack.enter_context(corpus.open_source(source))
        yield str(stack.enter_context(spool.spooled(stream, folder, STDIN_FORMAT.value)))


def make(out: pathlib.Path, source: str) -> None:
    start, progress = time.monotonic(), ProgressLine()
    request = {
        "source": source,
        "tokenizer": TOKENIZER.value,
        "val_fraction": VAL_FRACTION.value,
        "split": SPLIT.value,
        "text_key": TEXT_KEY.value,
        "min_frequency": MIN_FREQUENCY.value,
        "special_tokens": SPECIAL_TOKENS.value,
        "invalid_utf8": INVALID_UTF8.value,
        "bad_records": BAD_RECORDS.value,
        "format": FORMAT.value,
    }
    template = template_of_chats()
    if template is not None:
        request["template_sha256"] = template.sha256
    if not OVERWRITE.value and (found := pipeline.existing_dataset(out, **request)) is not None:
        report(out, found, "exists already, made by the same request")
        return
    options: dict[str, Any] = {"overwrite": OVERWRITE.value, "max_invalid": MAX_INVALID.value, "progress": progress}
    try:
        if template is not None:
            made = chats.prepare_chats(out, template, **options, **request)
        else:
            made = pipeline.prepare_dataset(
                out, workers=WORKERS.value, count_duplicates=COUNT_DUPLICATES.value, **options, **request
            )
    finally:
        progress.status.clear()
    report(out, made, f"{time.monotonic() - start:.1f} s")


def template_of_chats() -> supervision.ChatTemplate | None:
    """The chat template that chats need; None for other formats. Raises ConfigError."""
    if FORMAT.value not in (recognize.CHAT, recognize.PREFERENCE):
        return None
    if wrong := [flag.name for flag in NOT_OF_CHATS if flag.present]:
        raise ConfigError(f"--{wrong[0]} is not for --format={FORMAT.value}; leave it out")
    return supervision.template_of(TOKENIZER.value)


def report(out: pathlib.Path, manifest: formats.Manifest, how: str) -> None:
    splits = ", ".join(
        f"{name} {s.tokens:,} tokens ({s.documents:,} document(s))" for name, s in manifest.splits.items()
    )
    cli.log.info(
        "%s: %s, vocabulary %d, %s, %s", cli.visible(str(out)), splits, manifest.vocab_size, manifest.dtype, how
    )
    for notice in pipeline.notices(manifest):
        cli.log.warning("%s", notice)
    summary = pipeline.read_summary(out)
    if not summary:
        return
    parts = [f"longest document {summary['longest_document_tokens']:,} tokens"]
    if summary["bytes_per_token"]:
        parts.insert(0, f"{summary['bytes_per_token']:.2f} bytes a token")
    if "duplicates" in summary:
        parts.append(f"{summary['duplicates']:,} of {summary['documents']:,} documents occurred before")
    elif COUNT_DUPLICATES.value:
        parts.append("duplicates were not counted when it was made; --overwrite makes it again")
    if "supervised_tokens" in summary:
        supervised = sum(summary["supervised_tokens"].values())
        parts.append(f"{supervised:,} tokens ({supervised / summary['tokens']:.1%}) are the assistant's, and targets")
    cli.log.info("%s", ", ".join(parts))
    if summary.get("loses_text"):
        share = summary["problems"]["counts"].get(losses.UNKNOWN, 0) / max(summary["tokens"], 1)
        cli.log.warning(
            "the tokenizer loses text (%.2g %% of the tokens are unknown; see below): val/bits_per_byte will not be "
            "reported, because the number of bytes that the tokens stand for is not known",
            100 * share,
        )
    for problems in (summary.get("left_out", {"counts": {}}), summary["problems"]):
        for kind, count in problems["counts"].items():
            cli.log.warning("%s: %d, first in %s", kind, count, "; ".join(map(cli.visible, problems["examples"][kind])))


if __name__ == "__main__":
    cli.run(main)
