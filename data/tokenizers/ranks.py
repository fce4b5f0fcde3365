"""Byte-level BPE by ranks, as in tiktoken: encodes fast with a tokenizer.json, and has patterns for `.tiktoken` files.

tiktoken merges the adjacent pair whose concatenation has the lowest rank. A tokenizer.json lists merges instead. Both
give the same ids if `rank_order` finds an order of tokens for which that is proved, and if `splits_alike` knows that
both libraries read the expression in the same way. Otherwise tiktoken is not used.
"""

import itertools
import re
from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, in the order of the bytes (bytes_to_unicode of its encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}

# GPT-2's own expression (encoder.py), which the tokenizers library's ByteLevel(use_regex=True) and llama.cpp have too.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How text is split, as tiktoken's regular expressions (possessive ++ instead of +: the same matches, faster). From
# tiktoken_ext/openai_public.py (r50k_base, cl100k_base, o200k_base) and Llama 3's tokenizer.py.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# Text that shows differences between regular expressions, Unicode tables and merges of two libraries.
TRICKY = (
    "Hello world, it's 3 o'clock; I'LL say we've HE'D they're can't 'tis ſ'ſ K'K o\u2019clock ''' ' s 't'",
    " lead  two   three\tand \t tabs\n\n\nlines \r\n \r\n  x\n \n  trailing   ",
    "\u00a0nbsp\u3000wide\u2028line\u2029\u0085next\x0b\x0c\x1c\x1d\x1e\x1f\u200b\u200d\ufeff\u180e x",
    "0 12 345 6789 1234567890 3.14 1,000,000 ٣٤٥ ² ³ ½ Ⅻ ① 𝟘𝟙",
    "naïve café e\u0301 ÀÉ ß İ ı ﬁ ǅ ʰ ª the東京 さくら 한국어 ภาษาไทย हिन्दी עברית العربية",
    "🚀🚀 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪 ☃ \U0010ffff \ue000",
    "def f(x):\n    return {'a': [1, 2]} != None  # <|endoftext|> <eos> </s> ___ --- +++ /* */\n\n\treturn\n",
    "\x00\x01\x02 \x7f \x80\x9f NUL a\x00b ÿĀġĠ Ċ ▁ ##x",
)
# Letters and digits of Unicode 14 to 17: a library knows the characters of the version with which it was built.
NEW_CHARACTERS = (
    "a\u0c5db a\u2c2fb \U00010570 \U0001df25 \U00031350a \U0002ebf0a \u1c89a \U00010d4aa \U0001ccf05 \U00011bc0"
    " 1\U00011bf0 \U00011db0a \U0001e4d0 \U000323b0a \ua7cea \U00016ea0a \U0001e5d0a"
)

# The parts of expressions that Oniguruma (the tokenizers library) and Rust (tiktoken) read in the same way. These parts
# are not allowed: ^ and $ (in Oniguruma, of a line), "." and \w \d \h \b, {1,3}+ (possessive in only one library),
# other look-around, references. (?i:…) may have only contractions; TRICKY has all characters that fold to these.
_CHARACTER = r"(?:\\p\{[A-Z][a-z]?\}|\\[sSrnt]|[^\\\[\](){}|?*+^$.&~-])"
_ITEM = rf"(?:{_CHARACTER}|\[\^?(?:[A-Za-z0-9]-[A-Za-z0-9]|{_CHARACTER})+\])(?:[?*+]\+?|\{{\d(?:,\d?)?\}}(?!\+))?"
_FOLDED = r"\(\?i:(?:'|\[sdmt\]|\||s|t|re|ve|m|ll|d)+\)\??"
_PLAIN_EXPRESSION = re.compile(rf"(?:{_ITEM}|{_FOLDED}|\(\?!\\S\)|\||\(\?:|\))+")

# A special token that tiktoken gets but may never find: without any special token, tiktoken searches at each character
# and takes twice as long. (encode_ordinary does not search, but panics in Rust when `encode` raises a ValueError.)
NEVER = "<|endoftext|>"

Encode = Callable[[str], np.ndarray]


