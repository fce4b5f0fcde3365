"""Chats, a chat template and a tokenizer for tests: the folder of a small chat model as Hugging Face writes it, without
weights."""

import json
import pathlib

from data.tokenizers.base import Tokenizer
from data.tokenizers.hf_json import train_bpe
from tests.texts import CORPUS

SPECIAL = ["<|endoftext|>", "<|start|>", "<|stop|>", "<|call|>"]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# The same text; the assistant's part is marked, with its end token.
MARKED = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|stop|>{% endgeneration %}{% else %}{{ message['content'] }}<|stop|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Byte-level BPE in which most words of `chats` are one token."""
    texts = [f"{m['role']}\n {m['content']}" for messages in chats() for m in messages]
    return train_bpe([*CORPUS, *texts], 450, special_tokens=SPECIAL)


def folder(path: pathlib.Path, template: str = TEMPLATE) -> pathlib.Path:
    """Writes tokenizer.json, config.json and the template; two tokens end a turn: <|stop|> and <|call|>."""
    path.mkdir(parents=True, exist_ok=True)
    codec = tokenizer()
    file = codec.file()
    assert file is not None
    (path / file[0]).write_bytes(file[1])
    ends = [id for id, name in codec.specials.items() if name in ("<|stop|>", "<|call|>")]
    (path / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    (path / "chat_template.jinja").write_text(template)
    return path


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Messages of the user and the assistant, in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def chats(count: int = 60) -> list[list[dict[str, str]]]:
    """Chats of different lengths: one, two or three answers, some with a system message."""
    words = ["mesh", "shard", "token", "layer", "step", "loss", "resume", "batch", "head", "norm"]
    made = []
    for i in range(count):
        said = [" ".join(words[(i * j + k) % 10] for k in range(2 + (i + j) % 7)) for j in range(2 * (1 + i % 3))]
        made.append(turns(*(f"{i}: {text}" for text in said), system="be brief" if i % 5 == 0 else ""))
    return made


def write(path: pathlib.Path, count: int = 60) -> pathlib.Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats(count)))
    return path
