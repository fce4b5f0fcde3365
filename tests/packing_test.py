"""Packed rows hold each token once, cut no document that fits, and are the same everywhere; the loss skips padding."""

import bisect
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time

import jax
import make_dataset
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader, mixture, packing, sources
from data.batch import Batch, from_tokens
from data.config import DataConfig
from data.errors import DataError
from data.preparation.pipeline import prepare_dataset
from data.storage import files
from data.token_files import formats
from tests import runs
from tests.batches import on_mesh, tokens_of
from tests.step_test import MESHES, config, mesh_of
from trainer import sharding
from trainer.state import Program
from trainer.step import make_eval_step, make_train_step

EOS = 1
T = 16
WIDTH = T + 1


def write(folder: pathlib.Path, lengths: list[int], *shards: int, ends: bool = True) -> np.ndarray:
    """Writes documents of these lengths (with their end-of-text), whose tokens show their offsets; returns all tokens.

    `shards`: the ends of all shards except the last. Without `ends`, the last document has no end-of-text.
    """
    tokens = np.arange(2, sum(lengths) + 2)
    borders = np.cumsum([0, *lengths])
    tokens[borders[1 : None if ends else -1] - 1] = EOS
    manifest = make_dataset.write(folder, np.split(tokens, shards), vocab_size=1 << 20, dtype="uint32")
    split = dataclasses.replace(manifest.splits["train"], documents=len(lengths))
    manifest = dataclasses.replace(manifest, eos_id=EOS, splits={"train": split})
    (folder / formats.MANIFEST).write_text(manifest.to_json())
    (folder / "train.documents.bin").write_bytes(borders[:-1].astype("<u8").tobytes())
    return tokens


def open_windows(folder: pathlib.Path, seq_len: int = T, seed: int = 1) -> loader.PackedWindows:
    manifest = formats.read_manifest(folder)
    index = packing.read_index(folder, manifest, seq_len)
    return loader.PackedWindows(formats.TokenFiles(folder, manifest, "train"), index, seed=seed)


def lengths_like_text(count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths, as those of real documents: the median is 14, and some are far longer than a row."""
    return (np.random.default_rng(seed).lognormal(2.5, 1.0, count).astype(int) + 2).tolist()


def expected_rows(index: packing.Index, tokens: np.ndarray) -> list[list[int]]:
    """The rows by their definition, with lists and slices: pieces one after another, then padding."""
    pieces, first = index.load()
    rows = [[t for s, n in pieces[a:b] for t in tokens[s : s + n].tolist()] for a, b in itertools.pairwise(first)]
    return [row + [EOS] * (index.seq_len + 1 - len(row)) for row in rows]


def counted(tokens: np.ndarray, eos: int = EOS) -> np.ndarray:
    """Which targets of packed rows count: bool [rows, seq_len].

    A target does not count if it and the token before it are both end-of-text. Only padding is like this, and the rest
    of a cut document if that rest is only its end-of-text.
    """
    return (tokens[:, :-1] != eos) | (tokens[:, 1:] != eos)


# The algorithm


def one_by_one(lengths: np.ndarray, width: int) -> list[int]:
    """Best-fit-decreasing as the paper describes it. Returns the room left in each row, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else width
        bisect.insort(rooms, room - length)
    return rooms


@given(st.integers(1, 70).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(1, w), max_size=80))))
@settings(deadline=None, max_examples=200)
def test_best_fit_decreasing_is_that_of_the_paper(case):
    width, lengths = case[0], np.array(case[1], np.int64)
    rows = packing.best_fit_decreasing(lengths, width)
    used = np.bincount(rows, lengths).astype(int)
    assert sorted((width - used).tolist()) == one_by_one(lengths, width)
    assert not len(rows) or (used > 0).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(2, 30), st.booleans())
@settings(deadline=None, max_examples=200)
def test_pieces_hold_every_token_once_and_cut_only_what_is_too_long(lengths, width, closed):
    borders = np.cumsum([5, *lengths])  # a shard that does not begin at 0
    packed = packing.pack_shard(borders[:-1], int(borders[-1]), width, closed=closed)
    starts, sizes = packed.pieces["start"].astype(int), packed.pieces["length"].astype(int)
    assert np.array_equal(np.sort(packing.spans(starts, sizes)), np.arange(5, borders[-1]))
    rows = np.split(np.arange(len(starts)), packed.row_ends[:-1])
    assert all(0 < sizes[row].sum() <= width and (np.diff(starts[row]) > 0).all() for row in rows)
    pieces = set(zip(starts.tolist(), sizes.tolist(), strict=True))
    for begin, length in zip(borders[:-1].tolist(), lengths, strict=True):
        whole, rest = divmod(length, width)
        expected = {(begin + i * width, width) for i in range(whole)} | (
            {(begin + whole * width, rest)} if rest else set()
        )
        assert expected <= pieces
    if not closed:
        (alone,) = (row for row in rows if starts[row[0]] + sizes[row[0]] == borders[-1])
        assert len(alone) == 1


