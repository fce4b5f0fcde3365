"""Damaged files give the exact state or a one-line error, never a traceback, a hang, or another state."""

import contextlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch import cli
from tests.checkpoint_test import KEEP_ALL, assert_same
from tests.step_test import config, mesh_of
from trainer.config import Config, to_json
from trainer.errors import CheckpointError, ConfigError
from trainer.reliability import run_directory
from trainer.reliability.checkpoint import METADATA_FILE, Checkpoints
from trainer.reporting.metrics import cut_rows_after, evaluations, was_sampled
from trainer.state import Program

META = {"samples": 112, "data_fingerprint": "0123456789abcdef"}
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)  # Orbax raises these
quickly = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def program():
    return Program(config(), mesh_of("one"))


@pytest.fixture(scope="module")
def state(program):
    return program.init()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    run = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(run, KEEP_ALL)
    checkpoints.save(7, state, META)
    assert checkpoints.wait()
    return run


def damage(raw: bytes, random: np.random.Generator) -> bytes:
    kind, at = random.integers(5), int(random.integers(len(raw))) if raw else 0
    if kind == 0:  # flips a bit
        return raw[:at] + bytes([raw[at] ^ 1 << int(random.integers(8))]) + raw[at + 1 :] if raw else b"x"
    if kind == 1:  # cuts the end off
        return raw[:at]
    if kind == 2:  # clears a page, as if it was never written
        return raw[:at] + bytes(len(raw[at : at + 512])) + raw[at + 512 :]
    if kind == 3:
        return random.bytes(len(raw))
    return raw[:at] + random.bytes(3) + raw[at:]


def check(run: pathlib.Path, program: Program, state) -> bool:
    """Whether the run could be restored; if it could, the state must be exact."""
    try:
        restored, meta = Checkpoints(run).restore(program, 7)
    except (CheckpointError, ConfigError) as e:
        assert len(str(e)) < 1000
        return False
    assert_same(restored, state)
    assert {name: meta[name] for name in META} == META and int(restored.step) == 7
    return True


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_of_a_checkpoint(tmp_path, program, state, saved, seed):
    """Faults 14 and 15: any file has any damage. Files that are not needed, such as commit_success.txt, may hold
    anything."""
    random = np.random.default_rng(seed)
    run = shutil.copytree(saved, tmp_path / "run")
    files = sorted(path for path in (run / "checkpoints/7").rglob("*") if path.is_file())
    path = files[random.integers(len(files))]
    if random.integers(8):
        path.write_bytes(damage(path.read_bytes(), random))
    else:
        path.unlink()
    check(run, program, state)


def test_a_flipped_bit_anywhere_in_what_save_was_given(tmp_path, program, saved):
    """Fault 14: a run that resumed with another number of samples would silently train on other data."""
    random, changed = np.random.default_rng(0), 0
    checkpoints = Checkpoints(shutil.copytree(saved, tmp_path / "run"))
    path = tmp_path / "run/checkpoints/7" / METADATA_FILE
    raw, given_meta = path.read_bytes(), checkpoints.meta(7)
    for at in random.integers(len(raw), size=1000):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << int(random.integers(8))]) + raw[at + 1 :])
        with contextlib.suppress(CheckpointError):
            assert checkpoints.meta(7) == given_meta
            continue
        changed += 1
    assert changed > 500
    path.write_bytes(b'{"custom_metadata": ' + b"[" * 100_000)
    with pytest.raises(CheckpointError):
        checkpoints.meta(7)


@pytest.mark.parametrize("part", ["params/_METADATA", "opt_state/_METADATA"])
def test_damaged_shapes_are_damage_and_not_another_model(tmp_path, program, saved, part):
    """Fault 14: if the damage were taken for another model, it would be the user's error, and the step before would not
    be tried."""
    run = shutil.copytree(saved, tmp_path / "run")
    path = run / "checkpoints/7" / part
    text = path.read_text()
    for old in ('"kernel"', '"scale"', "layers", "embedding"):
        path.write_text(text.replace(old, old.replace("e", "E", 1)))
        with pytest.raises(CheckpointError):
            Checkpoints(run).restore(program, 7)


