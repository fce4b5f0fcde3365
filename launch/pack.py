"""Pack the training documents of a dataset into rows, for runs with --config.data.packed=true.

  python -m launch.pack DATASET --seq_len=1024

Each row has complete documents, and padding (without loss) if no other document fits; only documents longer than a row
are cut. The token files do not change: an index of the rows is written beside them (train.packed-1024.bin), one for
each seq_len. If this command is started several times at once, the later ones wait for the first and use its index.
Exit codes: 0 done, or done before; 2 flags; 3 the dataset cannot be packed.
"""

import pathlib
import time

from absl import flags

from data import packing
from launch import cli
from trainer.errors import ConfigError

SEQ_LEN = flags.DEFINE_integer(
    "seq_len", None, "As config.data.seq_len of the run.", lower_bound=1, upper_bound=(1 << 32) - 2
)


def main(dataset: str = "") -> int:
    if not dataset or SEQ_LEN.value is None:
        raise ConfigError("name a dataset and a length: python -m launch.pack DATASET --seq_len=1024")
    start = time.monotonic()
    index, existed = packing.pack_dataset(pathlib.Path(cli.local_path(dataset)), SEQ_LEN.value)
    cli.log.info(
        "%s: %s rows of %d tokens, %.3f %% of them used, %s",
        index.path, f"{index.rows:,}", index.seq_len + 1, 100 * index.utilisation,
        "existed already" if existed else f"{time.monotonic() - start:.1f} s",
    )  # fmt: skip
    cli.log.info(
        "%s of %s documents cut (%.1f %%); windows would cut %s (%.1f %%)",
        f"{index.cut:,}", f"{index.documents:,}", 100 * index.cut / index.documents,
        f"{index.cut_by_windows:,}", 100 * index.cut_by_windows / index.documents,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    cli.run(main, arguments=1)