def test_a_realistic_distribution_leaves_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(int) + 1
    borders = np.cumsum([0, *lengths])
    start = time.monotonic()
    packed = packing.pack_shard(borders[:-1], int(borders[-1]), 1025)
    assert time.monotonic() - start < 5  # it takes 0.1 s; packing one document at a time would take more than 5 s
    assert borders[-1] / (len(packed.row_ends) * 1025) > 0.999


# The index


@pytest.fixture
def packed(tmp_path):
    write(tmp_path, lengths_like_text(400), 1000, 1017, 3000)
    packing.pack_dataset(tmp_path, T)
    return tmp_path


def test_rows_hold_whole_documents_and_an_epoch_every_token_once(tmp_path):
    lengths = lengths_like_text(500)
    shards = (1000, 1017, 3000)  # the second shard is as long as a row
    tokens = write(tmp_path, lengths, *shards, ends=False)
    index, there = packing.pack_dataset(tmp_path, T)
    assert not there and packing.pack_dataset(tmp_path, T) == (index, True)
    windows = open_windows(tmp_path)
    for epoch in (0, 1):
        rows = windows.rows(epoch * index.rows + np.arange(index.rows))
        assert rows.dtype == np.uint32 and rows.shape == (index.rows, WIDTH)
        assert sorted(rows.tolist()) == sorted(expected_rows(index, tokens))
    pieces, _ = index.load()
    where = packing.spans(pieces["start"].astype(int), pieces["length"].astype(int))
    assert np.array_equal(np.sort(where), np.arange(len(tokens)))
    row_of = {int(t): i for i, row in enumerate(rows) for t in row if t != EOS}
    borders = np.cumsum([0, *lengths])
    cut = 0
    for begin, end in itertools.pairwise(borders):
        rows_met = {row_of[int(t)] for t in tokens[begin:end] if t != EOS}
        crosses = any(begin < shard < end for shard in shards)
        assert len(rows_met) == 1 or crosses or end - begin > WIDTH
        cut += crosses or end - begin > WIDTH
    assert index.cut == cut < index.cut_by_windows < index.documents
    assert index.tokens == len(tokens) and index.utilisation == len(tokens) / (index.rows * WIDTH)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.lists(st.integers(0, 800), max_size=3),
    st.integers(1, 30),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_lengths_and_shards_are_read_as_they_were_written(lengths, borders, seq_len, ends):
    with tempfile.TemporaryDirectory() as folder:
        path, total = pathlib.Path(folder), sum(lengths)
        shards = sorted({border % total for border in borders} - {0})
        tokens = write(path, lengths, *shards, ends=ends)
        index, _ = packing.pack_dataset(path, seq_len)
        windows, g = open_windows(path, seq_len), np.arange(index.rows)
        rows = windows.rows(g)
        assert sorted(rows.tolist()) == sorted(expected_rows(index, tokens))
        assert np.array_equal(windows.loss_mask(g), counted(rows))
        assert np.array_equal(windows.loss_mask(g[::-3]), counted(rows[::-3]))
        pieces, _ = index.load()
        starts, stops = pieces["start"].astype(int), (pieces["start"] + pieces["length"]).astype(int)
        assert np.array_equal(np.sort(packing.spans(starts, stops - starts)), np.arange(total))
        held = set(zip(starts.tolist(), stops.tolist(), strict=True))
        documents = list(itertools.pairwise(np.cumsum([0, *lengths]).tolist()))
        assert index.cut == sum(document not in held for document in documents)
        assert not any(start < shard < stop for start, stop in held for shard in shards)


def test_cut_by_windows_counts_what_windows_cut(tmp_path):
    """By hand: rows of 5, windows [0, 5), [4, 9), [8, 13): the document at 3 is in two, the one at 8 in one."""
    write(tmp_path, [3, 5, 5])
    index, _ = packing.pack_dataset(tmp_path, 4)
    assert (index.cut, index.cut_by_windows, index.rows) == (0, 1, 3)
    pieces, first = index.load()
    assert pieces.tolist() == [(3, 5), (8, 5), (0, 3)] and first.tolist() == [0, 1, 2, 3]


