"""Show, use or train a tokenizer.

  python -m launch.tokenizer show   --tokenizer=TOKENIZER [--start=256 --rows=40]
  python -m launch.tokenizer encode --tokenizer=TOKENIZER TEXT | --file=FILE | < FILE     [--ids_only]
  python -m launch.tokenizer decode --tokenizer=TOKENIZER ID ID …  | < FILE
  python -m launch.tokenizer train  --source=PATH|DIR|GLOB --vocab_size=16384 --out=FILE.json|FILE.model

TOKENIZER is a dataset or run folder, a tokenizer.json or a folder with one, a .tiktoken file (or FILE:PATTERN), a
minbpe or SentencePiece .model, or byte. `train` makes byte-level BPE; FILE.model is minbpe's format. Write -- before a
TEXT that begins with -. Exit codes: 0 done, 2 flags, 3 a tokenizer or source that cannot be used.
"""

import itertools
import os
import pathlib
import re
import sys
import time

from absl import flags

from data import tokenizers
from data.errors import DataError
from data.preparation import corpus, documents, recognize, tokenizer_sample
from data.storage.files import write_durably
from data.tokenizers import base, hf_json, minbpe
from data.tokenizers.hf_json import JsonTokenizer
from launch import cli
from trainer.errors import ConfigError

