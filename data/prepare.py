"""Corpus to dataset folder: plan, survey, tokenizer, units, merge, manifest.

The plan cuts the corpus into units (data/documents.py); workers encode them in any order (data/encode.py); the merge
appends them in the order of the plan (data/merge.py). So the dataset is the same, byte for byte, for any number of
workers, and a preparation that was killed goes on with the units it lacks.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data import corpus, documents, encode, excerpt, files, formats, merge, tokenizers
from data.errors import DataError
from data.pool import Pool

log = logging.getLogger("meshlm")

INLINE_BYTES = 32 << 20  # a corpus up to this size is done in this process: workers take longer to start
SUMMARY = "summary.json"
LOCK = ".lock"
SPLITS = ("auto", "last", "file", "document")

Progress = Callable[[str, int, int, int], None]  # what is being done, bytes done, bytes in all, tokens so far


@dataclasses.dataclass(frozen=True)
class Request:
    """What a dataset is made of and how; two equal requests of the same files give the same bytes.

    `split` says what validates. 'last': the last val_fraction of the characters (bytes for the byte tokenizer), as with
    nanoGPT; 'file': whole files, by a hash of their names; 'document': whole documents, by a hash of their text, so
    that copies of one are on one side; 'auto': 'last' for one file of text, 'file' for several, 'document' where there
    are JSON lines or Parquet. `text_key`: of JSON lines, or the column of Parquet. The rest: see documents.Reading.
    """

    source: str
    tokenizer: str
    val_fraction: float = 0.1
    split: str = "auto"
    text_key: str = "text"
    min_frequency: int = 1
    special_tokens: Sequence[str] = ()
    invalid_utf8: str = "replace"
    bad_records: str = "error"

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"special_tokens": list(self.special_tokens)}


@dataclasses.dataclass(frozen=True)
class Plan:
    request: Request
    units: list[documents.Unit]
    split: str  # 'auto' resolved
    reading: documents.Reading
    eos: bool  # after each document; one text alone has none, as nanoGPT's

    @property
    def bytes(self) -> int:
        return sum(map(documents.bytes_of, self.units))

    def digest(self) -> str:
        """Changes with the request, with any file's name, size or time, and with how they are cut and kept."""
        stats = {s.file.name: s.file.path.stat() for unit in self.units for s in unit}
        written = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
        units = [[(s.file.name, s.start, s.stop, s.split) for s in unit] for unit in self.units]
        plan = [encode.VERSION, self.request.to_json(), written, units]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def prepare(
    out: pathlib.Path,
    *,
    overwrite: bool = False,
    workers: int = 0,
    count_duplicates: bool = False,
    progress: Progress = lambda *args: None,
    **request,
) -> formats.Manifest:
    """Writes the dataset folder `out` and returns its manifest; what was counted on the way: see read_summary.

    The folder appears under its name only when it is complete. A killed run leaves `OUT.partial`, with which the next
    one goes on if it asks for the same of the same files. A folder made by the same request, and whole, is left alone.

    Args:
      workers: processes; 0 for one a core.
      count_duplicates: of documents; the count is in the summary.
      progress: called as units finish.
      request: the fields of Request.

    Raises:
      DataError: the source cannot be used; `out` is no dataset; it is damaged or of another request and `overwrite`
        is false; another process is preparing it; there is no room.
    """
    asked = Request(**request)
    given = None
    if not tokenizers.needs_texts(asked.tokenizer):  # a mistyped one is found before the corpus is looked for
        given = tokenizers.make(asked.tokenizer, special_tokens=asked.special_tokens)
    if out.exists():
        if not formats.is_dataset(out):  # never replaced, whatever the flags
            raise DataError(f"{out} exists and is not a dataset; choose another --out")
        if not overwrite:
            return _intact(out, asked, given)
    plan = make_plan(asked, cache=out.parent)
    partial = out.with_name(out.name + ".partial")
    with _lock(partial), _room(partial):
        _continue_or_clear(partial, plan.digest() + str(count_duplicates))
        many = plan.bytes > INLINE_BYTES
        with Pool(min(workers or os.cpu_count() or 1, len(plan.units)) if many else 1) as pool:
            codec, characters = _tokenizer(partial, plan, pool, progress)
            job = encode.Job(
                partial=partial,
                reading=plan.reading,
                tokenizer_sha256=formats.sha256_file(partial / "tokenizer" / tokenizers.FILE_NAME),
                vocab_size=codec.vocab_size,
                eos_id=codec.eos_id if plan.eos else None,
                split=plan.split,
                val_fraction=asked.val_fraction,
                cut=int(sum(characters) * (1 - asked.val_fraction)),
                hashes=count_duplicates,
            )
            merged = _encode_units(plan, characters, job, pool, progress)
        manifest = _finish(partial, plan, job, merged)
        if out.exists():
            shutil.rmtree(out)
        partial.replace(out)
    return manifest


def read_summary(out: pathlib.Path) -> dict[str, Any]:
    """What `prepare` counted; empty for a dataset of an earlier version, which did not."""
    path = out / SUMMARY
    return json.loads(path.read_bytes()) if path.exists() else {}


def make_plan(request: Request, cache: pathlib.Path) -> Plan:
    """Finds the files and cuts them. Raises DataError. `cache`: where a download is kept."""
    found = corpus.find(request.source, cache)
    one_text = len(found) == 1 and found[0].kind == "text"
    split = request.split
    if split == "auto":
        records = any(file.kind != "text" for file in found)
        split = "document" if records else "last" if one_text else "file"
    of_file = None
    if split == "file":
        train, val = corpus.split(found, request.val_fraction)
        of_file = {file.name: "train" for file in train} | {file.name: "val" for file in val}
    reading = documents.Reading(
        request.text_key, request.invalid_utf8, request.bad_records, raw=request.tokenizer == "byte"
    )
    return Plan(request, documents.plan(found, of_file), split, reading, eos=not one_text)