def test_the_index_is_frozen(tmp_path):
    """A run in progress relies on its packed rows: if these values change, packing.VERSION must change, too."""
    write(tmp_path, [i * i * 7919 % 41 + 2 for i in range(400)], 1000)
    index, _ = packing.pack_dataset(tmp_path, T)
    assert (index.rows, index.pieces, index.sha256[:16]) == (529, 696, "9fd12f2cf89a171f")


def test_the_same_documents_give_the_same_file(tmp_path):
    files = []
    for name in ("a", "b"):
        write(tmp_path / name, lengths_like_text(400), 1000)
        index, _ = packing.pack_dataset(tmp_path / name, T)
        files.append(index.path.read_bytes())
    assert files[0] == files[1]


def test_each_epoch_and_seed_has_an_order_of_its_own(packed):
    one, other = open_windows(packed), open_windows(packed, seed=2)
    n = one.num_windows
    orders = [one.rows(np.arange(n)), one.rows(np.arange(n, 2 * n)), other.rows(np.arange(n))]
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    across = one.rows(np.array([n - 1, n, 3, n + 1]))  # two epochs in a batch, in any order
    assert np.array_equal(across, [orders[0][-1], orders[1][0], orders[0][3], orders[1][1]])
    one.will_need(np.arange(n - 5, n + 5))


def damaged(path: pathlib.Path, how: str) -> str:
    """Damages the index at `path` and returns what the error must say."""
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:-1])
        return f"{len(raw) - 1} bytes, expected {len(raw)}"
    if how == "corrupted":
        path.write_bytes(raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:])
        return "not the content its header names"
    if how == "of another version":
        path.write_bytes(raw.replace(b'"version": 1,', b'"version": 0,', 1))
        return "not an index of this version"
    if how == "cut in its header":
        path.write_bytes(raw[:100])
        return "not an index of this version"
    write(path.parent, lengths_like_text(400, seed=1))
    return "packs another dataset"


@pytest.mark.parametrize("how", ["truncated", "corrupted", "of another version", "cut in its header", "foreign"])
def test_a_damaged_or_foreign_index_is_refused_and_packed_again(packed, how):
    said = damaged(packing.index_path(packed, T), how)
    with pytest.raises(DataError) as e:
        open_windows(packed)
    assert said in str(e.value) and f"python -m launch.pack {packed} --seq_len={T}" in str(e.value)
    assert "\n" not in str(e.value)
    _, there = packing.pack_dataset(packed, T)
    assert not there
    open_windows(packed).rows(np.arange(10))


@pytest.mark.parametrize("header", [b"[" * 1024, b'"meshlm-packing"' + b"[" * 1008])
def test_headers_of_any_depth_and_numbers(packed, header):
    path = packing.index_path(packed, T)
    raw = path.read_bytes()
    for name in (b"documents", b"cut", b"cut_by_windows", b"rows"):
        for value in (b"0", b"null", b"1e3", b"[]", b"true"):
            found = re.sub(b'"%s": [^,]*' % name, b'"%s": %s' % (name, value), raw[:1024].rstrip(), count=1)
            path.write_bytes(found.ljust(1023) + b"\n" + raw[1024:])
            with contextlib.suppress(DataError):
                open_windows(packed)
                assert value == b"0" and name.startswith(b"cut")
    path.write_bytes(header + raw[1024:])
    with pytest.raises(DataError):
        open_windows(packed)


def test_a_file_that_is_no_index_is_left_alone(packed):
    path = packing.index_path(packed, 8)
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="move it away"):
        packing.pack_dataset(packed, 8)
    assert path.read_bytes() == b"mine"


def test_offsets_of_other_tokens_are_refused(tmp_path):
    write(tmp_path, [5, 9, 4])
    (tmp_path / "train.documents.bin").write_bytes(np.array([0, 6, 14], "<u8").tobytes())
    with pytest.raises(DataError, match=r"ends with token 7 and not with the end-of-text token 1"):
        packing.pack_dataset(tmp_path, T)
    assert not list(tmp_path.glob("*.packed*.bin"))


# The configuration


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("packed")
    lines = runs.text(20_000).splitlines()
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare_dataset(folder / "dataset", source=str(folder / "in.jsonl"), tokenizer="char")
    packing.pack_dataset(folder / "dataset", 32)
    return folder / "dataset"


def open_(path: object, **fields) -> sources.Sources:
    return sources.open_sources(DataConfig(path=str(path), seq_len=32, packed=True, **fields), 1000)


def test_packed_data_has_a_fingerprint_of_its_own(prepared):
    plain = sources.open_sources(DataConfig(path=str(prepared), seq_len=32))
    assert plain.fingerprint() == formats.read_manifest(prepared).fingerprint() != open_(prepared).fingerprint()


