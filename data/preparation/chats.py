"""From JSON lines with chats to a dataset folder: tokens, where each chat begins, and which tokens are supervised.

A line is {"messages": [{"role": …, "content": …}, …]}, or {"prompt": …, "completion": …}: a message of the user and one
of the assistant. A line of preferences is {"prompt": …, "chosen": …, "rejected": …}, each a text or a list of messages;
without a prompt, the other two are whole chats. It becomes two chats, of which only what follows their common beginning
is supervised: the rest would cancel out.

The chat template of a model turns a chat into tokens (data/tokenizers/chat.py). Chats are few compared with the text of
a pretraining corpus, so one process reads them, and a preparation that was killed starts again.
"""

import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.preparation import corpus, documents, pipeline, recognize
from data.preparation.encode import SPLITS
from data.preparation.input_errors import InputErrors, Place
from data.preparation.merge import SHARD_TOKENS
from data.preparation.output import Output
from data.storage import files
from data.token_files import formats
from data.tokenizers.chat import Message, Supervised, Template

VERSION = 1  # part of the key of an unfinished dataset
ROLES = ("system", "developer", "user", "assistant", "tool")
PROGRESS_CHATS = 64  # chats between two reports


def prepare_chats(
    out: pathlib.Path,
    template: Template,
    *,
    overwrite: bool = False,
    max_invalid: float = 0.01,
    progress: pipeline.PreparationProgress = lambda *args: None,
    **request: Any,
) -> formats.Manifest:
    """Writes the dataset folder `out` and returns its manifest; pipeline.read_summary returns the counts.

    Chats are divided between the splits by a hash of their text.

    Args:
      max_invalid, progress, request: as in pipeline.prepare_dataset; `format` is 'chat', and `template_sha256` that of
        the template.

    Raises:
      DataError: as pipeline.prepare_dataset; or a record is not a chat, and `bad_records` is 'error'.
    """
    asked, output = pipeline.Request(**request), Output(out)
    found = None if overwrite else pipeline.existing_dataset(out, **request)
    if found is not None:
        return found
    source = pipeline.find(asked, output.path)
    stamps = pipeline.stamps_of(source.files)
    identity = pipeline.identity_of(source.files, stamps)
    with output.locked():
        if not overwrite and output.has_dataset():  # another process made it while this one searched the files
            return pipeline.intact(output.path, asked)
        output.begin(_key(asked, template, [[file.name, *stamps[file.path]] for file in source.files]))
        if not output.is_complete():
            reader = _Reader(asked, template)
            writers = {split: _Writer(output.partial, split, template.tokenizer.vocab_size) for split in SPLITS}
            _write(source.files, reader, writers, progress)
            if pipeline.stamps_of(source.files) != stamps:
                raise DataError(f"--source={asked.source} was changed while it was read; start again when it is stable")
            about_source = {"left_out": source.left_out.summary(), "source": identity}
            _finish(output.partial, asked, reader, writers, max_invalid=max_invalid, **about_source)
        output.publish()
    return formats.read_manifest(output.path)


def _key(request: pipeline.Request, template: Template, source: list[list[Any]]) -> str:
    """A hash of all that determines the dataset."""
    tokenizer = template.tokenizer
    file = hashlib.sha256((tokenizer.file() or ("", b""))[1]).hexdigest()
    determined = [VERSION, request.to_json(), tokenizer.to_json(), file, source]
    return hashlib.sha256(json.dumps(determined).encode()).hexdigest()


def _write(
    source: list[corpus.File], reader: "_Reader", writers: dict[str, "_Writer"], progress: pipeline.PreparationProgress
) -> None:
    size, done, tokens = sum(file.size() for file in source), 0, 0
    for file in source:
        for number, (place, chats) in enumerate(reader.records(file)):
            if (made := reader.tokens(chats, place)) is not None:
                writers[reader.split(chats)].add(made)
                tokens += sum(len(chat.ids) for chat in made)
            if number % PROGRESS_CHATS == 0:
                progress("encoding", done + reader.bytes, size, tokens)
        done += file.size()


