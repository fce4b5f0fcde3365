"""Preferences: pairs of chats become rows, and loss and gradient are those of DPO's definition, on any mesh."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from data import loader, packing
from data.batch import Batch, from_tokens
from data.token_files import formats
from tests import chat_models, chats_test, finetuning_test, runs
from tests.batches import on_mesh
from tests.lora_test import flat
from tests.step_test import config, mesh_of
from trainer import sharding
from trainer.config import Config
from trainer.evaluation import evaluate
from trainer.finetuning import preference, reference
from trainer.interchange.supervision import template_of
from trainer.state import Program
from trainer.step import forward, make_eval_step, make_gradient

pytest.importorskip("jinja2")

T, ROWS, BETA = 96, 8, 3.0


def records(count: int = 60) -> list[dict]:
    """Pairs in each of the forms in which they are published."""
    made = []
    for i, messages in enumerate(chat_models.chats(count)):
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        prompt, chosen = messages[:-1], messages[-1:]
        rejected = [{"role": "assistant", "content": f"{i}: no {chosen[0]['content'][:20]}"}]
        if i % 3 == 0:
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "score": 1.0})
        elif i % 3 == 1:
            made.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            made.append({"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected})
    return [*made, {"prompt": "step", "chosen": "loss", "rejected": "batch"}]


def write(path: pathlib.Path, made: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in made))
    return path


def prepare(source: pathlib.Path, model: pathlib.Path, out: pathlib.Path, **options) -> formats.Manifest:
    manifest = chats_test.prepare(source, model, out, format="preference", **options)
    for split in ("train", "val"):
        if manifest.splits[split].tokens:
            packing.pack_dataset(out, T, split)
    return manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return chat_models.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pairs")
    prepare(write(folder / "pairs.jsonl", records()), model, folder / "dataset")
    return folder / "dataset"


def config_of(prepared: pathlib.Path, **top) -> Config:
    model = {"vocab_size": formats.read_manifest(prepared).vocab_size, "max_seq_len": T}
    model["lora"] = top.pop("lora", {"rank": 3})
    data = {"seq_len": T, "packed": True, "mask_documents": True}
    fields = {"global_batch_size": ROWS, "task": "dpo", "dpo": {"beta": BETA}}
    return config(data=data, model=model, **fields | top)


@pytest.fixture(scope="module")
def params(prepared) -> dict:
    rng = np.random.default_rng(0)
    shapes = Program(config_of(prepared), mesh_of("one")).params
    return jax.tree.map(lambda p: (0.2 * rng.standard_normal(p.shape)).astype(np.float32), shapes)


def batch_of(prepared: pathlib.Path, rows: int = ROWS) -> Batch:
    found = chats_test.open_(prepared, seq_len=T)
    windows = loader.MixedWindows(found.files("train"), found.stages, seq_len=T, seed=0, packings=found.packings)
    batch_sharding = sharding.named(mesh_of("one"), "batch")
    return jax.device_get(
        loader.Loader(windows, global_batch_size=rows, sharding=batch_sharding, document_end=-1).batch(0)
    )


def test_a_row_is_a_pair_of_which_only_what_differs_is_supervised(prepared, model):
    template, expected = template_of(str(model)), set()
    for record in records():
        messages = []
        for name in ("chosen", "rejected"):
            answer, prompt = record[name], record.get("prompt", [])
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
                prompt = [{"role": "user", "content": prompt}]
            messages.append(answer if answer[: len(prompt)] == prompt else prompt + answer)
        (a, mask_a, _), (b, mask_b, _) = map(template.supervised, messages)
        common = next(i for i in range(len(a)) if a[i] != b[i])
        assert mask_a[common:].any()
        expected.add((tuple(a), tuple(np.flatnonzero(mask_a[common:]) + common),
                      tuple(b), tuple(np.flatnonzero(mask_b[common:]) + common)))  # fmt: skip
    found = set()
    for split in ("train", "val"):
        encoded = chats_test.encoded(template, prepared, split)
        for (a, mask_a), (b, mask_b) in zip(encoded[::2], encoded[1::2], strict=True):
            found.add((tuple(a), tuple(np.flatnonzero(mask_a)), tuple(b), tuple(np.flatnonzero(mask_b))))
    assert found == expected and len(found) == 61
    batch = batch_of(prepared, 40)
    for inputs, counts, segments in zip(batch.inputs, batch.loss_weights, batch.segment_ids, strict=True):
        assert {1, 2} <= set(segments) <= {1, 2, 3} and counts[segments == 1].any() and counts[segments == 2].any()
        assert not counts[segments == 3].any() and not inputs[segments == 3].any()


def test_long_pairs_are_left_out_whole_and_counted(model, tmp_path):
    words = "mesh shard token layer " * 40
    made = [
        {"prompt": "a", "chosen": f"{i} yes {words if i % 4 == 0 else ''}", "rejected": f"{i} no"} for i in range(20)
    ]
    prepare(write(tmp_path / "p.jsonl", made), model, tmp_path / "data", val_fraction=0.0)
    (index,) = packing.verify_packings(tmp_path / "data", formats.read_manifest(tmp_path / "data"))
    assert (index.rows, index.documents, index.left_out) == (15, 40, 10) and "10 are left out" in index.unread_chats


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "it needs chosen and rejected; it has: chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen is int; it must be a text or a list of messages"),
        ({"prompt": "a", "chosen": [{"role": "bot", "content": "x"}], "rejected": "b"}, "message 2 has the role 'bot'"),
        ({"chosen": [], "rejected": "b"}, "messages must be a list with at least one message"),
        (["a"], "it needs chosen and rejected; it has: list"),
    ],
)
def test_other_records_are_refused_with_their_line(record, words, model, tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, record])
    with pytest.raises(chats_test.DataError) as e:
        prepare(source, model, tmp_path / "data")
    assert words in str(e.value) and "line 2" in str(e.value)


def gradient(cfg: Config, name: str, params: dict, batch: Batch) -> tuple[float, dict, dict]:
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        there = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        make = jax.jit(make_gradient(program), static_argnums=2)
        loss, shown, grads = make(there, on_mesh(batch, mesh), None, np.zeros((), np.int32))
    return float(loss), {k: float(v) for k, v in shown.items()}, flat(grads)


def without_adapters(params: dict) -> dict:
    flat_params = flat_jax(params)
    return traverse_util.unflatten_dict({path: x for path, x in flat_params.items() if ".lora." not in path}, sep=".")


@pytest.fixture(scope="module")
def cases(prepared, params) -> dict[str, tuple]:
    """The configuration, the parameters and the reference's, with adapters and without."""
    before = without_adapters(params)
    after = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(1).standard_normal(x.shape, np.float32), before)
    return {
        "adapters": (config_of(prepared), params, preference.reference(params)),
        "all": (config_of(prepared, lora={}), after, before),
    }