def test_what_cannot_be_packed_is_refused(prepared, tmp_path):
    with pytest.raises(DataError, match=r"is not packed for data\.seq_len 48; pack it with: .* --seq_len=48"):
        sources.open_sources(DataConfig(path=str(prepared), seq_len=48, packed=True))
    one_text = runs.dataset(tmp_path)
    for refused in (lambda: open_(one_text), lambda: packing.pack_dataset(one_text, 32)):
        with pytest.raises(DataError, match="no end-of-text token between documents"):
            refused()
    np.arange(100, dtype="<u2").tofile(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"tokens\.bin was not prepared by launch\.prepare"):
        open_(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"is not a dataset of launch\.prepare"):
        packing.pack_dataset(tmp_path / "nothing", 32)


def packed_loader(prepared: pathlib.Path, mesh: jax.sharding.Mesh, batch: int = 16) -> loader.Loader:
    found = open_(prepared)
    windows = loader.MixedWindows(found.files("train"), found.stages, seq_len=32, seed=0, packings=found.packings)
    return loader.Loader(windows, global_batch_size=batch, sharding=sharding.named(mesh, "batch"))


def test_batches_are_the_same_on_every_mesh(prepared):
    made = [packed_loader(prepared, mesh_of(name)).batch(8) for name in MESHES]
    for other in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, made[0], other)


def test_packed_sources_are_mixed(packed, tmp_path):
    write(tmp_path / "other", lengths_like_text(100, seed=2))
    packing.pack_dataset(tmp_path / "other", T)
    folders = {"a": packed, "b": tmp_path / "other"}
    files = {n: formats.TokenFiles(f, formats.read_manifest(f), "train") for n, f in folders.items()}
    indexes = {n: packing.read_index(f, formats.read_manifest(f), T) for n, f in folders.items()}
    mixed = loader.MixedWindows(files, mixture.parse_stages("3,1", 2), seq_len=T, seed=1, packings=indexes)
    g = np.arange(100)
    source, index = mixed.mixture.locate(g)
    alone = [open_windows(f) for f in folders.values()]
    samples = [(alone[s], np.array([i])) for s, i in zip(source, index, strict=True)]
    assert np.array_equal(mixed.rows(g), [windows.rows(i)[0] for windows, i in samples])
    assert np.array_equal(mixed.loss_mask(g), [windows.loss_mask(i)[0] for windows, i in samples])
    assert not mixed.loss_mask(g).all()


# The loss


def packed_config(prepared: pathlib.Path, mask_documents: bool, **top):
    manifest = formats.read_manifest(prepared)
    data = {"seq_len": 32, "packed": True, "mask_documents": mask_documents, "eos_id": manifest.eos_id}
    return config(data=data, model={"vocab_size": manifest.vocab_size}, **top)


def packed_batch(cfg, tokens: np.ndarray) -> Batch:
    mask = counted(tokens, cfg.data.eos_id)
    return from_tokens(tokens, loss_mask=mask, document_end=cfg.data.document_end)


def step_once(cfg, mesh, batch: Batch) -> tuple[dict, dict]:
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        state, metrics = make_train_step(program)(program.init(), on_mesh(batch, mesh), np.uint32(0))
        return jax.device_get(metrics), jax.device_get(state.params)