def _finish(
    partial: pathlib.Path,
    request: pipeline.Request,
    reader: "_Reader",
    writers: dict[str, "_Writer"],
    *,
    max_invalid: float,
    **about_source: Any,
) -> None:
    """Writes what belongs to both splits. Raises DataError if the source cannot be used."""
    tokenizer = reader.template.tokenizer
    shutil.rmtree(partial / "tokenizer", ignore_errors=True)  # left by a preparation that was killed
    saved = tokenizers.save(tokenizer, partial / "tokenizer")
    splits = {split: writer.close() for split, writer in writers.items()}
    summary = {
        "documents": sum(split.documents for split in splits.values()),
        "tokens": sum(split.tokens for split in splits.values()),
        "supervised_tokens": {split: writer.supervised for split, writer in writers.items()},
        "bytes_per_token": None,
        "longest_document_tokens": max(writer.longest for writer in writers.values()),
        "loses_text": False,
        "problems": reader.errors.summary(),
        **about_source,
    }
    pipeline.finish(
        partial,
        request,
        summary,
        errors=reader.errors,
        max_invalid=max_invalid,
        splits=splits,
        dtype=formats.token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eos_id=None,  # a template's own tokens end a chat
        tokenizer_sha256=formats.sha256_file(saved),
        loss_masks={split: formats.sha256_file(formats.loss_mask_path(partial, split)) for split in splits},
        pairs=reader.pairs,
    )


class _Reader:
    """Reads the chats of files and counts what is wrong with them."""

    def __init__(self, request: pipeline.Request, template: Template):
        self.options = documents.ReadOptions("messages", request.invalid_utf8, request.bad_records)
        self.val_fraction = request.val_fraction
        self.pairs = request.format == recognize.PREFERENCE
        self.template = template
        self.errors = InputErrors()
        self.bytes = 0  # of the current file that were read, about

    def records(self, file: corpus.File) -> Iterator[tuple[Place, list[list[Message]]]]:
        """The chats of each record of a file, one or a pair, and the record's place."""
        self.bytes = 0
        for place, record in documents.read_records(file, self.options, self.errors):
            try:
                chats = list(pair_of(record)) if self.pairs else [messages_of(record)]
            except ValueError as e:
                self._bad(f"record that is not a {'pair of chats' if self.pairs else 'chat'}", place, str(e))
                continue
            for message in itertools.chain(*chats):
                message["content"] = documents.whole(message["content"], place, self.options, self.errors)
                self.errors.characters += len(message["content"])
                self.bytes += len(message["content"])
            yield place, chats

    def tokens(self, chats: list[list[Message]], place: Place) -> list[Supervised] | None:
        """The chats of a record as tokens, each with a supervised one; None, after counting, for another record."""
        try:
            made = [self.template.supervised(messages) for messages in chats]
        except DataError as e:
            self._bad("chat that the template cannot be used for", place, str(e))
            return None
        for note in sorted({note for chat in made for note in chat.notes}):
            self.errors.record(note, place)
        if self.pairs:
            made = without_common_beginning(*made)
        if not all(chat.mask[1:].any() for chat in made):
            same = self.pairs and len({chat.ids.tobytes() for chat in made}) == 1
            why = "chosen and rejected are the same" if same else "its answers have no tokens"
            self._bad("chat without a supervised token", place, why)
            return None
        return made

    def split(self, chats: list[list[Message]]) -> str:
        """By a hash of the text, so that copies are on the same side; of pairs, by the messages that they share."""
        chosen, other = chats[0], chats[-1]
        shared = [m for m, n in zip(chosen, other, strict=False) if m == n]
        raw = json.dumps([[m["role"], m["content"]] for m in shared]).encode()
        number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        return "val" if number < self.val_fraction * 2**64 else "train"

    def _bad(self, kind: str, place: Place, note: str) -> None:
        documents.bad(kind, place._replace(note=note), self.options, self.errors)


