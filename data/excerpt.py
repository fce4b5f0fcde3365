"""Text to train a tokenizer on: a corpus, or parts of it spread evenly. The same files give the same text."""

from collections.abc import Iterator, Sequence

from data import documents

BYTES = 200 << 20  # more changes a vocabulary little, and training holds every distinct word in memory


def texts(
    units: Sequence[documents.Unit], reading: documents.Reading, problems: documents.Problems, max_bytes: int = BYTES
) -> Iterator[str]:
    """The texts of whole units, about `max_bytes` (on disk) of them; all where that is enough.

    Raises:
      DataError: a file cannot be read.
    """
    total = sum(map(documents.bytes_of, units))
    share = min(1.0, max_bytes / max(total, 1))
    for index, unit in enumerate(units):
        if index == 0 or int((index + 1) * share) > int(index * share):
            for stretch in unit:
                for text, _ in documents.read(stretch, reading, problems):
                    assert isinstance(text, str), "training needs text, not reading.raw"
                    yield text