@pytest.fixture(scope="module")
def tokens(prepared) -> np.ndarray:
    """A batch with more padding in some rows than in others."""
    tokens = tokens_of(packed_loader(prepared, mesh_of("one")).batch(0)).astype(np.int32)
    eos = formats.read_manifest(prepared).eos_id
    for row, keep in zip(tokens[::3], (3, 12, 20, 1, 30, 7), strict=True):
        row[keep:] = eos
    return tokens


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_the_loss_of_packed_documents_is_that_of_each_alone(prepared, tokens, name):
    """Evaluates each document of a row without packing: its own tokens and the next token, but no padding."""
    cfg, mesh = packed_config(prepared, mask_documents=True), mesh_of(name)
    eos = cfg.data.eos_id
    alone = []
    for row in tokens:
        ends = np.flatnonzero(row[:-1] == eos) + 1
        for first, stop in zip([0, *ends], [*ends, 32], strict=True):
            if stop > first and (row[first], row[first + 1]) != (eos, eos):
                alone.append((row, first, stop - (row[stop - 1] == eos and row[stop] == eos)))
    rows, lengths = np.zeros((len(alone) + -len(alone) % 8, 33), np.int32), np.zeros(len(alone) + -len(alone) % 8, int)
    for i, (row, first, stop) in enumerate(alone):
        rows[i, : stop - first + 1], lengths[i] = row[first : stop + 1], stop - first
    with jax.set_mesh(mesh):
        plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packed=False, mask_documents=False))
        program = Program(plain, mesh)
        each = from_tokens(rows, loss_mask=np.arange(32) < lengths[:, None])
        nats, count = make_eval_step(program)(program.init().params, each)
    assert count == lengths.sum() == counted(tokens, eos).sum() < 16 * 32 * 0.9
    batch, expected = packed_batch(cfg, tokens), float(nats) / float(count)
    loss = step_once(cfg, mesh, batch)[0]["train/loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    unmasked = step_once(cfg, mesh, batch.replace(loss_weights=None))[0]["train/loss"]
    assert abs(unmasked - expected) > 1e-3  # counting padding gives another loss


@pytest.mark.parametrize("mask_documents", [False, True])
def test_microbatches_and_meshes_give_the_step_of_the_whole_batch(prepared, tokens, mask_documents):
    """Microbatches and devices have different numbers of targets; a mean of means would give another loss."""
    cfg = packed_config(prepared, mask_documents, z_loss=0.1)
    batch = packed_batch(cfg, tokens)
    whole, params = step_once(cfg, mesh_of("one"), batch)
    for name, accum in (("one", 4), ("mixed", 1), ("mixed", 2)):
        cfg = packed_config(prepared, mask_documents, z_loss=0.1, grad_accum_steps=accum)
        metrics, other = step_once(cfg, mesh_of(name), batch)
        for key in ("train/loss", "train/grad_norm", "train/param_norm"):
            assert metrics[key] == pytest.approx(whole[key], rel=1e-5), (name, accum, key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, other)


def test_what_follows_the_documents_of_a_row_as_padding_changes_no_gradient(prepared, tokens):
    """If half of the rows are padding, the step is that of the other half."""
    cfg = packed_config(prepared, mask_documents=True)
    half = tokens.copy()
    half[8:] = cfg.data.eos_id
    metrics, _ = step_once(cfg, mesh_of("one"), packed_batch(cfg, half))
    alone, _ = step_once(dataclasses.replace(cfg, global_batch_size=8), mesh_of("one"), packed_batch(cfg, tokens[:8]))
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-6)
    assert metrics["train/grad_norm"] == pytest.approx(alone["train/grad_norm"], rel=1e-5)


# The whole path


def test_packed_by_the_command_trained_killed_and_resumed(prepared, tmp_path):
    dataset = tmp_path / "dataset"
    prepare_dataset(dataset, source=str(prepared.parent / "in.jsonl"), tokenizer="char")
    fields = {
        "num_train_steps": 30, "data__packed": "true", "data__mask_documents": "true", "eval__every_steps": 10,
    }  # fmt: skip
    refused = runs.train(tmp_path / "early", dataset, code=3, **fields)
    command = [sys.executable, "-m", "launch.pack", str(dataset), "--seq_len=32"]
    assert f"python -m launch.pack {dataset} --seq_len=32" in refused
    out = runs.finish(runs.start(command))
    assert "% of them used" in out and "documents cut" in out
    assert "existed already" in runs.finish(runs.start(command))
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.train(whole, dataset, **fields)
    process = runs.start(runs.command(run, dataset, **fields))
    deadline = time.monotonic() + runs.TIMEOUT_S
    while len(runs.rows(run)) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, code=42)
    assert len(runs.rows(run)) < 30
    toggled = runs.train(run, dataset, code=2, **fields | {"data__packed": "false"})
    assert "config.data.packed: True -> False" in toggled
    assert "Resuming after step" in runs.train(run, dataset, **fields)
    assert runs.losses(run) == runs.losses(whole)
    evaluate = [sys.executable, "-m", "launch.evaluate", f"--workdir={run}", "--json"]
    result = json.loads(runs.finish(runs.start(evaluate)).splitlines()[-1])
    assert result["step"] == 30 and result["val/loss"] > 0
    packing.index_path(dataset, 32).unlink()
    assert " ".join(command[1:]) in runs.finish(runs.start(evaluate), code=3)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_lock_that_cannot_be_made_is_about_writing(tmp_path, monkeypatch, code):
    write(tmp_path, [3, 4])

    def refuses(place, *arguments):
        raise OSError(code, os.strerror(code), str(place))

    monkeypatch.setattr(files, "_take", refuses)
    with pytest.raises(DataError, match=rf"cannot write {tmp_path}/train\.packed-4\.bin: {os.strerror(code)}"):
        packing.pack_dataset(tmp_path, 4)
