"""Chats become tokens, borders and loss masks; packed rows have whole chats and at least one target; what is cut or
refused is counted and named."""

import dataclasses
import itertools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader, packing, sources
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import DataError
from data.preparation import chats, pipeline
from data.token_files import formats, integrity
from tests import chat_models, runs
from tests.batches import tokens_of
from tests.step_test import MESHES, mesh_of
from trainer import sharding
from trainer.interchange.supervision import ChatTemplate, template_of

pytest.importorskip("jinja2")

T = 64
CONFIG = {"seq_len": T, "packed": True, "mask_documents": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return chat_models.folder(tmp_path_factory.mktemp("model"))


def prepare(source: pathlib.Path, model: pathlib.Path, out: pathlib.Path, **options) -> formats.Manifest:
    template = template_of(str(model))
    request = {"source": str(source), "tokenizer": str(model), "format": "chat", "template_sha256": template.sha256}
    return chats.prepare_chats(out, template, **request | options)


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("chats")
    prepare(chat_models.write(folder / "chats.jsonl"), model, folder / "dataset")
    for split in ("train", "val"):
        packing.pack_dataset(folder / "dataset", T, split)
    return folder / "dataset"


def encoded(template: ChatTemplate, folder: pathlib.Path, split: str) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of the chats of a split, read from its files."""
    manifest = formats.read_manifest(folder)
    files = formats.TokenFiles(folder, manifest, split)
    tokens = np.concatenate(files.shards)
    borders = [*np.fromfile(folder / f"{split}.documents.bin", "<u8").astype(int), len(tokens)]
    return [(tokens[a:b].tolist(), files.loss_mask[a:b].tolist()) for a, b in itertools.pairwise(borders)]


def test_the_dataset_holds_each_chat_once_with_its_mask(prepared, model):
    template = template_of(str(model))
    expected = []
    for messages in chat_models.chats():
        ids, mask, _ = template.supervised(messages)
        expected.append((ids.tolist(), mask.astype(int).tolist()))
    found = encoded(template, prepared, "train"), encoded(template, prepared, "val")
    assert sorted(found[0] + found[1]) == sorted(expected) and 0 < len(found[1]) < 20
    summary = pipeline.read_summary(prepared)
    assert sum(summary["supervised_tokens"].values()) == sum(sum(mask) for _, mask in expected)
    assert summary["documents"] == len(expected) and not summary["problems"]["counts"]


def test_prompt_and_completion_are_a_chat(model, tmp_path):
    lines = {
        "p": [{"prompt": "hello", "completion": "there"}],
        "m": [{"messages": chat_models.turns("hello", "there")}],
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prepare(tmp_path / f"{name}.jsonl", model, tmp_path / name, val_fraction=0.0)
    assert encoded(template_of(str(model)), tmp_path / "p", "train") == encoded(None, tmp_path / "m", "train")


def test_it_is_made_once_and_again_only_for_another_request(prepared, model, tmp_path):
    source, before = prepared.parent / "chats.jsonl", (prepared / "manifest.json").read_bytes()
    prepare(source, model, prepared)
    assert (prepared / "manifest.json").read_bytes() == before
    other = chat_models.folder(tmp_path / "other", chat_models.MARKED)
    for changed in ({"val_fraction": 0.5}, {"template_sha256": "0" * 64}):
        with pytest.raises(DataError, match="was prepared by another request"):
            template = template_of(str(model))
            request = {
                "source": str(source),
                "tokenizer": str(model),
                "format": "chat",
                "template_sha256": template.sha256,
            }
            chats.prepare_chats(prepared, template, **request | changed)
    prepare(source, other, tmp_path / "marked")
    assert encoded(None, tmp_path / "marked", "train") == encoded(None, prepared, "train")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [{"role": "human", "content": "x"}]}', "message 1 has the role 'human'; roles are system,"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "it has no message of the assistant"),
        ('{"messages": []}', "messages must be a list with at least one message"),
        ('{"messages": ["x"]}', "message 1 is not an object with role and content"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "content of message 1 is NoneType and not a text"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', "message 1 has 'weight', which"),
        ('{"conversations": [], "id": 1}', "neither messages nor prompt and completion; it has: conversations, id"),
        ('{"prompt": [], "completion": []}', "prompt and completion must be texts"),
        ("null", "it is NoneType and not an object"),
        ('{"messages": [', "broken JSON"),
        ('{"messages": 1, "messages": 2}', "record with the text key twice"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "FAIL"}]}', "refuses"),
    ],
)  # fmt: skip
def test_a_bad_record_ends_in_one_line_or_is_counted(tmp_path, line, said):
    refusing = (
        "{% for m in messages %}{% if m['content'] == 'FAIL' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    model = chat_models.folder(tmp_path / "model", refusing + chat_models.TEMPLATE)
    source = chat_models.write(tmp_path / "chats.jsonl", 8)
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(DataError) as e:
        prepare(source, model, tmp_path / "out")
    assert said in str(e.value) and f"{source} line 9" in str(e.value) and "\n" not in str(e.value)
    assert "--bad_records=skip" in str(e.value) and not (tmp_path / "out").exists()
    prepare(source, model, tmp_path / "out", bad_records="skip")
    summary = pipeline.read_summary(tmp_path / "out")
    assert summary["documents"] == 8 and sum(summary["problems"]["counts"].values()) == 1


def test_a_chat_without_a_supervised_token_is_refused_or_counted(tmp_path):
    model = chat_models.folder(tmp_path / "model", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    lines = [chat_models.turns("x", "y"), chat_models.turns("x", "")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in lines))
    with pytest.raises(DataError, match="chat without a supervised token"):
        prepare(tmp_path / "in.jsonl", model, tmp_path / "out")
    prepare(tmp_path / "in.jsonl", model, tmp_path / "out", bad_records="skip", val_fraction=0.0)
    assert formats.read_manifest(tmp_path / "out").splits["train"].documents == 1
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": lines[1]}) + "\n")
    with pytest.raises(DataError, match=r"holds no text to train on .*chat without a supervised token: 1"):
        prepare(tmp_path / "in.jsonl", model, tmp_path / "none", bad_records="skip")


def damage(folder: pathlib.Path, how: str) -> str:
    path = folder / "train.loss_mask.bin"
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
        return "is missing"
    path.write_bytes(raw[:-1] if how == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
    return "a loss mask of" if how == "cut" else "not the content of its manifest"


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_mask_is_refused(model, tmp_path, how):
    prepare(chat_models.write(tmp_path / "chats.jsonl", 20), model, tmp_path / "out")
    manifest = formats.read_manifest(tmp_path / "out")
    integrity.verify_dataset(open_dataset(DataConfig(path=str(tmp_path / "out"))))
    said = damage(tmp_path / "out", how)
    with pytest.raises(DataError, match=said):
        formats.TokenFiles(tmp_path / "out", manifest, "train")
    with pytest.raises(DataError, match=said):
        integrity.verify_dataset(open_dataset(DataConfig(path=str(tmp_path / "out"))))


def test_an_earlier_version_refuses_the_manifest_and_its_own_is_unchanged(prepared, tmp_path):
    """A reader that ignored the masks would train on every token."""
    raw = json.loads((prepared / "manifest.json").read_text())
    known = {field.name for field in dataclasses.fields(formats.Manifest)} - {"loss_masks"}
    assert set(raw) - known - {"format", "version", "fingerprint", "sha256"} == {"loss_masks"}
    plain = dataclasses.replace(formats.read_manifest(prepared), loss_masks={})
    assert "loss_masks" not in json.loads(plain.to_json())
    assert plain.fingerprint() != formats.read_manifest(prepared).fingerprint()


# Rows


def open_(prepared: pathlib.Path, **fields) -> sources.Sources:
    return sources.open_sources(DataConfig(path=str(prepared), **CONFIG | fields))


def chats_in_rows(windows: loader.Windows | loader.MixedWindows, rows: int) -> list[tuple[list[int], list[int]]]:
    """(ids, which of them are targets) of the chats in rows 0, 1, …, and of their padding."""
    g, found = np.arange(rows), []
    triples = zip(windows.rows(g).tolist(), windows.loss_mask(g).tolist(), windows.begins(g).tolist(), strict=True)
    for row, counts, starts in triples:
        assert any(counts)
        for a, b in itertools.pairwise([*np.flatnonzero(starts).tolist(), T + 1]):
            found.append((row[a:b], [0, *counts[a : b - 1]]))
            assert not (a and counts[a - 1])  # the first token of a chat is not a target of the chat before it
    return found


def expected_in_rows(prepared: pathlib.Path) -> list[tuple[list[int], list[int]]]:
    cut = [(ids[: T + 1], mask[: T + 1]) for ids, mask in encoded(None, prepared, "train")]
    return sorted(chat for chat in cut if any(chat[1]))


def test_rows_have_whole_chats_their_masks_and_borders(prepared):
    found = open_(prepared)
    windows = loader.MixedWindows(found.files("train"), found.stages, seq_len=T, seed=3, packings=found.packings)
    pieces = chats_in_rows(windows, windows.sources[0].num_windows)
    assert all(set(ids) == {0} for ids, counts in pieces if not any(counts))  # padding
    assert sorted(piece for piece in pieces if any(piece[1])) == expected_in_rows(prepared)


def test_a_shard_ends_between_two_chats(prepared, model, tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "SHARD_TOKENS", 300)
    prepare(prepared.parent / "chats.jsonl", model, tmp_path / "out")
    assert len(formats.read_manifest(tmp_path / "out").splits["train"].shards) > 5
    assert encoded(None, tmp_path / "out", "train") == encoded(None, prepared, "train")
    for split in ("train", "val"):
        packing.pack_dataset(tmp_path / "out", T, split)
    files = open_(tmp_path / "out").files("train")["out"]
    pieces = chats_in_rows(loader.ChatWindows(files, files.index, seed=0), files.index.rows)
    assert sorted(piece for piece in pieces if any(piece[1])) == expected_in_rows(prepared)


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 30)), min_size=1, max_size=40), st.integers(2, 20))
@settings(deadline=None, max_examples=100)
def test_what_is_not_in_the_rows_is_counted(lengths, width):
    """Each chat supervises the tokens from some place on."""
    mask = np.concatenate([np.arange(n) >= n - tail for n, tail in lengths]).astype(np.uint8)
    begins = np.cumsum([0, *(n for n, _ in lengths)])
    packed = packing.pack_chats(begins[:-1], int(begins[-1]), mask, width)
    pieces = dict(zip(packed.pieces["start"].tolist(), packed.pieces["length"].tolist(), strict=True))
    left_out = tokens = supervised = 0
    for begin, (n, _) in zip(begins.tolist(), lengths, strict=False):
        read = min(n, width)
        if mask[begin + 1 : begin + read].any():
            assert pieces.pop(begin) == read
        else:
            read = 0
            left_out += 1
        tokens += n - read
        supervised += int(mask[begin + max(read, 1) : begin + n].sum())
    assert not pieces and packed.unread == (left_out, tokens, supervised)


def test_chats_longer_than_a_row_are_said(prepared):
    said = subprocess.run(
        [sys.executable, "-m", "launch.pack", str(prepared), "--seq_len=20"],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
    )
    index = packing.read_index(prepared, formats.read_manifest(prepared), 20)
    assert index.cut > 0 and index.left_out > 0 and index.unread_targets > 0
    match = re.search(
        r"([\d,]+) of [\d,]+ chats are longer than 21 tokens and are cut; (\d+) are left out", said.stderr + said.stdout
    )
    assert match and int(match[1]) == index.cut and int(match[2]) == index.left_out
    assert packing.verify_packings(prepared, formats.read_manifest(prepared))
    with pytest.raises(DataError, match=r"none of the .* chats .* raise --seq_len"):
        packing.pack_dataset(prepared, 2)


def test_batches_are_the_same_on_every_mesh(prepared):
    made = []
    for name in MESHES:
        found = open_(prepared)
        windows = loader.MixedWindows(found.files("train"), found.stages, seq_len=T, seed=0, packings=found.packings)
        batch_sharding = sharding.named(mesh_of(name), "batch")
        made.append(loader.Loader(windows, global_batch_size=8, sharding=batch_sharding).batch(8))
    assert made[0].segment_ids is not None
    for other in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, made[0], other)


def test_an_evaluation_sees_each_target_of_the_split_once(prepared):
    files = open_(prepared).files("val")["dataset"]
    one = sharding.named(mesh_of("one"), "batch")
    batches = list(loader.evaluation_batches(files, seq_len=T, batch_size=4, sharding=one))
    count = sum(int(np.asarray(batch.loss_weights).sum()) for batch in batches)
    expected = [mask[1 : T + 1] for _, mask in encoded(None, prepared, "val")]
    assert count == sum(map(sum, expected)) > 0
    assert all(batch.inputs.shape == (4, T) for batch in batches)
    some = list(loader.evaluation_batches(files, seq_len=T, batch_size=1, sharding=one, limit=2))
    assert len(some) == 2
    np.testing.assert_array_equal(tokens_of(some[0])[0], tokens_of(batches[0])[0])


def test_chats_need_rows_and_borders_and_stay_among_themselves(prepared, model, tmp_path):
    for missing in ({"packed": False}, {"mask_documents": False}):
        with pytest.raises(DataError, match=r"need --config\.data\.packed=true --config\.data\.mask_documents=true"):
            open_(prepared, **missing)
    with pytest.raises(DataError, match=r"is not packed for data\.seq_len 47"):
        open_(prepared, seq_len=47)
    (tmp_path / "in.jsonl").write_text('{"text": "words"}\n{"text": "more"}\n')
    pipeline.prepare_dataset(
        tmp_path / "text", source=str(tmp_path / "in.jsonl"), tokenizer=str(model), val_fraction=0.0
    )
    packing.pack_dataset(tmp_path / "text", T)
    with pytest.raises(DataError, match=r"is for sft and .* is for pretrain"):
        sources.open_sources(DataConfig(path=f"{prepared},{tmp_path / 'text'}", **CONFIG))


def test_the_commands_say_what_is_in_the_dataset(prepared, model, tmp_path):
    def call(module: str, *flags: str, code: int = 0) -> str:
        return runs.finish(runs.start([sys.executable, "-m", module, *flags]), code)

    source = str(prepared.parent / "chats.jsonl")
    flags = (f"--source={source}", f"--tokenizer={model}", f"--out={tmp_path / 'out'}")
    said = call("launch.prepare", *flags, code=3)
    assert "a chat needs --format=chat" in said
    said = call("launch.prepare", *flags, "--format=chat")
    assert re.search(r"[\d,]+ tokens \(\d+\.\d%\) are the assistant's, and targets", said)
    assert (tmp_path / "out/manifest.json").exists()
    assert "exists already, made by the same request" in call("launch.prepare", *flags, "--format=chat")
    said = call("launch.prepare", *flags, "--format=chat", "--text_key=x", code=2)
    assert "--text_key is not for --format=chat" in said
    report = json.loads(call("launch.inspect", str(prepared), f"--seq_len={T}", "--batch_size=2", "--json"))
    assert report["packed"][0]["left_out"] is not None and len(report["packed"]) >= 2
    for row, targets in zip(report["batch"]["rows"], report["batch"]["supervised"], strict=True):
        assert (
            targets["text"].count("<|stop|>")
            and "user" not in targets["text"]
            and len(targets["ids"]) < len(row["ids"])
        )
    assert "its targets: " in call("launch.inspect", str(prepared), f"--seq_len={T}")


def test_the_first_token_of_a_chat_is_not_a_target_of_the_chat_before_it(tmp_path):
    """All tokens are supervised here: without the borders, a chat would be trained to predict the next one."""
    template = chat_models.folder(
        tmp_path / "model", "{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}"
    )
    lines = [json.dumps({"messages": chat_models.turns("x", "ab cd ef gh"[: 5 + i % 6])}) for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "in.jsonl", template, tmp_path / "out", val_fraction=0.0)
    manifest = formats.read_manifest(tmp_path / "out")
    index, _ = packing.pack_dataset(tmp_path / "out", 16)
    files = formats.TokenFiles(tmp_path / "out", manifest, "train")
    windows = loader.ChatWindows(files, index, seed=0, shuffled=False)
    mask, begins = windows.loss_mask(np.arange(index.rows)), windows.begins(np.arange(index.rows))
    assert files.loss_mask.all() and mask.sum() == index.tokens - index.unread - (index.pieces)
    assert not (mask & begins[:, 1:]).any() and begins[:, 1:].sum() > index.pieces / 2