def _intact(out: pathlib.Path, request: Request, given: tokenizers.Tokenizer | None) -> formats.Manifest:
    """The manifest of the dataset that is there; DataError when it is damaged or was made by another request."""
    manifest = formats.read_manifest(out)
    if manifest.request != request.to_json():
        raise DataError(
            f"{out} was prepared by another request ({manifest.request}); choose another --out, or --overwrite"
        )
    for split in manifest.splits:
        formats.TokenFiles(out, manifest, split)
    codec = tokenizers.load(out / "tokenizer", manifest.tokenizer_sha256)
    if given is not None and given.file() != codec.file():
        raise DataError(
            f"{out} was prepared with another tokenizer than {request.tokenizer} is now; choose another --out, or "
            "--overwrite"
        )
    return manifest


@contextlib.contextmanager
def _lock(partial: pathlib.Path) -> Iterator[None]:
    """One process at a time prepares a dataset."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle, unlocked = files.lock(partial / LOCK)
    except files.Held as e:
        raise DataError(f"{partial} is being written by {e}") from None
    except OSError as e:
        raise DataError(f"cannot write {partial}: {e.strerror}") from None
    with handle:
        if unlocked is not None:
            log.warning("%s cannot be locked (%s); make sure that nobody else prepares it", partial, unlocked.strerror)
        yield


@contextlib.contextmanager
def _room(partial: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(f"cannot write {partial}: {e.strerror}; start the same command again when mended") from None


def _continue_or_clear(partial: pathlib.Path, digest: str) -> None:
    """Keeps what an earlier run of the same plan has done; removes what is of another."""
    path = partial / "plan"
    if not path.exists() or path.read_text() != digest:
        for old in partial.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != LOCK:
                old.unlink()
        files.write_durably(path, digest.encode())
    (partial / "units").mkdir(exist_ok=True)


def _tokenizer(
    partial: pathlib.Path, plan: Plan, pool: Pool, progress: Progress
) -> tuple[tokenizers.Tokenizer, list[int]]:
    """The tokenizer, made or kept from an earlier run, and the characters of each unit (0 where nobody needs them)."""
    counted, folder = partial / "characters.json", partial / "tokenizer"
    if not counted.exists():
        request = plan.request
        shutil.rmtree(folder, ignore_errors=True)
        codec = None
        if request.tokenizer != "char":
            texts = None
            if tokenizers.needs_texts(request.tokenizer):
                texts = excerpt.texts(plan.units, plan.reading, documents.Problems())
                texts = _told(texts, min(excerpt.BYTES, plan.bytes), progress)
            names, frequency = request.special_tokens, request.min_frequency
            codec = tokenizers.make(
                request.tokenizer, texts, special_tokens=names, min_frequency=frequency, eos=plan.eos
            )
        characters, counts = [0] * len(plan.units), np.zeros(tokenizers.CODE_POINTS, np.int64)
        if codec is None or plan.split == "last":
            done = 0
            jobs = ((unit, plan.reading, index) for index, unit in enumerate(plan.units))
            for (unit, _, index), survey in pool.run(encode.survey, jobs):
                characters[index] = survey.characters
                counts[survey.code_points] += survey.counts
                done += documents.bytes_of(unit)
                progress("reading", done, plan.bytes, 0)
        tokenizers.save(codec or _char_tokenizer(plan, counts), folder)
        files.write_durably(counted, json.dumps(characters).encode())
    return tokenizers.load(folder), json.loads(counted.read_bytes())


def _char_tokenizer(plan: Plan, counts: np.ndarray) -> tokenizers.CharTokenizer:
    names = list(plan.request.special_tokens)
    if plan.eos and tokenizers.END_OF_TEXT not in names:
        names.append(tokenizers.END_OF_TEXT)
    return tokenizers.CharTokenizer.of_counts(counts, min_frequency=plan.request.min_frequency, special_tokens=names)


def _told(texts: Iterable[str], total: int, progress: Progress) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text)
        progress("training the tokenizer on", done, total, 0)


def _encode_units(plan: Plan, characters: list[int], job: encode.Job, pool: Pool, progress: Progress) -> merge.Merge:
    """Encodes what is left, and merges meanwhile."""
    before = np.concatenate([[0], np.cumsum(characters)])
    merged = merge.Merge(job.partial, job)
    done = tokens = 0

    def add(index: int, result: dict) -> None:
        nonlocal done, tokens
        merged.add(index, result)
        done += documents.bytes_of(plan.units[index])
        tokens += sum(result["tokens"].values())
        progress("encoding", done, plan.bytes, tokens)

    finished = [encode.finished(job.partial, index) for index in range(len(plan.units))]
    left = [(index, plan.units[index], int(before[index]), job) for index, r in enumerate(finished) if r is None]
    for index, result in enumerate(finished):
        if result is not None:
            add(index, result)
    for (index, *_), result in pool.run(encode.encode, left):
        add(index, result)
    return merged


def _finish(partial: pathlib.Path, plan: Plan, job: encode.Job, merged: merge.Merge) -> formats.Manifest:
    splits, summary = merged.finish()
    manifest = formats.Manifest(
        dtype=job.dtype.name,
        vocab_size=job.vocab_size,
        eos_id=job.eos_id,
        tokenizer_sha256=job.tokenizer_sha256,
        splits=splits,
        request=plan.request.to_json(),
    )
    files.write_durably(partial / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    files.write_durably(partial / formats.MANIFEST, manifest.to_json().encode())
    shutil.rmtree(partial / "units")
    for rest in ("plan", "characters.json", LOCK):
        (partial / rest).unlink()
    return manifest
