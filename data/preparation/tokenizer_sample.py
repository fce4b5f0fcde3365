"""Text to train a tokenizer on: a corpus, or parts of it spread evenly. The same files give the same text."""

from collections.abc import Iterator, Sequence

from data.preparation import documents
from data.preparation.input_errors import InputErrors

BYTES = 200 << 20  # more changes a vocabulary little, and training holds every distinct word in memory
PARTS = 200  # at most: a place to read from costs time, however little is read there


def texts(
    units: Sequence[documents.WorkUnit], options: documents.ReadOptions, errors: InputErrors, max_bytes: int = BYTES
) -> Iterator[str]:
    """About `max_bytes` of text in UTF-8, from the beginnings of units; all of plain files that are not larger.

    After each unit as large a share of the bytes has been taken as of the corpus (on disk) lies behind.

    Raises:
      DataError: a file cannot be read.
    """
    total = sum(map(documents.bytes_of, units))
    passed = taken = 0
    for unit in units:
        passed += documents.bytes_of(unit)
        wanted = max_bytes * passed // max(total, 1)
        if wanted - taken < min(max_bytes // PARTS, documents.bytes_of(unit)):
            continue
        for chunk in (chunk for span in unit for chunk in documents.read_chunks(span, options, errors)):
            assert isinstance(chunk.text, str), "training needs text, not reading.raw"
            taken += len(chunk.text.encode())
            yield chunk.text
            if taken >= wanted:
                break