def test_names_that_are_no_steps(tmp_path, program, state):
    """int() also accepts the digits of other scripts, and 007."""
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    checkpoints.save(7, state, META)
    assert checkpoints.wait()
    for name in ("007", "٣", "²", "-1", "7.old", "8"):
        shutil.copytree(tmp_path / "checkpoints/7", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/9").write_text("a file")
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    assert checkpoints.steps() == [7, 8]
    restored, _ = checkpoints.restore_newest(program)  # the metadata in folder 8 says step 7
    assert int(restored.step) == 7


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def reads(raw: bytes, run: pathlib.Path) -> None:
    (run / "config.json").write_bytes(raw)
    with contextlib.suppress(ConfigError):
        assert isinstance(run_directory.read_config(run), Config)


@quickly
@given(st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode()))
@example(b"[" * 100_000)
@example(b'{"model": []}')
@example(b'{"seed": 1e400}')
def test_any_bytes_as_the_configuration_of_a_run(tmp_path, raw):
    reads(raw, tmp_path)


@quickly
@given(st.integers(0, 2**32))
def test_a_damaged_configuration_of_a_run(tmp_path, seed):
    reads(damage(to_json(Config()).encode(), np.random.default_rng(seed)), tmp_path)


FIELDS = [f"{section}.{name}" for section, part in json.loads(to_json(Config())).items() if isinstance(part, dict)
          for name in part] + ["seed", "num_train_steps", "grad_accum_steps", "nothing"]  # fmt: skip


@quickly
@given(st.sampled_from(FIELDS), JSON)
def test_any_value_in_any_field(tmp_path, field, value):
    tree = json.loads(to_json(Config()))
    section, _, name = field.rpartition(".")
    (tree[section] if section else tree)[name] = value
    reads(json.dumps(tree).encode(), tmp_path)
    tree[section or "seed"] = value
    reads(json.dumps(tree).encode(), tmp_path)


@quickly
@given(st.sampled_from(FIELDS), st.text(max_size=8))
def test_any_text_as_a_field_on_the_command_line(field, text):
    """Tests the check of --config.FIELD=TEXT, which runs before absl parses the flag."""
    with contextlib.suppress(ConfigError):
        _, overrides = cli._split_overrides([f"--config.{field}={text}"])
        assert list(overrides) == [field]


@pytest.mark.parametrize(
    "recipe",
    [b"", b"\0", b"\xff\xfe", b"def get_config(): return 1 / 0", b"def get_config(): return 3", b"get_config = 3",
     b"def get_config(: pass", b"import nothing_of_this_name"],
)  # fmt: skip
def test_any_file_as_a_recipe(tmp_path, recipe):
    path = tmp_path / "recipe.py"
    path.write_bytes(recipe)
    with contextlib.suppress(ConfigError):
        found = cli.load_recipe(str(path)).config
        assert not isinstance(found, Config)


ROWS = st.one_of(
    st.binary(max_size=20),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda step, value: json.dumps({"step": step, "val/loss": value}).encode(), JSON, JSON),
    st.integers(0, 9).map(lambda step: json.dumps({"step": step, "text": "a\u2028\x85b"}, ensure_ascii=False).encode()),
)


@quickly
@given(st.lists(ROWS, max_size=8), st.booleans())
@example([b"[" * 100_000], True)
def test_any_bytes_as_metrics(tmp_path, lines, whole):
    """Faults 1 and 12: rows up to the step stay byte for byte; anything that is not a row is removed."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines)[: None if whole else -3])
    evaluations(tmp_path, 3)
    (tmp_path / "samples.jsonl").write_bytes(path.read_bytes())
    was_sampled(tmp_path, 3)
    before = path.read_bytes().split(b"\n")[:-1]
    cut_rows_after(path, 3)
    after = path.read_bytes()
    assert after == b"" or after.endswith(b"\n")
    rows = [json.loads(line) for line in after.split(b"\n")[:-1]]
    assert all(row["step"] <= 3 for row in rows)
    good = [line for line in before if line in lines and line.startswith(b'{"step": ') and b'"text"' in line]
    assert [line for line in after.split(b"\n") if line in good] == [line for line in good if _step(line) <= 3]
    assert cut_rows_after(path, 3) == 0


def _step(line: bytes) -> int:
    return json.loads(line)["step"]
