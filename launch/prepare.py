"""Turn text into a dataset that launch.train reads.

  python -m launch.prepare --source=PATH|DIR|GLOB|python-stdlib|tinyshakespeare --tokenizer=char|byte --out=DATASET

A single file is split as nanoGPT does: the first 90 % of its characters train. Several files are split whole, by a
hash of their names, and an end-of-text token is put after each. Text must be UTF-8; a file that is not stops the
preparation and is named with the offset (--invalid_utf8=replace puts U+FFFD instead; the byte tokenizer takes all).
Exit codes: 0 done, 2 flags, 3 the source cannot be used.
"""

import pathlib
import time

from absl import flags

from data import prepare, tokenizers
from launch import cli
from trainer.errors import ConfigError

SOURCE = flags.DEFINE_string("source", None, "File, directory, glob, python-stdlib or tinyshakespeare.")
TOKENIZER = flags.DEFINE_enum("tokenizer", "char", list(tokenizers.KINDS), "What a token is.")
OUT = flags.DEFINE_string("out", None, "Folder to write, for example datasets/mine.")
VAL_FRACTION = flags.DEFINE_float(
    "val_fraction", 0.1, "Share of the text kept for validation.", lower_bound=0.0, upper_bound=0.9
)
MIN_FREQUENCY = flags.DEFINE_integer(
    "min_frequency", 1, "Characters rarer than this become <unk> (char only).", lower_bound=1
)
SPECIAL_TOKENS = flags.DEFINE_list("special_tokens", [], "Further tokens, such as <unk>, comma-separated.")
INVALID_UTF8 = flags.DEFINE_enum("invalid_utf8", "error", ["error", "replace"], "What to do where text is not UTF-8.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a dataset at --out that another request made.")


def main() -> int:
    if not SOURCE.value or not OUT.value:
        raise ConfigError("--source and --out are needed, for example --source=python-stdlib --out=datasets/mine")
    out = pathlib.Path(OUT.value)
    start = time.monotonic()
    manifest = prepare.prepare(
        out,
        source=SOURCE.value,
        tokenizer=TOKENIZER.value,
        val_fraction=VAL_FRACTION.value,
        min_frequency=MIN_FREQUENCY.value,
        special_tokens=SPECIAL_TOKENS.value,
        invalid_utf8=INVALID_UTF8.value,
        overwrite=OVERWRITE.value,
    )
    splits = ", ".join(f"{name} {s.tokens:,} tokens ({s.documents} document(s))" for name, s in manifest.splits.items())
    cli.log.info(
        "%s: %s, vocabulary %d, %s, %.1f s", out, splits, manifest.vocab_size, manifest.dtype, time.monotonic() - start
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
