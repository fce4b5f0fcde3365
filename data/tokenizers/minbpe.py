"""minbpe's `.model` files (github.com/karpathy/minbpe, base.py: save and load), read and written.

A file has a line `minbpe v1`; a line with the expression that splits text, or an empty line; the number of special
tokens; a line `name id` for each special token; and a line `a b` for each merge: merge i makes id 256 + i from a and b.
"""

import itertools

from data.errors import DataError
from data.tokenizers import ranks
from data.tokenizers.base import MAX_ID, check_special_tokens, refusing
from data.tokenizers.hf_json import JsonTokenizer, byte_level_json
from data.tokenizers.ranks import BYTE_CHARACTERS

FILE_NAME = "minbpe.model"
FIRST_LINE = "minbpe v1"
MAX_TOKEN_BYTES = 1 << 16  # in a damaged file, each line may double the length of a token


class MinbpeTokenizer(JsonTokenizer):
    """A minbpe .model, as byte-level BPE with the same ids. Text between matches of the expression is kept.

    Raises:
      DataError: `raw` is not such a file or is damaged, or the tokenizers library reads its expression differently.
    """

    kind = "minbpe"

    def __init__(self, raw: bytes, where: str = FILE_NAME, eos: str | None = None):
        self._file = raw
        pattern, specials, merges = _parse(raw, where)
        _check_pattern(pattern, where)
        try:
            spec = byte_level_json(merges, pattern, specials)
        except DataError as e:
            raise DataError(f"{where}: {e}") from None
        super().__init__(spec, where, eos)

    def file(self) -> tuple[str, bytes]:
        return FILE_NAME, self._file


def _parse(raw: bytes, where: str) -> tuple[str, dict[str, int], list[tuple[str, str]]]:
    """The pattern, the special tokens with their ids, and the merges (in BYTE_CHARACTERS) of a file."""
    tokens = list(BYTE_CHARACTERS)
    merges: list[tuple[str, str]] = []
    specials: dict[str, int] = {}
    number = 0
    try:
        lines = enumerate(raw.decode("utf-8").removesuffix("\n").split("\n"), start=1)
        number, line = next(lines)
        if line.strip() != FIRST_LINE:
            raise ValueError
        number, pattern = next(lines)
        number, line = next(lines)
        count = int(line)
        for number, line in itertools.islice(lines, count):  # noqa: B007
            name, id = line.split()
            specials[name] = int(id)
        for number, line in lines:  # noqa: B007
            a, b = map(int, line.split())
            token = tokens[a] + tokens[b]
            if min(a, b) < 0 or len(token) > MAX_TOKEN_BYTES:
                raise ValueError
            merges.append((tokens[a], tokens[b]))
            tokens.append(token)
    except (ValueError, IndexError, StopIteration):
        raise DataError(f"{where} line {number} is not that of a minbpe .model, or the file is damaged") from None
    ids = list(specials.values())
    if len(specials) < count or len(set(ids)) < len(ids) or not all(len(tokens) <= i <= MAX_ID for i in ids):
        raise DataError(f"{where}: its {count} special tokens need a name each, and ids above {len(tokens) - 1}")
    check_special_tokens(list(specials))
    return pattern.strip(), specials, merges


def _check_pattern(pattern: str, where: str) -> None:
    """Raises DataError unless the tokenizers library splits text as the regex package does, which minbpe uses (except
    for the newest characters)."""
    if not pattern:
        return
    try:
        import regex
    except ImportError:
        raise DataError(f"{where} needs the regex package: pip install 'meshlm[data]'") from None
    from tokenizers import Regex, pre_tokenizers

    with refusing(f"{where}: its expression {pattern!r} cannot be used"):
        split, compiled = pre_tokenizers.Split(Regex(pattern), "isolated"), regex.compile(pattern)
        for text in ranks.TRICKY:
            here = [text[start:stop] for _, (start, stop) in split.pre_tokenize_str(text)]
            if [match.group() for match in compiled.finditer(text) if match.group()] != here:
                raise DataError(f"{where}: its expression {pattern!r} leaves text out, or splits it differently here")


def to_minbpe(tokenizer: JsonTokenizer) -> bytes:
    """The .model of a byte-level BPE whose ids are the bytes, then the merges in order.

    Raises:
      DataError: the tokenizer is not such a BPE, or a special token or the pattern cannot be written in the file.
    """
    spec, where = tokenizer.spec, "the tokenizer cannot be written as a minbpe .model:"
    pattern = ranks.split_pattern(spec)
    if pattern is None:
        raise DataError(f"{where} it is not plain byte-level BPE (no normalizer, prefix space, dropout or added words)")
    order = ranks.rank_order(spec["model"] | {"ignore_merges": False}, tokenizer.plain)
    if order is None or len(order) != 256 + len(tokenizer.merges()):
        raise DataError(f"{where} its merges do not make each token once")
    if [tokenizer.plain[token] for token in order] != list(range(len(order))):
        raise DataError(f"{where} its ids are not the bytes 0 to 255 and then the merges in their order")
    if any(max(map(tokenizer.plain.__getitem__, pair)) >= 256 + i for i, pair in enumerate(tokenizer.merges())):
        raise DataError(f"{where} its merges do not make each token of earlier ones")
    if spaced := [name for name in tokenizer.special_tokens if name.split() != [name]]:
        raise DataError(f"{where} special token {spaced[0]!r} has a space in it")
    if pattern.strip() != pattern or "\n" in pattern:
        raise DataError(f"{where} its expression {pattern!r} does not fit on a line")
    ids = {name: id for id, name in tokenizer.specials.items()}
    lines = [FIRST_LINE, pattern, str(len(ids)), *(f"{name} {ids[name]}" for name in tokenizer.special_tokens)]
    lines += [f"{tokenizer.plain[a]} {tokenizer.plain[b]}" for a, b in tokenizer.merges()]
    return ("\n".join(lines) + "\n").encode()