def log_ratios(cfg: Config, name: str, params: dict, batch: Batch) -> np.ndarray:
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        there = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.params))
        return np.asarray(reference.make_log_ratio_step(program)(there, on_mesh(batch, mesh)))


def with_reference(cfg: Config, batch: Batch, of_reference: dict) -> Batch:
    """The batch as the loader of such a run makes it."""
    if not cfg.stores_reference:
        return batch
    ratios = log_ratios(cfg, "one", of_reference, batch)
    return batch.replace(reference=np.broadcast_to(ratios[:, None], batch.inputs.shape))


@pytest.mark.parametrize("case", ["adapters", "all"])
def test_loss_and_gradient_are_those_of_trls_formula_on_the_same_logits(prepared, cases, case):
    """TRL computes -logsigmoid(beta ((chosen - rejected) - (ref_chosen - ref_rejected))) of sums of log-probabilities.
    The logits and their derivative by the parameters come from the forward pass; the rest is PyTorch's."""
    torch = pytest.importorskip("torch")
    cfg, params, before = cases[case]
    batch = with_reference(cfg, batch_of(prepared), before)
    loss, shown, grads = gradient(cfg, "one", params, batch)
    mesh = mesh_of("one")
    trained = {path for path in flat(params) if ".lora." in path or case == "all"}
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        wide = on_mesh(batch, mesh).widened()

        def logits(part: dict):
            own = traverse_util.unflatten_dict(flat_jax(params) | part, sep=".")
            out = forward(program, own, wide)
            return (out.hidden @ out.table.T)[..., : cfg.model.vocab_size]

        of_model, backward = jax.vjp(logits, {path: flat_jax(params)[path] for path in trained})
        of_reference = logits(flat_jax(before))
    policy = torch.tensor(np.asarray(of_model, np.float64), requires_grad=True)
    reference = torch.tensor(np.asarray(of_reference, np.float64))
    targets = torch.tensor(batch.targets.astype(np.int64))
    masks = [torch.tensor((batch.segment_ids == i) & batch.loss_weights) for i in (1, 2)]

    def sums(x):
        logps = x.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return [(logps * mask).sum(-1) for mask in masks]

    (chosen, rejected), (ref_chosen, ref_rejected) = sums(policy), sums(reference)
    margins = BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5) and abs(loss - np.log(2)) > 0.01
    assert shown["margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert shown["accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    (of_part,) = backward(policy.grad.numpy().astype(np.float32))
    assert grads.keys() == trained
    for path in trained:
        assert np.linalg.norm(grads[path] - of_part[path]) < 2e-5 * np.linalg.norm(of_part[path])


def flat_jax(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep=".")


@pytest.mark.parametrize("case", ["adapters", "all"])
@pytest.mark.parametrize(("name", "accum"), [("one", 2), ("mixed", 2), ("context", 1), ("data", 1)])
def test_it_is_the_same_on_every_mesh_and_in_microbatches(prepared, cases, case, name, accum):
    cfg, params, before = cases[case]
    batch = batch_of(prepared)
    batch = batch.replace(loss_weights=batch.loss_weights & (np.arange(ROWS) != 5)[:, None])  # a row without a pair
    batch = with_reference(cfg, batch, before)
    if case == "all":
        np.testing.assert_allclose(log_ratios(cfg, name, before, batch), batch.reference[:, 0], rtol=1e-5, atol=1e-4)
    loss, shown, grads = gradient(cfg, "one", params, batch)
    other_loss, other_shown, other = gradient(dataclasses.replace(cfg, grad_accum_steps=accum), name, params, batch)
    assert other_loss == pytest.approx(loss, rel=1e-5) and other_shown == pytest.approx(shown, abs=1e-4)
    assert all(np.linalg.norm(other[path] - grads[path]) < 2e-5 * np.linalg.norm(grads[path]) for path in grads)


def test_each_row_has_its_own_reference_in_every_epoch_and_of_every_source(prepared, model, tmp_path):
    prepare(write(tmp_path / "p.jsonl", records(30)), model, tmp_path / "more", val_fraction=0.0)
    sources_ = chats_test.open_(f"{prepared},{tmp_path / 'more'}", seq_len=T)
    files = sources_.files("train")
    for number, of_source in enumerate(files.values()):
        of_source.reference = 1000 * number + np.arange(of_source.index.rows, dtype=np.float32)
    windows = loader.MixedWindows(files, sources_.stages, seq_len=T, seed=3, packings=sources_.packings)
    in_order = [loader.ChatWindows(f, f.index, seed=0, shuffled=False) for f in files.values()]
    g = np.arange(3 * sum(f.index.rows for f in files.values()))
    found = windows.reference(g)
    for tokens, value in zip(windows.rows(g), found.astype(int), strict=True):
        assert np.array_equal(tokens, in_order[value // 1000].rows(np.array([value % 1000]))[0])
    assert len(set(found)) == sum(f.index.rows for f in files.values())
    (train, *_), (val, *_) = files.values(), sources_.files("val").values()
    val.index = dataclasses.replace(val.index, sha256=train.index.sha256)  # as of splits whose pairs have equal lengths
    assert reference.path_of(tmp_path, train) != reference.path_of(tmp_path, val)


def test_without_adapters_the_loss_is_ln_2_and_validation_is_the_mean_over_pairs(prepared, params):
    cfg, mesh = config_of(prepared), mesh_of("mixed")
    files = chats_test.open_(prepared, seq_len=T).files("val")
    found = []
    for at in (preference.reference(params), params):
        with jax.set_mesh(mesh):
            program = Program(cfg, mesh)
            there = jax.device_put(at, jax.tree.map(lambda leaf: leaf.sharding, program.params))
            batch_sharding = sharding.named(mesh, "batch")
            found.append(
                evaluate(make_eval_step(program), there, files, cfg, batch_sharding=batch_sharding, num_windows=0)
            )
    assert found[0] == {"val/loss": pytest.approx(np.log(2), rel=1e-6)} and found[1].keys() == {"val/loss"}
    (of_source,) = files.values()
    windows = loader.ChatWindows(of_source, of_source.index, seed=0, shuffled=False)
    g = np.arange(windows.num_windows)
    batch = from_tokens(windows.rows(g), loss_mask=windows.loss_mask(g), begins=windows.begins(g))
    whole = gradient(dataclasses.replace(cfg, global_batch_size=len(g)), "one", params, batch)[0]
    assert len(g) > 3 and found[1]["val/loss"] == pytest.approx(whole, rel=1e-5)


# The whole path


ADAPTERS = {"model__lora__rank": 4, "optimizer__peak_lr": 0.02}


@pytest.mark.parametrize(
    "trained", [{"optimizer__peak_lr": 0.003}, pytest.param(ADAPTERS, marks=pytest.mark.slow)], ids=["all", "adapters"]
)
def test_a_preference_is_learned_killed_and_resumed(model, tmp_path, trained):
    """The preferred answer always says yes; after training, the model prefers it for prompts it has not seen."""
    call, text, hf, dataset, run, whole = (
        finetuning_test.call, *(tmp_path / name for name in ("text", "hf", "pairs", "run", "whole"))
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(runs.text(4000))
    call("launch.prepare", f"--source={tmp_path / 'text.txt'}", f"--tokenizer={model}", f"--out={text}")
    runs.train(tmp_path / "base", text, num_train_steps=2)
    call("launch.convert", f"--workdir={tmp_path / 'base'}", f"--to_hf={hf}")
    (hf / "chat_template.jinja").write_text(chat_models.TEMPLATE)
    made = [{"prompt": f"{i} mesh", "chosen": f"yes token {i % 7}", "rejected": f"no shard {i % 5}"} for i in range(80)]
    source = write(tmp_path / "p.jsonl", made)
    call("launch.prepare", f"--source={source}", f"--tokenizer={hf}", "--format=preference", f"--out={dataset}")
    call("launch.pack", str(dataset), f"--seq_len={T}")
    fields = {
        "init_from": hf, "num_train_steps": 20, "data__packed": "true", "data__mask_documents": "true",
        "data__seq_len": T, "eval__every_steps": 10, "checkpoint__every_steps": 4,
        "optimizer__warmup_steps": 2, "eval__num_windows": 0, "dpo__beta": 1.0, **trained,
    }  # fmt: skip
    assert "is for dpo; leave it out" in runs.train(run, dataset, code=2, **fields, task="sft")
    runs.train(whole, dataset, **fields)
    rows = runs.rows(whole)
    first, last = ([row for row in rows if "train/loss" in row][i] for i in (0, -1))
    assert first["train/loss"] == pytest.approx(np.log(2), rel=1e-5) and abs(first["train/margin"]) < 1e-5
    assert last["train/accuracy"] == 1
    assert [row["val/loss"] for row in rows if "val/loss" in row][-1] < 0.1
    runs.train_through_a_kill(run, dataset, count=12, **fields)
    assert runs.losses(run) == runs.losses(whole)
    evaluated = json.loads(call("launch.evaluate", f"--workdir={run}", "--json").splitlines()[-1])
    assert evaluated["val/loss"] == pytest.approx([row["val/loss"] for row in rows if "val/loss" in row][-1], rel=1e-5)
    call("launch.sample", f"--workdir={run}", "--chat", "--prompt=3 mesh", "--max_new_tokens=4")
    assert json.loads((run / "config.json").read_text())["task"] == "dpo"
    if trained is ADAPTERS:
        assert not (run / "reference").exists()
        return
    before = {path.name: path.read_bytes() for path in (run / "reference").iterdir()}
    assert len(before) == 2 and before == {path.name: path.read_bytes() for path in (whole / "reference").iterdir()}
    for name, content in before.items():
        (run / "reference" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = runs.finish(runs.start([sys.executable, "-m", "launch.evaluate", f"--workdir={run}"]), code=2)
    assert "what the first weights say about the pairs, is damaged" in said.splitlines()[-1]
    assert "is damaged; the next start" in runs.train(run, dataset, **fields | {"num_train_steps": 21})
    assert before == {path.name: path.read_bytes() for path in (run / "reference").iterdir()}
    shutil.rmtree(run / "reference")
    weights = safetensors.numpy.load_file(hf / "model.safetensors")
    weights = {name: x + np.float32(0.01) for name, x in weights.items()}
    safetensors.numpy.save_file(weights, hf / "model.safetensors", {"format": "pt"})
    said = runs.train(run, dataset, code=2, **fields | {"num_train_steps": 22})
    assert "began with other weights than config.init_from" in said and not (run / "reference").exists()
