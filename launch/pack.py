"""Pack the training documents of a dataset into rows, for runs with --config.data.packed=true.

  python -m launch.pack DATASET --seq_len=1024

Each row has complete documents, and padding (without loss) if no other document fits; only documents longer than a row
are cut. Of chats (launch.prepare --format=chat) the validation split is packed, too; the end of a chat longer than a
row is never read, and a chat of which no supervised token is left is not in the rows. Of preferences, each row is one
pair. The token files do not change: an index of the rows is written beside them (train.packed-1024.bin), one for each
seq_len. If this command is started several times at once, the later ones wait for the first and use its index.
Exit codes: 0 done, or done before; 2 flags; 3 the dataset cannot be packed.
"""

import pathlib
import time

from absl import flags

from data import packing
from data.token_files import formats
from launch import cli
from trainer.errors import ConfigError

SEQ_LEN = flags.DEFINE_integer(
    "seq_len", None, "As config.data.seq_len of the run.", lower_bound=1, upper_bound=(1 << 32) - 2
)


def main(dataset: str = "") -> int:
    if not dataset or SEQ_LEN.value is None:
        raise ConfigError("name a dataset and a length: python -m launch.pack DATASET --seq_len=1024")
    folder = pathlib.Path(cli.local_path(dataset))
    report("train", *timed(folder, SEQ_LEN.value, "train"))
    manifest = formats.read_manifest(folder)
    if manifest.loss_masks and manifest.splits["val"].tokens:
        report("val", *timed(folder, SEQ_LEN.value, "val"))
    return 0


def timed(folder: pathlib.Path, seq_len: int, split: str) -> tuple[packing.Index, str]:
    """The index, and how it was made."""
    start = time.monotonic()
    index, existed = packing.pack_dataset(folder, seq_len, split)
    return index, "existed already" if existed else f"{time.monotonic() - start:.1f} s"


def report(split: str, index: packing.Index, how: str) -> None:
    cli.log.info(
        "%s: %s rows of %d tokens, %.3f %% of them used, %s",
        index.path, f"{index.rows:,}", index.seq_len + 1, 100 * index.utilisation, how,
    )  # fmt: skip
    if index.left_out is not None:
        cli.log.info("%s: %s", split, index.unread_chats or f"all {index.documents:,} chats are in the rows, whole")
        return
    cli.log.info(
        "%s of %s documents cut (%.1f %%); windows would cut %s (%.1f %%)",
        f"{index.cut:,}", f"{index.documents:,}", 100 * index.cut / index.documents,
        f"{index.cut_by_windows:,}", 100 * index.cut_by_windows / index.documents,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, arguments=1)