def accelerated(
    spec: dict[str, Any], plain: dict[str, int], encode: Encode
) -> Callable[[str], np.ndarray | None] | None:
    """A function that encodes with tiktoken, or None if it is not installed or its ids are not proved to be the same.

    Args:
      spec: a tokenizer.json that the tokenizers library has accepted.
      plain: the tokens of `spec` except the added tokens, and their ids.
      encode: encodes a text with the tokenizers library.

    Returns:
      a function from text to the ids that `encode` gives. It returns None for a text that tiktoken cannot split (very
      long runs of white space), or from which its expression leaves something out.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    pattern = split_pattern(spec)
    if pattern is None or not splits_alike(pattern) or (order := rank_order(spec["model"], plain)) is None:
        return None
    try:
        encoding = tiktoken.Encoding(
            "tokenizer.json",
            pat_str={GPT2_PATTERN: PATTERNS["gpt2"], "": r"[\s\S]+"}.get(pattern, pattern),
            mergeable_ranks={bytes(BYTE_OF[c] for c in token): rank for rank, token in enumerate(order)},
            special_tokens={NEVER: len(order)},
        )
    except ValueError:  # tiktoken does not support the regular expression
        return None
    ids = np.array([plain[token] for token in order], np.uint32)
    lengths = np.array(list(map(len, order)), np.uint32)  # a character of a token is a byte of text

    def fast(text: str) -> np.ndarray | None:
        try:
            found = encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # "Max stack size exceeded for backtracking"
            return None
        whole = lengths[found].sum(dtype=np.int64) == (len(text) if text.isascii() else len(text.encode()))
        return ids[found] if whole else None  # the library keeps text between two matches as a word; tiktoken drops it

    for text in (*TRICKY, NEW_CHARACTERS):
        if (found := fast(text)) is None or not np.array_equal(found, encode(text)):
            return None
    return fast


def split_pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression that splits text, "" if text is not split; None if this is not plain byte-level BPE."""
    model, before = spec["model"], spec.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    byte_level = parts[-1] if parts else {}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model.get("type", "BPE") != "BPE"
        or spec.get("normalizer") is not None
        or any(model.get(field) for field in odd)
        or any(not token["special"] for token in spec.get("added_tokens") or [])
        or byte_level.get("type") != "ByteLevel"
        or byte_level.get("add_prefix_space", True)
    ):
        return None
    if len(parts) == 1 and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    if len(parts) == 1:
        return ""
    split = parts[0]
    wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(parts) > 2 or byte_level.get("use_regex", True) or any(split.get(k) != v for k, v in wanted.items()):
        return None
    return split["pattern"].get("Regex")


def splits_alike(pattern: str) -> bool:
    """Whether both libraries read the expression in the same way, and it does not match an empty text."""
    import regex  # a dependency of tiktoken, too

    if not pattern:
        return True
    return bool(_PLAIN_EXPRESSION.fullmatch(pattern)) and not regex.match(pattern, "")


def rank_order(model: dict[str, Any], plain: dict[str, int]) -> list[str] | None:
    """The tokens by rank, such that tiktoken's rule merges as `model` does; None if that is not proved for any order.

    Ranks are the bytes, then the products of merges in order; the merges with the same product must be consecutive. The
    merges inside a span whose borders no merge crosses do not depend on the text around it. So two parts of a token are
    adjacent only if they are the last two parts when the token is encoded by itself. Hence the rules agree if
    - every way to divide a token into two tokens is a merge (files converted from ranks, such as Llama 3's): both rules
      choose from the same pairs, and one product has one rank; complete words must be looked up first (ignore_merges),
      as tiktoken does; or
    - each token, encoded by itself, is itself (trained files, such as GPT-2's): its last two parts are a merge, so
      tiktoken has no other pairs, and one product has one rank.
    """
    import tokenizers

    merges: list[Any] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    rank = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    products = [rank.setdefault(left + right, len(rank)) for left, right in merges]
    if rank.keys() - plain.keys() or products != sorted(products):
        return None
    if model.get("ignore_merges"):
        order = [*rank, *(token for token in plain if token not in rank)]
        if _every_split_is_a_merge(order, plain, set(merges)):
            return order
        if len(order) > len(rank):
            return None
    model_only = tokenizers.Tokenizer(tokenizers.models.BPE({token: plain[token] for token in rank}, merges))
    encodings = model_only.encode_batch_fast(list(rank), add_special_tokens=False)
    reached = all(encoding.ids == [plain[token]] for token, encoding in zip(rank, encodings, strict=True))
    return list(rank) if reached else None


def _every_split_is_a_merge(tokens: Iterable[str], known: Container[str], merges: Container[tuple[str, str]]) -> bool:
    """Whether each division of a token into two known tokens is one of `merges`."""
    pairs = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    return all((left, right) in merges for left, right in pairs if left in known and right in known)
