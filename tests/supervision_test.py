"""The supervised tokens of a chat are those that the assistant writes with the token that ends its turn, for templates
with and without marks; transformers computes the same."""

import json

import numpy as np
import pytest

from data.errors import DataError
from tests import chat_models
from tests.chat_models import MARKED, TEMPLATE, turns
from trainer.errors import ConfigError
from trainer.interchange.supervision import MERGED, NO_END, SPELLED, template_of

pytest.importorskip("jinja2")

CHAT = turns("hello there", "general words", "and then", " more of it\n", system="be brief")


@pytest.fixture(params=["plain", "marked"])
def model(request, tmp_path):
    return chat_models.folder(tmp_path / "model", {"plain": TEMPLATE, "marked": MARKED}[request.param])


def answers(template, messages) -> list[str]:
    """The texts of the runs of supervised tokens."""
    ids, mask, _ = template.supervised(messages)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [template.tokenizer.decode(ids[a:b]) for a, b in borders.reshape(-1, 2)]


def test_the_assistant_s_tokens_and_its_end_token_are_supervised(model):
    template = template_of(str(model))
    assert answers(template, CHAT) == ["general words<|stop|>", " more of it\n<|stop|>"]
    ids, mask, notes = template.supervised(CHAT)
    text = template.chat.render(CHAT, add_generation_prompt=False).text
    np.testing.assert_array_equal(ids, template.chat.encode(text))
    assert mask.shape == ids.shape and not notes and template.tokenizer.decode(ids) == text
    assert text == "".join(f"<|start|>{m['role']}\n{m['content']}<|stop|>\n" for m in CHAT)


@pytest.mark.parametrize("form", ["{%+ generation %}", "{%- generation -%}", "{%generation%}"])
def test_the_mark_is_found_in_every_form(tmp_path, form):
    folder = chat_models.folder(tmp_path / "model", MARKED.replace("{% generation %}", form))
    template = template_of(str(folder))
    assert template.chat.marks and answers(template, CHAT)[0] == "general words<|stop|>"
    (folder / "chat_template.jinja").write_text("{# {% generation %} #}" + TEMPLATE)
    commented = template_of(str(folder))
    assert not commented.chat.marks and answers(commented, CHAT)[0] == "general words<|stop|>"


def test_the_hash_of_a_template_has_the_names_that_it_may_write(tmp_path):
    folder, found = chat_models.folder(tmp_path / "model", "{{ bos_token }}" + TEMPLATE), set()
    for name in ("<|start|>", "<|call|>"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
        found.add(template_of(str(folder)).sha256)
    assert len(found) == 2


def test_transformers_marks_the_same_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = template_of(str(chat_models.folder(tmp_path / "model", MARKED)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model/tokenizer.json"))
    theirs.chat_template = MARKED
    for messages in [CHAT, *chat_models.chats(20)]:
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask, _ = template.supervised(messages)
        assert ids.tolist() == found["input_ids"] and mask.astype(int).tolist() == found["assistant_masks"]


def test_a_prompt_of_sampling_is_followed_by_the_supervised_tokens(model):
    """The model is trained to continue what launch.sample --chat asks it."""
    template = template_of(str(model))
    ids, mask, _ = template.supervised(CHAT)
    for i in (2, 4):
        prompt = template.chat.encode(template.chat.prompt(CHAT[:i]))
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_oddities_are_noted(model):
    template = template_of(str(model))
    assert SPELLED in template.supervised(turns("what is <|stop|>?", "x")).notes
    merging = template.tokenizer.encode("\n\n")
    notes = template.supervised(turns("x", "\n\nwords")).notes
    assert (MERGED in notes) == (len(merging) == 1)
    (model / "config.json").write_text(json.dumps({"eos_token_id": []}))
    assert NO_END in template_of(str(model)).supervised(CHAT).notes


def test_a_token_across_the_border_is_supervised_and_noted(tmp_path):
    """The template's text before an answer ends in the middle of a token."""
    model = chat_models.folder(
        tmp_path / "model",
        "{% for m in messages %}{{ '' if m['role'] == 'user' else ' ' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} {% endif %}",
    )
    template = template_of(str(model))
    word = next(w for w in ("the", "token", "and", "of") if len(template.tokenizer.encode(f" {w}")) == 1)
    ids, mask, notes = template.supervised(turns("x", word))
    assert set(notes) == {MERGED, NO_END} and template.tokenizer.decode(ids[mask]) == f" {word}"


def test_a_template_that_changes_earlier_turns_is_refused_unless_it_marks_the_answers(tmp_path):
    """As templates that leave out the thoughts of earlier answers."""
    later = "{{ 'old: ' if message['role'] == 'assistant' and not loop.last }}"
    template = template_of(
        str(chat_models.folder(tmp_path / "a", TEMPLATE.replace("\n{{ message", "\n" + later + "{{ message")))
    )
    assert answers(template, turns("x", "y")) == ["y<|stop|>"]
    with pytest.raises(DataError, match="renders message 2 or those before it in another way") as e:
        template.supervised(CHAT[1:])
    assert "\n" not in str(e.value)
    marked = MARKED.replace("{% generation %}", later + "{% generation %}")
    assert answers(template_of(str(chat_models.folder(tmp_path / "b", marked))), CHAT[1:])[0] == "general words<|stop|>"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", CHAT, "refuses the message: roles must alternate"),
        (MARKED, turns("x", "\ufdd0y"), "U+FDD0"),
        ("{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}", CHAT, "inside another"),
    ],
)
def test_templates_and_texts_that_fail_end_in_one_line(tmp_path, template, messages, said):
    with pytest.raises(DataError) as e:
        template_of(str(chat_models.folder(tmp_path / "model", template))).supervised(messages)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    model = chat_models.folder(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        template_of(str(model))
    with pytest.raises(ConfigError, match="chats need the run or the folder of a model"):
        template_of("byte")
