"""From a corpus to a dataset folder: plan, survey, tokenizer, units, merge, manifest.

The plan divides the corpus into units (documents.py), workers encode them in any order (encode.py), and the merge
appends them in order (merge.py). So the dataset is the same, byte for byte, for any number of workers, and a
preparation that was killed resumes with the missing units.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.preparation import corpus, documents, encode, merge, spool, tokenizer_sample
from data.preparation.input_errors import InputErrors
from data.preparation.output import CHARACTERS, Output, read_note, start_again
from data.preparation.pool import Pool, cores
from data.storage import files
from data.token_files import formats, integrity
from data.tokenizers.base import check_special_tokens

log = logging.getLogger("meshlm")

INLINE_BYTES = 32 << 20  # a corpus up to this size is prepared in this process: workers take longer to start
SPLITS = ("auto", "last", "file", "document")

PreparationProgress = Callable[
    [str, int, int, int], None
]  # what is being done, bytes done, bytes in all, tokens so far


@dataclasses.dataclass(frozen=True)
class Request:
    """What a dataset is made from, and how; two equal requests for the same files give the same bytes.

    `split` chooses the validation text. 'last': the last val_fraction of the characters (bytes for the byte tokenizer),
    as in nanoGPT; 'file': complete files, by a hash of their names; 'document': complete documents, by a hash of their
    text, so that copies are on the same side; 'auto': 'last' for one text file, 'file' for several, 'document' if there
    are JSON lines or Parquet. `text_key`: the key in JSON lines, or the column of Parquet. `format`: the kind of all
    files, one of recognize.KINDS. documents.ReadOptions explains the other fields.
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
    format: str = "auto"
    template_sha256: str = ""  # of chats: that of the chat template

    def to_json(self) -> dict:
        fields = dataclasses.asdict(self) | {"special_tokens": list(self.special_tokens)}
        return fields if self.template_sha256 else {k: v for k, v in fields.items() if k != "template_sha256"}


Stamp = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class PreparationPlan:
    request: Request
    units: list[documents.WorkUnit]
    split: str  # 'auto' resolved
    options: documents.ReadOptions
    eos: bool  # whether an end-of-text token follows each document; not for a single text, as in nanoGPT
    source: str = ""  # identifies the files of the source
    stamps: dict[pathlib.Path, Stamp] = dataclasses.field(default_factory=dict)  # of the files, before reading
    left_out: InputErrors = dataclasses.field(default_factory=InputErrors)  # files of the source that are not read

    @functools.cached_property
    def bytes(self) -> int:
        return sum(map(documents.bytes_of, self.units))

    def key(self, tokenizer: tokenizers.Tokenizer | None, count_duplicates: bool) -> str:
        """A hash of all that determines the dataset: the request, the content of an existing tokenizer, the files (see
        _stamp), their division into units, and the version of the code.
        """
        given = None
        if tokenizer is not None:
            given = [tokenizer.to_json(), hashlib.sha256((tokenizer.file() or ("", b""))[1]).hexdigest()]
        digest = hashlib.sha256(json.dumps([encode.VERSION, self.request.to_json(), given, count_duplicates]).encode())
        for unit in self.units:
            digest.update(b"unit")
            for s in unit:
                where = [s.file.name, s.start, s.stop, s.split, self.stamps.get(s.file.path)]
                digest.update(json.dumps(where).encode())
        return digest.hexdigest()

    def check_unchanged(self, unit: documents.WorkUnit) -> None:
        """Raises DataError if a file has changed since the plan was made: what was read may be a mixture."""
        for path in {s.file.path for s in unit}:
            if self.stamps.get(path) not in (None, _stamp(path)):
                raise DataError(f"{path} was changed or replaced while it was read; start again when it is stable")


