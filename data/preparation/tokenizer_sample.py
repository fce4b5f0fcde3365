"""The text on which a tokenizer is trained: a corpus, or an even sample of it. The same files give the same text."""

from collections.abc import Iterator, Sequence

from data.preparation import documents
from data.preparation.input_errors import InputErrors

BYTES = 200 << 20  # more text hardly changes a vocabulary, and training keeps every distinct word in memory
PARTS = 200  # the most places to read from: each place costs time, even if little is read there


def texts(
    units: Sequence[documents.WorkUnit], options: documents.ReadOptions, errors: InputErrors, max_bytes: int = BYTES
) -> Iterator[str]:
    """About `max_bytes` of text in UTF-8, from the beginnings of units; a smaller corpus of plain files is taken whole.

    After each unit, the share of `max_bytes` that was taken is about the share of the corpus (on disk) that was passed.

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
            assert isinstance(chunk.text, str), "training needs text, not options.raw"
            taken += len(chunk.text.encode())
            yield chunk.text
            if taken >= wanted:
                break