TOKENIZER = cli.define_path("tokenizer", None, "Dataset or run folder, or tokenizer file.")
FILE = cli.define_path("file", None, "encode: UTF-8 text to read.")
IDS_ONLY = flags.DEFINE_bool("ids_only", False, "encode: print the ids and nothing else.")
START = flags.DEFINE_integer("start", None, "show: first id; default: the first merged token.", lower_bound=0)
ROWS = flags.DEFINE_integer("rows", 20, "show: number of tokens.", lower_bound=0)
SOURCE = cli.define_path("source", None, "train: file, directory, glob or python-stdlib.")
TEXT_KEY = flags.DEFINE_string("text_key", "text", "train: key of the text in JSON lines and Parquet.")
FORMAT = flags.DEFINE_enum("format", "auto", recognize.KINDS, "train: format of all files; auto: detected for each.")
BAD_RECORDS = flags.DEFINE_enum(
    "bad_records",
    "error",
    ["error", "skip"],
    "train: if a record or file is not text: stop, or leave it out and count.",
)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 16384, "train: number of tokens.", upper_bound=base.MAX_ID + 1)
PATTERN = flags.DEFINE_enum("pattern", "gpt2", list(hf_json.PATTERNS), "train: how text is split before merges.")
SPECIAL_TOKENS = flags.DEFINE_list("special_tokens", ["<|endoftext|>"], "train: separated by commas.")
MIN_FREQUENCY = flags.DEFINE_integer("min_frequency", 1, "train: rarer pairs are not merged.", lower_bound=1)
SAMPLE_MB = flags.DEFINE_integer(
    "sample_mb", tokenizer_sample.BYTES >> 20, "train: size of the sample of the text, spread evenly.", lower_bound=1
)
OUT = cli.define_path("out", None, "train: file to write, .json or .model.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "train: replace --out.")
cli.check_flag("special_tokens", base.check_special_tokens)

COLOURS = (46, 42, 43, 45)  # backgrounds: cyan, green, yellow, magenta


def main(command: str = "", *arguments: str) -> int:
    commands = {"show": show, "encode": encode, "decode": decode, "train": train}
    if command not in commands:
        given = f", not {command!r}" if command else ""
        raise ConfigError(f"the first argument is one of {', '.join(commands)}{given}; see --help")
    if arguments and command in ("show", "train"):
        raise ConfigError(f"unexpected argument {arguments[0]!r}; flags are written --name=value")
    commands[command](*arguments)
    return 0


def _tokenizer() -> tokenizers.Tokenizer:
    if not TOKENIZER.value:
        raise ConfigError("--tokenizer is missing; name a dataset or run folder, or a tokenizer file")
    return tokenizers.make(TOKENIZER.value)


def show() -> None:
    tokenizer = _tokenizer()
    fast = ", encoded by tiktoken" if isinstance(tokenizer, JsonTokenizer) and tokenizer.accelerated else ""
    print(f"{TOKENIZER.value}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{fast}")
    for id, name in itertools.islice(tokenizer.specials.items(), 20):
        print(f"special token {id}: {cli.visible(name)}{' (end of text)' if id == tokenizer.eos_id else ''}")
    if (more := len(tokenizer.specials) - 20) > 0:
        print(f"… and {more} more special tokens")
    merges = _merges(tokenizer)
    start = START.value
    if start is None:
        start = min(merges) if merges else 0
    print(f"{'id':>8}  {'token':<24}  {'merged from' if merges else ''}".rstrip())
    for id in range(start, min(start + ROWS.value, tokenizer.vocab_size)):
        parts = " + ".join(f"{a} {_quoted(tokenizer, a)}" for a in merges.get(id, ()))
        print(f"{id:>8}  {_quoted(tokenizer, id):<24}  {parts}".rstrip())


def _merges(tokenizer: tokenizers.Tokenizer) -> dict[int, tuple[int, int]]:
    """For each token that a merge makes, the ids of its parts."""
    if not isinstance(tokenizer, JsonTokenizer):
        return {}
    found: dict[int, tuple[int, int]] = {}
    for left, right in tokenizer.merges():
        if {left, right, left + right} <= tokenizer.plain.keys():
            found.setdefault(tokenizer.plain[left + right], (tokenizer.plain[left], tokenizer.plain[right]))
    return found


def _quoted(tokenizer: tokenizers.Tokenizer, id: int) -> str:
    return f"'{cli.visible(shown(tokenizer.token_bytes(id)))}'"


def encode(*arguments: str) -> None:
    if len(arguments) > 1:
        raise ConfigError(f"one TEXT is encoded, not {len(arguments)}; put quotes around it")
    tokenizer = _tokenizer()
    ids = tokenizer.encode(arguments[0] if arguments else _text()).tolist()
    print(*ids)
    if IDS_ONLY.value:
        return
    pieces = [tokenizer.token_bytes(i) for i in ids]
    print(split(pieces, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    size = sum(map(len, pieces))
    print(f"{len(ids):,} tokens, {size:,} bytes, {size / max(len(ids), 1):.2f} bytes per token")


def _text() -> str:
    where = FILE.value or "the standard input"
    try:
        raw = pathlib.Path(FILE.value).read_bytes() if FILE.value else sys.stdin.buffer.read()
        return raw.decode("utf-8")
    except OSError as e:
        raise DataError(f"cannot read {where}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{where} is not UTF-8 at offset {e.start}") from None


def split(pieces: list[bytes], colour: bool) -> str:
    """Tokens separated by background colours, or by brackets. Characters that are not printable are escaped."""
    texts = [cli.visible(shown(piece)) for piece in pieces]
    if not colour:
        return "".join(f"[{text}]" for text in texts)
    return "".join(f"\x1b[30;{COLOURS[i % len(COLOURS)]}m{text}\x1b[0m" for i, text in enumerate(texts))


def shown(piece: bytes) -> str:
    r"""The text; \xNN for bytes that are only a part of a character."""
    return piece.decode("utf-8", errors="backslashreplace")


def decode(*arguments: str) -> None:
    tokenizer = _tokenizer()
    words = [word for argument in (arguments or [_text()]) for word in argument.replace(",", " ").split()]
    wrong = next((word for word in words if not re.fullmatch(r"0*[0-9]{1,9}", word)), None)
    if wrong is not None:
        raise ConfigError(f"{wrong[:40]!r} is not a token id; give whole numbers, such as 464 3290")
    print(tokenizer.decode(map(int, words)))


def train() -> None:
    if not SOURCE.value or not OUT.value:
        raise ConfigError("--source and --out are needed, for example --source=python-stdlib --out=tokenizer.json")
    out = pathlib.Path(OUT.value)
    if out.suffix not in (".json", ".model"):
        raise ConfigError(f"--out={out} must end in .json (Hugging Face's format) or .model (minbpe's)")
    if out.exists() and not OVERWRITE.value:
        raise ConfigError(f"{out} exists; choose another --out, or --overwrite")
    start = time.monotonic()
    files, errors = corpus.find_files(SOURCE.value, cache=out.parent, kind=FORMAT.value, bad_records=BAD_RECORDS.value)
    options = documents.ReadOptions(TEXT_KEY.value, bad_records=BAD_RECORDS.value)
    texts = tokenizer_sample.texts(documents.plan_units(files), options, errors, SAMPLE_MB.value << 20)
    if (first := next(texts, None)) is None:
        raise DataError(f"--source={SOURCE.value} has no text to train on")
    tokenizer = hf_json.train_bpe(
        itertools.chain([first], texts),
        VOCAB_SIZE.value,
        pattern=PATTERN.value,
        special_tokens=SPECIAL_TOKENS.value,
        min_frequency=MIN_FREQUENCY.value,
    )
    raw = minbpe.to_minbpe(tokenizer) if out.suffix == ".model" else tokenizer.file()[1]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, raw)
    except OSError as e:
        raise DataError(f"cannot write {out}: {e.strerror}") from None
    for kind, count in errors.counts.items():
        cli.log.info("%s: %d, such as %s", kind, count, errors.examples[kind][0])
    cli.log.info("%s: vocabulary %d, %.1f s", out, tokenizer.vocab_size, time.monotonic() - start)


if __name__ == "__main__":
    cli.run(main, arguments=sys.maxsize)