def prepare_dataset(
    out: pathlib.Path,
    *,
    overwrite: bool = False,
    workers: int = 0,
    count_duplicates: bool = False,
    max_invalid: float = 0.01,
    progress: PreparationProgress = lambda *args: None,
    **request,
) -> formats.Manifest:
    """Writes the dataset folder `out` and returns its manifest; read_summary returns the counts.

    The folder gets its name only when it is complete. A preparation that is killed leaves `OUT.partial`, from which the
    next one resumes if its request and files are the same. A complete folder made by the same request is kept.

    Args:
      workers: number of processes; 0: one for each core.
      count_duplicates: count duplicate documents; the number is in the summary.
      max_invalid: the largest share of characters that are NUL, or U+FFFD instead of bytes that are not UTF-8.
      progress: called as units finish.
      request: the fields of Request.

    Raises:
      DataError: the source cannot be used, or changed meanwhile; it has no training text, or too much of it is not
        text; `out` exists and is not a dataset, or is damaged or from another request and `overwrite` is false; another
        process is preparing `out`; the disk is full.
    """
    asked, output = Request(**request), Output(out)
    check_special_tokens(asked.special_tokens)
    found = None if overwrite else existing_dataset(out, **request)
    if found is not None:
        return found
    if not tokenizers.needs_texts(asked.tokenizer):  # a mistyped name is reported before the corpus is searched
        tokenizers.make(asked.tokenizer, special_tokens=asked.special_tokens)
    if pathlib.Path(os.path.realpath(asked.source)).is_relative_to(output.partial):
        raise DataError(f"--source={asked.source} is in the folder in which the dataset is written; move it away")
    plan = make_plan(asked, output.path)
    with output.locked():
        if not overwrite and output.has_dataset():  # another process made it while this one searched the files
            return intact(output.path, asked)
        given = None
        if not tokenizers.needs_texts(asked.tokenizer):
            given = tokenizers.make(asked.tokenizer, special_tokens=asked.special_tokens, eos=plan.eos)
        output.begin(plan.key(given, count_duplicates))
        if not output.is_complete():
            many = plan.bytes > INLINE_BYTES
            with Pool(max(1, min(workers or cores(), len(plan.units))) if many else 1) as pool:
                job, merged = _encode(
                    output.partial, plan, given, pool, count_duplicates=count_duplicates, progress=progress
                )
            _finish(plan, job, merged, max_invalid)
        output.publish()
    return formats.read_manifest(output.path)


def existing_dataset(out: pathlib.Path, **request) -> formats.Manifest | None:
    """The manifest of a complete dataset at `out` that was made by this request; None if there is no dataset yet.

    Raises:
      DataError: `out` is not a dataset, is damaged, or was made by another request.
    """
    output = Output(out)
    if not output.has_dataset() or output.was_interrupted():
        return None
    return intact(output.path, Request(**request))


def read_summary(out: pathlib.Path) -> dict[str, Any]:
    """The counts of the preparation; empty for a dataset of an earlier version. Raises DataError."""
    path, advice = out / formats.SUMMARY, "copy it again or prepare again with --overwrite"
    summary = files.read_json(path, advice) if path.exists() else {}
    if not isinstance(summary, dict):
        raise DataError(f"{path} is damaged; {advice}")
    return summary


def make_plan(request: Request, out: pathlib.Path) -> PreparationPlan:
    """Finds the files and divides them into units; a download is kept beside the dataset `out`. Raises DataError."""
    found, left_out = find(request, out)
    if named := corpus.named_as_held_out(request.source, found):
        log.warning(
            "WARNING: %d file(s) are named as for validation or tests, but are used for training like all others, "
            "except for the share of --val_fraction: %s%s; name the files to train on, for example by a glob",
            len(named), ", ".join(map(repr, named[:3])), " …" if len(named) > 3 else "",
        )  # fmt: skip
    stamps = stamps_of(found)
    one_text = len(found) == 1 and found[0].kind == "text"
    split = request.split
    if split == "auto":
        records = any(file.kind != "text" for file in found)
        split = "document" if records else "last" if one_text else "file"
    of_file = None
    if split == "file":
        train, val = corpus.split_files(found, request.val_fraction)
        of_file = {file.name: "train" for file in train} | {file.name: "val" for file in val}
    options = documents.ReadOptions(
        request.text_key, request.invalid_utf8, request.bad_records, raw=request.tokenizer == "byte"
    )
    units, identity = documents.plan_units(found, of_file), identity_of(found, stamps)
    return PreparationPlan(request, units, split, options, not one_text, identity, stamps, left_out)


def find(request: Request, out: pathlib.Path) -> corpus.Found:
    return corpus.find_files(
        request.source,
        out.parent,
        kind=request.format,
        bad_records=request.bad_records,
        own=Output(out).own,
        tokenizer=tokenizers.file_of(request.tokenizer),
    )


def stamps_of(found: list[corpus.File]) -> dict[pathlib.Path, Stamp]:
    return {file.path: _stamp(file.path) for file in found}


