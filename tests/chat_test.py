"""Chat templates are rendered in a sandbox as in transformers; only the template can write special tokens."""

import json
import pathlib

import numpy as np
import pytest

from data.tokenizers.hf_json import train_bpe
from tests.texts import CORPUS
from trainer.errors import ConfigError
from trainer.interchange.chat import Chat

pytest.importorskip("jinja2")

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|stop|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(CORPUS, 300, special_tokens=["<|endoftext|>", "<|start|>", "<|stop|>"])


def kept(folder: pathlib.Path, template: str | None = TEMPLATE, **config) -> pathlib.Path:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "hf/chat_template.jinja").write_text(template)
    return folder / "hf"


def test_a_prompt_has_special_tokens_where_the_template_has_them(tokenizer, tmp_path):
    stop = next(id for id, name in tokenizer.specials.items() if name == "<|stop|>")
    chat = Chat(kept(tmp_path, bos_token_id=tokenizer.eos_id, eos_token_id=[stop, 7]), tokenizer)
    text = chat.prompt([{"role": "user", "content": " two words "}])
    assert text == "<|endoftext|><|start|>user\ntwo words<|stop|>\n<|start|>assistant\n"
    ids = chat.encode(text)
    names = [tokenizer.specials[id] for id in ids.tolist() if id in tokenizer.specials]
    assert names == ["<|endoftext|>", "<|start|>", "<|stop|>", "<|start|>"]
    assert tokenizer.decode(ids) == text
    assert chat.stop_ids == {stop, 7, tokenizer.eos_id}
    np.testing.assert_array_equal(chat.encode("no special"), tokenizer.encode("no special"))


def test_the_template_may_be_in_the_tokenizers_config(tokenizer, tmp_path):
    folder = kept(tmp_path, None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": "{{ eos_token }}{{ messages[0]['content'] }}", "eos_token": {"content": "<|stop|>"}}
        )
    )
    assert Chat(folder, tokenizer).prompt([{"role": "user", "content": "x"}]) == "<|stop|>x"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("{% if %}", "is damaged"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the message: roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the message"),
    ],
    ids=str,
)
def test_templates_that_do_not_work_end_in_one_line(tokenizer, tmp_path, template, said):
    with pytest.raises(ConfigError) as e:
        Chat(kept(tmp_path, template), tokenizer).prompt([{"role": "user", "content": "x"}])
    assert said in str(e.value) and "\n" not in str(e.value)
