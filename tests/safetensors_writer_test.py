"""Files of tensors written piece by piece: the library reads back what was written, and damage is found."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from data.errors import DataError
from model import families
from model.families.layout import Layout
from model.transformer import parameter_shapes
from trainer.errors import CheckpointError, ConfigError
from trainer.interchange import importing, safetensors_writer
from trainer.interchange.folder import INDEX, Folder
from trainer.interchange.safetensors_writer import DTYPES, FolderWriter
from trainer.interchange.source import Source


def random_tensors(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    tensors = {}
    for i in range(12):
        shape = tuple(int(n) for n in draw.integers(1, 9, draw.integers(1, 4)))
        dtype = str(draw.choice(list(DTYPES)))
        tensors[f"t{i}"] = dtype, draw.standard_normal(shape).astype(np.float32).astype(DTYPES[dtype])
    return tensors


@pytest.mark.parametrize("seed", range(5))
def test_the_library_reads_what_was_written_in_any_order(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "BLOCK", 7)  # elements: a tensor has several blocks
    tensors, draw = random_tensors(seed), np.random.default_rng(seed)
    limit = int(draw.integers(40, 4000))
    writer = FolderWriter(tmp_path, {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}, limit)
    for name in draw.permutation(list(tensors)):
        array = tensors[name][1]
        cuts = sorted(draw.integers(0, len(array) + 1, 2))
        writer.write(name, np.split(array, cuts))
    writer.verify()
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {}
    for file in files:
        content = safetensors.numpy.load_file(file)
        assert len(content) == 1 or sum(array.nbytes for array in content.values()) <= limit
        found |= content
    assert found.keys() == tensors.keys()
    for name, (dtype, array) in tensors.items():
        assert found[name].dtype == DTYPES[dtype] and found[name].tobytes() == array.tobytes(), name
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    # Our own reader returns any slice of it.
    (tmp_path / "config.json").write_text("{}")
    opened = Folder(tmp_path)
    for name, (_, array) in tensors.items():
        bounds = [sorted(draw.integers(0, n + 1, 2)) for n in array.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        assert opened.read(name, index).tobytes() == array[index].tobytes(), name


@pytest.mark.parametrize(("value", "dtype"), [
    (np.nan, "float32"), (-np.inf, "bfloat16"), (1e6, "float16"), (3.4e38, "bfloat16"),
])  # fmt: skip
def test_numbers_that_are_not_finite_in_the_dtype_are_refused(value, dtype, tmp_path):
    writer = FolderWriter(tmp_path, {"x": (dtype, (3,))})
    with pytest.raises(ValueError, match=f"x is not finite in {dtype}"):
        writer.write("x", [np.array([1, value, 2], np.float32)])


def flip(path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset, 2)
        byte = f.read(1)[0]
        f.seek(offset, 2)
        f.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_when_the_files_are_read_back(tmp_path):
    writer = FolderWriter(tmp_path, {"x": ("float32", (3, 5)), "y": ("bfloat16", (4,))})
    writer.write("x", [np.ones((3, 5), np.float32)])
    writer.write("y", [np.ones(4, ml_dtypes.bfloat16)])
    writer.verify()
    flip(tmp_path / "model.safetensors", -20)
    with pytest.raises(CheckpointError, match="x is not what was written; check the disk"):
        writer.verify()


def folder_of(path, **changes) -> Source:
    """A small random GPT-2."""
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 70}
    family, model, _ = families.loaded(config)
    shapes = Layout(family, model, parameter_shapes(model)).shapes
    draw = np.random.default_rng(0)
    tensors = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors | changes, path / "model.safetensors")
    return Source.open(path)


def test_a_copy_that_the_disk_has_changed_is_no_run(tmp_path, monkeypatch):
    source, real = folder_of(tmp_path / "model"), FolderWriter.write

    def write(self, name, pieces):
        real(self, name, pieces)
        if name == "transformer.ln_f.bias":  # the last tensor
            flip(next(tmp_path.glob(".run.*")) / "hf/model.safetensors", -5)

    monkeypatch.setattr(FolderWriter, "write", write)
    with pytest.raises(CheckpointError, match="is not what was written"):
        importing.as_run(source, tmp_path / "run", ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_that_change_while_they_are_read_are_no_run(tmp_path, monkeypatch):
    source, real = folder_of(tmp_path / "model"), FolderWriter.write
    other = folder_of(tmp_path / "other").weights.path / "model.safetensors"

    def write(self, name, pieces):
        if name == "transformer.wpe.weight":
            other.replace(tmp_path / "model/model.safetensors")
        real(self, name, pieces)

    monkeypatch.setattr(FolderWriter, "write", write)
    with pytest.raises(DataError, match="was changed while it was read"):
        importing.as_run(source, tmp_path / "run", ["x"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"a": 1}'])
def test_checksums_of_another_program_are_not_ours(content, tmp_path):
    source = folder_of(tmp_path / "model")
    (tmp_path / "model/checksums.json").write_text(content)
    importing.as_run(source, tmp_path / "run", ["x"])
    assert json.loads((tmp_path / "run/hf/checksums.json").read_text())["format"] == "meshlm checksums 1"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    source = folder_of(tmp_path / "model", **{"transformer.ln_f.bias": np.full(16, np.nan, np.float32)})
    with pytest.raises(ConfigError, match=r"ln_f\.bias is not finite in float32; these weights are broken"):
        importing.as_run(source, tmp_path / "run", ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