def messages_of(record: Any) -> list[Message]:
    """The messages of a record in one of the two forms. Raises ValueError, which says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__} and not an object")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        if not isinstance(record["prompt"], str) or not isinstance(record["completion"], str):
            raise ValueError("prompt and completion must be texts; write other chats as messages")
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    else:
        keys = ", ".join(sorted(map(str, record))[:8])
        raise ValueError(f"neither messages nor prompt and completion; it has: {keys}")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    for i, message in enumerate(messages, 1):
        _check_message(i, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("it has no message of the assistant")
    return [dict(message) for message in messages]


def pair_of(record: Any) -> tuple[list[Message], list[Message]]:
    """The chosen and the rejected chat of a record. Raises ValueError, which says what is wrong."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        keys = ", ".join(sorted(map(str, record))[:8]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"it needs chosen and rejected; it has: {keys}")
    prompt = record.get("prompt")
    before = [] if prompt is None else _as_messages(prompt, "prompt", "user")
    chosen, rejected = (_as_messages(record[name], name, "assistant") for name in ("chosen", "rejected"))
    if before and chosen[: len(before)] == before and rejected[: len(before)] == before and len(chosen) > len(before):
        before = []  # they repeat the prompt
    return messages_of({"messages": before + chosen}), messages_of({"messages": before + rejected})


def _as_messages(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}; it must be a text or a list of messages")
    return value


def without_common_beginning(chosen: Supervised, rejected: Supervised) -> list[Supervised]:
    """The pair, with its common first tokens not supervised."""
    n = min(len(chosen.ids), len(rejected.ids))
    differs = np.flatnonzero(chosen.ids[:n] != rejected.ids[:n])
    common = int(differs[0]) if differs.size else n
    return [chat._replace(mask=chat.mask & (np.arange(len(chat.mask)) >= common)) for chat in (chosen, rejected)]


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"message {number} is not an object with role and content")
    if message["role"] not in ROLES:
        raise ValueError(f"message {number} has the role {message['role']!r}; roles are {', '.join(ROLES)}"[:200])
    if not isinstance(message["content"], str):
        raise ValueError(f"the content of message {number} is {type(message['content']).__name__} and not a text")
    if others := sorted(set(message) - {"role", "content"}):
        raise ValueError(f"message {number} has {others[0]!r}, which would be ignored; leave it out")


class _Writer:
    """Writes the files of one split. A shard ends between two chats."""

    def __init__(self, folder: pathlib.Path, split: str, vocab_size: int):
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        self.dtype = np.dtype(formats.token_dtype(vocab_size)).newbyteorder("<")
        self.begins: list[int] = []
        self.lengths: list[int] = []  # of the shards
        self.tokens = self.supervised = self.longest = 0
        self._mask: IO[bytes] = formats.loss_mask_path(folder, split).open("wb")
        self._file = self._open_shard()

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{self.split}-{number:05d}.bin"

    def _open_shard(self) -> IO[bytes]:
        self.lengths.append(0)
        return self._path(len(self.lengths) - 1).open("wb")

    def add(self, chats: list[Supervised]) -> None:
        """Writes the chats of a record, to the same shard."""
        if self.lengths[-1] and self.lengths[-1] + sum(len(chat.ids) for chat in chats) > SHARD_TOKENS:
            files.close_durably(self._file)
            self._file = self._open_shard()
        for chat in chats:
            self._add(chat)

    def _add(self, chat: Supervised) -> None:
        if (largest := int(chat.ids.max())) >= self.vocab_size:
            raise DataError(
                f"the template makes token {largest}, outside the tokenizer's vocabulary of {self.vocab_size}"
            )
        self._file.write(chat.ids.astype(self.dtype).tobytes())
        self._mask.write(chat.mask.astype(np.uint8).tobytes())
        self.begins.append(self.tokens)
        self.lengths[-1] += len(chat.ids)
        self.tokens += len(chat.ids)
        self.supervised += int(chat.mask.sum())
        self.longest = max(self.longest, len(chat.ids))

    def close(self) -> formats.Split:
        for file in (self._file, self._mask):
            files.close_durably(file)
        raw = np.array(self.begins, "<u8").tobytes()
        files.write_durably(self.folder / f"{self.split}.documents.bin", raw)
        shards = tuple(
            formats.Shard(self._path(i).name, length, formats.sha256_file(self._path(i)))
            for i, length in enumerate(self.lengths)
        )
        return formats.Split(self.tokens, 0, len(self.begins), shards)  # text_bytes: not known
