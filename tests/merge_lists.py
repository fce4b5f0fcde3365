"""Random byte-level BPE tokenizers that no training would produce, to test whether tiktoken gives the library's ids."""

import json
import random

from data.tokenizers.hf_json import PATTERNS, byte_level_json
from data.tokenizers.ranks import BYTE_CHARACTERS


def tokenizer_json(rng: random.Random) -> tuple[bytes, str]:
    """A tokenizer.json and the letters of its tokens.

    A token may be the product of several merges, adjacent in the list or not. A merge may be listed before the merges
    that make its parts, or twice. Some tokens may have no merge. There may be special tokens, ids in any order, and
    whole words that are looked up first.
    """
    letters = rng.choice(("ab", "abc", "abcd"))
    tokens, merges = list(letters), []
    for _ in range(rng.randint(2, 14)):
        token = rng.choice(tokens) + rng.choice(tokens)
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in tokens and token[i:] in tokens]
        if len(token) <= 8:
            merges += rng.sample(cuts, rng.choice((1, 1, len(cuts))))
            tokens += [token] * (token not in tokens)
    if rng.random() < 0.3:
        rng.shuffle(merges)
    if rng.random() < 0.4:  # as in files converted from ranks: all merges that make a token are adjacent
        products = list(dict.fromkeys(a + b for a, b in merges))
        merges = [(t[:i], t[i:]) for t in products for i in range(1, len(t)) if {t[:i], t[i:]} <= {*tokens}]
    if rng.random() < 0.1 and merges:
        merges.append(rng.choice(merges))
    names = [*BYTE_CHARACTERS, *dict.fromkeys(a + b for a, b in merges)]
    names += ["".join(rng.choices(letters, k=5))] * (rng.random() < 0.2)
    names = list(dict.fromkeys(names))
    if rng.random() < 0.3:
        rng.shuffle(names)
    pattern = rng.choice(("", *PATTERNS.values()))
    spec = json.loads(byte_level_json([], pattern, {}))
    spec["model"] |= {"vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    spec["model"]["ignore_merges"] = rng.random() < 0.5
    spec["model"]["byte_fallback"] = rng.random() < 0.05
    if rng.random() < 0.2:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": len(names), "content": "<e>", "special": rng.random() < 0.7, **flags}
        spec["added_tokens"] = [added]
    if rng.random() < 0.05:
        spec["model"]["unk_token"] = names[0]
    return json.dumps(spec).encode(), letters


def text(rng: random.Random, letters: str) -> str:
    return "".join(rng.choices(letters + " " * (rng.random() < 0.2), k=rng.randint(1, 24)))