def identity_of(found: list[corpus.File], stamps: dict[pathlib.Path, Stamp]) -> str:
    """A hash of the names, sizes and times of a source's files; moving them to another disk does not change it."""
    content = [(file.name, *stamps[file.path][:2]) for file in found]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stamp(path: pathlib.Path) -> Stamp:
    """A value that changes if a file is written or replaced, even by a file of the same size and modification time, but
    not if the file's disk is mounted at another place."""
    try:
        stat = path.stat()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    if content := spool.content_hash(path):  # each run writes this file again, so its inode and times change
        return (content,)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def intact(out: pathlib.Path, request: Request) -> formats.Manifest:
    """The manifest of an existing dataset. Raises DataError if it is damaged or was made by another request."""
    manifest = formats.read_manifest(out)
    if Request("", "").to_json() | manifest.request != request.to_json():  # an earlier version wrote fewer fields
        raise DataError(
            f"{out} was prepared by another request ({manifest.request}); choose another --out, or --overwrite"
        )
    for split in manifest.splits:
        formats.TokenFiles(out, manifest, split)
    integrity.check_files(out, manifest)
    codec = tokenizers.load(out / "tokenizer", manifest.tokenizer_sha256)
    if not tokenizers.needs_texts(request.tokenizer):
        eos = manifest.eos_id is not None
        now = tokenizers.make(request.tokenizer, special_tokens=request.special_tokens, eos=eos)
        if (now.to_json(), now.file()) != (codec.to_json(), codec.file()):
            raise DataError(
                f"{out} was prepared with a tokenizer that differs from {request.tokenizer}; choose another --out, or "
                "--overwrite"
            )
    recorded = read_summary(out).get("source", "")  # a dataset of an earlier version does not have it
    if recorded and corpus.is_there(request.source):
        found = find(request, out).files
        if identity_of(found, stamps_of(found)) != recorded:
            raise DataError(
                f"{out} was prepared from files that differ from those of --source={request.source} in names, sizes or "
                "times; choose another --out, or --overwrite"
            )
    return manifest


def _encode(
    partial: pathlib.Path,
    plan: PreparationPlan,
    given: tokenizers.Tokenizer | None,
    pool: Pool,
    *,
    count_duplicates: bool,
    progress: PreparationProgress,
) -> tuple[encode.Job, merge.Merge]:
    """Makes the tokenizer, then encodes and merges all units.

    Args:
      given: the tokenizer; None if it will be made from the text.
    """
    codec, characters = _tokenizer(partial, plan, given, pool, progress)
    job = encode.Job(
        partial=partial,
        options=plan.options,
        tokenizer_sha256=formats.sha256_file(partial / "tokenizer" / tokenizers.FILE_NAME),
        vocab_size=codec.vocab_size,
        eos_id=codec.eos_id if plan.eos else None,
        split=plan.split,
        val_fraction=plan.request.val_fraction,
        cut=int(sum(characters) * (1 - plan.request.val_fraction)),
        hashes=count_duplicates,
    )
    return job, _encode_units(plan, characters, job, pool, progress)


def _finish(plan: PreparationPlan, job: encode.Job, merged: merge.Merge, max_invalid: float) -> None:
    """Writes the summary and the manifest. Raises DataError if the corpus turned out to be unusable."""
    splits, summary = merged.finish()
    finish(
        job.partial,
        plan.request,
        summary | {"left_out": plan.left_out.summary(), "source": plan.source},
        errors=merged.errors,
        max_invalid=max_invalid,
        dtype=job.dtype.name,
        vocab_size=job.vocab_size,
        eos_id=job.eos_id,
        tokenizer_sha256=job.tokenizer_sha256,
        splits=splits,
    )


