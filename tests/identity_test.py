"""A run is identified by its data, tokenizer and model: none of its files changes before these are compared."""

import dataclasses
import json
import shutil

import pytest

from data import sources, tokenizers
from tests import runs
from trainer.config import from_dict, to_json
from trainer.errors import ConfigError
from trainer.reliability import identity, run_directory
from trainer.reliability.reading import Damaged
from trainer.reliability.restarts import METADATA_FILE


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = runs.dataset(tmp_path_factory.mktemp("data"))
    return run_directory.resolve(from_dict({"data": {"path": str(data), "seq_len": 16}}))


@pytest.fixture(scope="module")
def data(config):
    return sources.open_sources(config.data)


@pytest.fixture
def meta(config, data):
    return {
        "samples": 100,
        "data_fingerprint": data.fingerprint(),
        "tokenizer_sha256": identity.tokenizer_sha256(data.load_tokenizer()),
        "config": json.loads(to_json(config)),
    }


def other(data, tokenizer):
    return dataclasses.replace(
        data, tokenizer_source=dataclasses.replace(data.tokenizer_source, load_tokenizer=lambda: tokenizer)
    )


def test_the_same_run_goes_on(config, data, meta):
    identity.check(meta, config, data, "run")
    del meta["tokenizer_sha256"]  # an earlier version did not write it
    identity.check(meta, config, data, "run")
    identity.check(meta, config, other(data, None), "run")


def test_another_tokenizer_is_refused_and_one_may_be_added(config, data, meta):
    another = tokenizers.ByteTokenizer()
    for tokenizer, said in ((another, "but this one is"), (None, "none is named here")):
        with pytest.raises(ConfigError, match=said):
            identity.check(meta, config, other(data, tokenizer), "run")
    meta["tokenizer_sha256"] = None
    identity.check(meta, config, other(data, another), "run")


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("data_fingerprint", "0" * 16, "another dataset"),
        ("config", {"model": {"num_layers": 9}}, "num_layers: 9 -> 4"),
        ("config", {"data": {"seq_len": 99}}, "seq_len: 99 -> 16"),
    ],
)
def test_another_run_is_refused(config, data, meta, field, value, said):
    if field == "config":
        (section, fields), changed = next(iter(value.items())), meta["config"]
        value = changed | {section: changed[section] | fields}
    with pytest.raises(ConfigError, match=said):
        identity.check(meta | {field: value}, config, data, "run")


def test_a_tokenizer_that_was_copied_is_the_same(tmp_path, data):
    """This holds for any kind of tokenizer, including one with its own file."""
    source = tmp_path / "text.txt"
    source.write_text(runs.text(5000))
    kinds = [data.load_tokenizer(), tokenizers.ByteTokenizer(), tokenizers.train_bpe([runs.text(5000)], 300)]
    prints = set()
    for i, tokenizer in enumerate(kinds):
        tokenizers.save(tokenizer, tmp_path / str(i))
        copy = tokenizers.load(tmp_path / str(i))
        assert identity.tokenizer_sha256(copy) == identity.tokenizer_sha256(tokenizer)
        prints.add(identity.tokenizer_sha256(tokenizer))
    assert len(prints) == 3


def write(folder, meta):
    folder.mkdir(parents=True)
    (folder / METADATA_FILE).write_text(json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}}))


def test_the_newest_meta_that_is_whole(tmp_path):
    assert identity.newest_meta(tmp_path / "checkpoints") is None
    for step in (9, 10, 100):
        write(tmp_path / "checkpoints" / str(step), {"step": step})
    for name in ("200.orbax-checkpoint-tmp", "quarantine", "0300"):
        write(tmp_path / "checkpoints" / name, {"step": 200})
    assert identity.newest_meta(tmp_path / "checkpoints") == {"step": 100}
    path = tmp_path / "checkpoints/100" / METADATA_FILE
    path.write_text(path.read_text().replace("100", "101"))
    with pytest.raises(Damaged, match="digest"):
        identity.read_meta(path.parent)
    assert identity.newest_meta(tmp_path / "checkpoints") == {"step": 10}
    shutil.rmtree(tmp_path / "checkpoints/10")
    (tmp_path / "checkpoints/10").mkdir()
    assert identity.newest_meta(tmp_path / "checkpoints") == {"step": 9}