def finish(
    partial: pathlib.Path,
    request: Request,
    summary: dict[str, Any],
    *,
    errors: InputErrors,
    max_invalid: float,
    splits: dict[str, formats.Split],
    **fields: Any,
) -> None:
    """Writes the summary and the manifest of a dataset whose other files are complete.

    Args:
      fields: further fields of the manifest.

    Raises:
      DataError: there is nothing to train on, or too much of the text is invalid.
    """
    source = f"--source={request.source}"
    if not splits["train"].tokens:
        raise DataError(f"{source} holds no text to train on{_problem_list(summary)}")
    if (share := errors.invalid_share) > max_invalid:
        raise DataError(
            f"{source} is not UTF-8 text: {share:.3%} of its characters are invalid{_problem_list(summary)}; "
            f"convert it, for example with iconv, or pass --max_invalid={math.ceil(share * 1000) / 1000:g} (the byte "
            "tokenizer accepts any bytes, except in JSON)"
        )
    files.write_durably(partial / formats.SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    manifest = formats.Manifest(
        splits=splits,
        request=request.to_json(),
        files=formats.hash_files(partial, splits),
        loses_text=summary["loses_text"],
        **fields,
    )
    files.write_durably(partial / formats.MANIFEST, manifest.to_json().encode())


def _problem_list(summary: dict[str, Any]) -> str:
    """The input errors, with the first place of each kind."""
    problems = summary["problems"]
    counts = [f"{kind}: {n}, first in {problems['examples'][kind][0]}" for kind, n in problems["counts"].items()]
    if summary["documents"] and not counts:
        advice = "lower --val_fraction or choose another --split"
        counts = [f"all {summary['documents']} document(s) are for validation; {advice}"]
    return f" ({'; '.join(counts)})" if counts else ""


def notices(manifest: formats.Manifest) -> list[str]:
    """Warnings about the validation split; the dataset can be used in spite of them."""
    wanted = manifest.request.get("val_fraction", 0)
    train, val = (manifest.splits[split].text_bytes for split in encode.SPLITS)
    if not wanted:
        return []
    if not manifest.splits["val"].tokens:
        divides = "" if manifest.loss_masks else ", or choose --split=last, which divides the text itself"
        return [
            f"there is no validation text although --val_fraction is {wanted:g}: there are few documents; raise it"
            f"{divides}"
        ]
    if manifest.loss_masks:  # their shares are in the line with the tokens
        return []
    share = val / max(train + val, 1)
    if wanted / 2 <= share <= wanted * 2:
        return []
    return [
        f"{share:.1%} of the text is for validation although --val_fraction is {wanted:g}: documents or files are not "
        "divided, and there are few, or one is large; --split=last divides the text itself"
    ]


def _tokenizer(
    partial: pathlib.Path,
    plan: PreparationPlan,
    codec: tokenizers.Tokenizer | None,
    pool: Pool,
    progress: PreparationProgress,
) -> tuple[tokenizers.Tokenizer, list[int]]:
    """The tokenizer, made now or by an earlier run, and the number of characters of each unit (0 if not needed)."""
    counted, folder = partial / CHARACTERS, partial / "tokenizer"
    if not counted.exists():
        request = plan.request
        if codec is None and request.tokenizer != "char":
            texts = tokenizer_sample.texts(plan.units, plan.options, documents.InputErrors())
            codec = tokenizers.make(
                request.tokenizer,
                _with_progress(texts, min(tokenizer_sample.BYTES, plan.bytes), progress),
                special_tokens=request.special_tokens,
                min_frequency=request.min_frequency,
                eos=plan.eos,
            )
        characters, counts = [0] * len(plan.units), np.zeros(tokenizers.CODE_POINTS, np.int64)
        if codec is None or plan.split == "last":
            done = 0
            jobs = ((unit, plan.options, index) for index, unit in enumerate(plan.units))
            for (unit, _, index), survey in pool.run(encode.survey_unit, jobs):
                plan.check_unchanged(unit)
                characters[index] = survey.characters
                counts[survey.code_points] += survey.counts
                done += documents.bytes_of(unit)
                progress("reading", done, plan.bytes, 0)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was killed while it wrote the tokenizer leaves a folder
        tokenizers.save(codec or _char_tokenizer(plan, counts), folder)
        for path in (*folder.iterdir(), folder):
            files.sync(path)
        files.write_durably(counted, json.dumps(characters).encode())
    characters = read_note(counted)
    if not isinstance(characters, list) or len(characters) != len(plan.units):
        raise DataError(f"{counted} is damaged; {start_again(partial)}")
    return tokenizers.load(folder), characters


def _char_tokenizer(plan: PreparationPlan, counts: np.ndarray) -> tokenizers.CharTokenizer:
    names = list(plan.request.special_tokens)
    if plan.eos and tokenizers.END_OF_TEXT not in names:
        names.append(tokenizers.END_OF_TEXT)
    return tokenizers.CharTokenizer.of_counts(counts, min_frequency=plan.request.min_frequency, special_tokens=names)


def _with_progress(texts: Iterable[str], total: int, progress: PreparationProgress) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text)
        progress("training the tokenizer on", done, total, 0)


def _encode_units(
    plan: PreparationPlan, characters: list[int], job: encode.Job, pool: Pool, progress: PreparationProgress
) -> merge.Merge:
    """Encodes the remaining units, and merges them as they finish."""
    before = np.concatenate([[0], np.cumsum(characters)])
    merged = merge.Merge(job.partial, job)
    done = sum(map(documents.bytes_of, plan.units[: merged.next]))
    tokens = merged.tokens

    def add(index: int, result: dict) -> None:
        nonlocal done, tokens
        plan.check_unchanged(plan.units[index])
        merged.add(index, result)
        done += documents.bytes_of(plan.units[index])
        tokens += sum(result["tokens"].values())
        progress("encoding", done, plan.bytes, tokens)

    finished = {index: encode.finished_unit(job, index) for index in range(merged.next, len(plan.units))}
    left = [(index, plan.units[index], int(before[index]), job) for index, r in finished.items() if r is None]
    for index, result in finished.items():
        if result is not None:
            add(index, result)
    for (index, *_), result in pool.run(encode.encode_unit, left):
        add(index, result)
    return merged
