"""A second place for checkpoints: a folder, or gs://… or s3://… through TensorStore.

    MIRROR/mirror.json           {"id": random, set when it is created; "of": [run directory, place of the mirror]}
    MIRROR/config.json           the configuration of the run that the mirror belongs to
    MIRROR/checkpoints/<step>/…  the files of RUN/checkpoints/<step>; Orbax's metadata comes last and completes a copy

Nothing is copied to, read from or deleted in a place without that id, because an unmounted file system leaves an empty
folder. A thread of process 0 copies one step at a time. If another step is offered before a copy begins, only the newer
one is copied.

RUN/mirrors.json has, for each mirror that the run has had, the steps whose copies are to be deleted, and the step that
is being copied. The file is written before anything that relies on it, and a step is removed from it only when its copy
is known to be deleted. So after a rollback, no start restores the copy of a step that was rolled back past.
"""

import errno
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from data.errors import DataError
from data.storage import names, remote
from data.storage.files import close_durably, sync, write_durably
from trainer.config import Config, changes, from_dict, to_json
from trainer.errors import CheckpointError, ConfigError, Stopped
from trainer.reliability import identity, reading
from trainer.reliability.reading import Unreadable
from trainer.reliability.restarts import METADATA_FILE

log = logging.getLogger("meshlm")
TIMEOUT_S = 600  # for one file
PIECE_BYTES = 16 << 20  # bytes to read at a time
MARK = "mirror.json"
MIRRORS = "mirrors.json"  # in the run directory
OF_A_RUN = ("environment.json", "command.txt")  # files that run directories have and mirrors do not
PARTIAL = ".__lock"  # tensorstore's name for a file that is being written
Keep = Callable[[set[int]], set[int]]


class Mirror:
    """Copies of the checkpoints in `source`. Only process 0 has this.

    Args:
      location: folder or URL.
      source: RUN/checkpoints.
      config: the configuration of the run.
      check: called with the meta of the newest copy before anything is written; raises an error if the meta does not
        fit the run.
      newest: the newest step in `source`; None if there is none.
      strict: whether settings that need --allow_config_change must equal those of the mirror's config.json if the
        mirror has a later copy than `newest`; False if the flag is given.

    Attributes:
      copying: the step being copied, or None.
      copies: the steps with complete copies, as last seen.
      on_progress: called for each block that is fetched, for a watchdog.

    Raises:
      ConfigError: the location cannot be used, or belongs to another run.
      CheckpointError: RUN/mirrors.json is damaged.
      Unreadable: the location cannot be used just now.
    """

    def __init__(
        self,
        location: str,
        source: pathlib.Path,
        config: Config,
        *,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
        newest: int | None = None,
        strict: bool = False,
    ):
        self.location = location.rstrip("/")
        self.source = source
        self.copying: int | None = None
        self.copies: set[int] = set()
        self.on_progress: Callable[[], None] = lambda: None
        self._store: Any = None
        self._waiting: tuple[int, Keep] | None = None
        self._changed = threading.Condition()
        self._list_path = source.parent / MIRRORS
        self._id = secrets.token_hex(8)  # replaced by the mirror's id if the mirror exists
        place = self.location if remote.is_remote(location) else str(pathlib.Path(location).resolve())
        self._of = [str(source.parent.resolve()), place]
        self._mirrors = reading.patiently(self._read_mirrors, self._list_path)
        self._thread: threading.Thread | None = None
        try:
            reading.again(lambda: self._claim(config, check, newest, strict), _ERRORS)
        except _ERRORS as e:
            reason = f"config.checkpoint.mirror = {location} cannot be used: {_line(e)}"
            raise (Unreadable(reason, Stopped.exit_code) if reading.passes(e) else ConfigError(reason)) from None

    def _claim(self, config: Config, check: Callable[[dict[str, Any]], None], newest: int | None, strict: bool) -> None:
        self._store = remote.open_store(self.location)
        (mark, of), recorded = self._read_mark(), self._read("config.json")
        self.copies = self._find_copies()
        self._check_run(mark, of)
        copied = self.copies - self._mirrors.get(mark or "", _Copies()).unwanted
        self._check_owner(recorded, config, strict and bool(copied) and (newest is None or max(copied) > newest))
        if mark is None and recorded is None and any(_step_of(key) is not None for key in self._keys("checkpoints/")):
            raise ConfigError(
                f"config.checkpoint.mirror = {self.location} has checkpoints that are not copies of a run, as it lacks "
                f"{MARK} and config.json; name another place"
            )
        if mark is None and self._mirrors:
            log.warning(
                "%s is not a mirror that this run has had; a new one is created. If its file system is not mounted, "
                "stop and mount it", self.location,
            )  # fmt: skip
        self._id = mark or self._id
        self._mirrors.setdefault(self._id, _Copies())
        for step in sorted(copied, reverse=True):
            raw = self._read(f"checkpoints/{step}/{METADATA_FILE}") or b""
            try:
                meta = identity.meta_from(raw)
            except ValueError:  # the copy is damaged, which a restore would report
                continue
            check(meta)
            break
        if not remote.is_remote(self.location):
            self._clear_leftovers(pathlib.Path(self.location), is_ours=bool(mark or recorded))
        self._write(MARK, json.dumps({"id": self._id, "of": self._of}).encode())
        self._write("config.json", to_json(config).encode())
        if (unfinished := self._here.unfinished) is not None:
            self._record(unwanted={unfinished} - self.copies, unfinished=None)  # the copy was not finished

    def _check_run(self, mark: str | None, of: Any) -> None:
        """Raises ConfigError if this run directory is a copy of another, which still owns the mirror."""
        if mark not in self._mirrors or of == self._of:
            return
        try:
            run, place = of
            theirs = pathlib.Path(run) / MIRRORS
            is_theirs = mark in json.loads(theirs.read_bytes()) and not theirs.samefile(self._list_path)
        except (OSError, ValueError, TypeError, RecursionError):
            return  # the run was moved, or an earlier version wrote the mark
        if place != self._of[1]:
            return  # the mirror was copied together with the run
        if is_theirs:
            raise ConfigError(
                f"config.checkpoint.mirror = {self.location} is the mirror of {run}, of which this run directory is a "
                "copy; name another place"
            )

    def _check_owner(self, recorded: bytes | None, config: Config, strict: bool) -> None:
        """Raises ConfigError if the place belongs to another run, or is a run directory."""
        where = f"config.checkpoint.mirror = {self.location}"
        if any(self._read(name) is not None for name in OF_A_RUN):
            raise ConfigError(f"{where} is a run directory; name a place for copies only")
        if recorded is None:
            return
        try:
            of_run = from_dict(json.loads(recorded), recorded=True)
        except (ConfigError, ValueError, RecursionError) as e:
            raise ConfigError(
                f"{where} has a config.json that this version cannot read ({_line(e)}); name another place"
            ) from None
        found = changes(of_run, config)
        if found["refused"]:
            raise ConfigError(
                f"{where} holds another run's checkpoints ({'; '.join(found['refused'])}); name another place"
            )
        if strict and found["flag"]:
            raise ConfigError(
                f"{where} holds checkpoints of a run with other settings; {'; '.join(found['flag'])}; use those to "
                "resume it, pass --allow_config_change to resume with these, or name another place"
            )

    def _read_mark(self) -> tuple[str | None, Any]:
        """The fields "id" and "of" of mirror.json; both None if there is none.

        Raises ConfigError if it is damaged.
        """
        raw = self._read(MARK)
        if raw is None:
            return None, None
        try:
            found = json.loads(raw)
            if isinstance(found["id"], str) and found["id"]:
                return found["id"], found.get("of")
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ConfigError(f"config.checkpoint.mirror = {self.location} has a damaged {MARK}; name another place")

    def _check_there(self) -> None:
        """Raises OSError, as an error that may pass, if this mirror is not there now."""
        if self._read_mark()[0] != self._id:
            raise OSError(errno.ESTALE, f"its {MARK} is gone; is its file system mounted?")

    @staticmethod
    def _clear_leftovers(folder: pathlib.Path, is_ours: bool) -> None:
        """Deletes partial files of copies that were killed, because TensorStore would not truncate them."""
        steps = [path for path in folder.glob("checkpoints/*") if is_ours and _step(path.name) is not None]
        partial = f"*{PARTIAL}"
        for leftover in [folder / f"config.json{PARTIAL}", *(path for step in steps for path in step.rglob(partial))]:
            leftover.unlink(missing_ok=True)

    # Copying to the mirror

    def offer(self, step: int, keep: Keep) -> None:
        """Copies `step` when the current copy is finished, then deletes copies that need not stay.

        Args:
          keep: called with the steps that have copies; returns those whose copies stay.
        """
        with self._changed:
            self._waiting = step, keep
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._waiting is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                (self.copying, keep), self._waiting = self._waiting, None
            try:
                self._copy(self.copying)
            except Exception as e:  # after an error of any type, training and later copies continue
                log.error("checkpoint at step %d was NOT copied to %s: %s", self.copying, self.location, _line(e))
                self.copying = None  # clean_up can delete what was copied
            try:
                self.clean_up(keep)
            except Exception as e:
                log.warning("old copies in %s are kept for now: %s", self.location, _line(e))
            self.copying = None

    def _copy(self, step: int) -> None:
        self._check_there()
        self._record(unfinished=step)
        try:
            self._delete(step)  # an older copy with this number, from before a rollback
            self._record(wanted={step})
            folder = self.source / str(step)
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METADATA_FILE)
            for path in [*files, folder / METADATA_FILE]:
                self._copy_file(path, f"checkpoints/{step}/{path.relative_to(folder).as_posix()}")
        except BaseException:
            self._record(unwanted={step}, unfinished=None)
            raise
        self.copies = self.copies | {step}
        self._record(unfinished=None)

    def _copy_file(self, path: pathlib.Path, key: str) -> None:
        if remote.is_remote(self.location):
            # Clients of object stores need all of an object at once; Orbax's files have 2 GB at most.
            self._write(key, path.read_bytes())
            return
        with names.open_parent(pathlib.Path(self.location), key) as (folder, last):
            partial = f"{last}{PARTIAL}"
            there = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
            with path.open("rb") as source, os.fdopen(there, "wb") as f:
                shutil.copyfileobj(source, f, PIECE_BYTES)
                close_durably(f)
            os.rename(partial, last, src_dir_fd=folder, dst_dir_fd=folder)

    def clean_up(self, keep: Keep) -> None:
        """Deletes the copies that `keep` does not return. If the mirror cannot be listed, all stay."""
        existing = self.complete_copies() - self._here.unwanted
        self._record(unwanted=existing - keep(existing) - {self.copying})
        self.delete_unwanted()

    def list_unwanted(self, steps: Iterable[int]) -> None:
        """Lists `steps` as unwanted in all mirrors of the run, so that no copy of them is restored. Raises OSError."""
        self._record(unwanted=set(steps), everywhere=True)

    def delete_unwanted(self) -> None:
        """Deletes the copies listed as unwanted, except the current one. If a deletion fails, the copy stays listed."""
        for step in sorted(self._here.unwanted - {self.copying}):
            try:
                self._delete(step)
                self._record(wanted={step})  # takes the step off the list
            except _ERRORS as e:
                log.warning("the copy of step %d in %s could not be deleted: %s", step, self.location, _line(e))

    def _delete(self, step: int) -> None:
        """Deletes a copy; first the metadata file, without which the copy is not complete."""
        self._check_there()
        self._store.write(f"checkpoints/{step}/{METADATA_FILE}", None).result(TIMEOUT_S)
        self._store.delete_range(_range(f"checkpoints/{step}/")).result(TIMEOUT_S)

    @property
    def _here(self) -> "_Copies":
        return self._mirrors[self._id]

    def _record(
        self, *, unwanted: Iterable[int] = (), wanted: Iterable[int] = (), everywhere: bool = False, **unfinished: Any
    ) -> None:
        """Changes what is known of the copies in this mirror or, if `everywhere`, in all mirrors that the run has had.

        mirrors.json is written first.
        """
        with self._changed:
            changed = {
                mirror: copies._replace(unwanted=(copies.unwanted | set(unwanted)) - set(wanted), **unfinished)
                if everywhere or mirror == self._id
                else copies
                for mirror, copies in self._mirrors.items()
            }
            if changed != self._mirrors or not reading.is_there(self._list_path):
                self._list_path.parent.mkdir(parents=True, exist_ok=True)
                text = {mirror: [sorted(copies.unwanted), copies.unfinished] for mirror, copies in changed.items()}
                write_durably(self._list_path, json.dumps(text).encode())
                sync(self._list_path.parent)
                self._mirrors = changed

    def _read_mirrors(self) -> dict[str, "_Copies"]:
        if not reading.is_there(self._list_path):
            return {}
        try:
            found = json.loads(self._list_path.read_bytes())
            mirrors = {mirror: _Copies(frozenset(unwanted), last) for mirror, (unwanted, last) in found.items()}
            steps = [step for copies in mirrors.values() for step in (*copies.unwanted, copies.unfinished or 0)]
            if any(type(step) is not int or step < 0 for step in steps):
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{self._list_path} is damaged: it names the copies that the run must not resume from; restore it, or "
                "remove it if the run was never rolled back"
            ) from None
        return mirrors

    @property
    def busy(self) -> bool:
        """Whether a step is being copied, or old copies are being deleted."""
        return self._thread is not None

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        """Waits until no step is being copied and no copy deleted, `timeout_s` at most."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout_s):
                log.error("step %s is not yet copied to %s after %.0f s", self.copying, self.location, timeout_s)

    # Copying from the mirror

    def steps(self) -> list[int]:
        """The steps with complete copies, newest first, without those that are listed as unwanted.

        Raises CheckpointError, Unreadable.
        """
        try:
            return sorted(self._list() - self._here.unwanted, reverse=True)
        except _ERRORS as e:
            if not self.copies:  # the mirror had no copies, and only this process writes there
                return []
            reason = f"cannot list {self.location}: {_line(e)}; start again when it answers"
            raise (Unreadable(reason, Stopped.exit_code) if reading.passes(e) else CheckpointError(reason)) from None

    def complete_copies(self) -> set[int]:
        """The steps with complete copies. If they cannot be listed, this logs a warning and returns an empty set."""
        try:
            return self._list()
        except _ERRORS as e:
            log.warning("cannot list %s: %s", self.location, _line(e))
            return set()

    @property
    def known(self) -> set[int]:
        """Steps whose copies can be restored, as last seen."""
        return self.copies - self._here.unwanted

    def _list(self) -> set[int]:
        self._check_there()
        self.copies = self._find_copies()
        return self.copies

    def _find_copies(self) -> set[int]:
        keys = self._keys("checkpoints/")
        return {step for key in keys if key.endswith(f"/{METADATA_FILE}") and (step := _step_of(key)) is not None}

    def _keys(self, prefix: str) -> list[str]:
        return [os.fsdecode(key) for key in self._store.list(_range(prefix)).result(TIMEOUT_S)]

    def fetch(self, step: int, suffix: str = "") -> bool:
        """Copies `step` into the run, as <step><suffix>; False, with a line in the log, if the copy is damaged.

        Raises Unreadable if the copy cannot be read, because no older step may be used instead in that case.
        """
        partial = self.source / f"{step}.orbax-checkpoint-tmp-mirror"

        def fetch() -> None:
            self._check_there()
            self._download(step, partial)
            partial.rename(self.source / f"{step}{suffix}")

        try:
            reading.again(fetch, _ERRORS)
        except _ERRORS as e:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"checkpoint at step {step} cannot be fetched from {self.location}: {_line(e)}"
            if reading.passes(e):
                raise Unreadable(f"{reason}; start again when it answers", Stopped.exit_code) from None
            if not isinstance(e, FileNotFoundError | DataError) and not reading.WRONG.search(str(e)):
                raise Unreadable(reason, CheckpointError.exit_code) from None
            log.error("%s", reason)
            return False
        log.info("fetched   step %d from %s", step, self.location)
        return True

    def _download(self, step: int, partial: pathlib.Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        prefix = f"checkpoints/{step}/"
        for name in self._keys(prefix):
            with names.open_parent(partial, name.removeprefix(prefix)) as (folder, last):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                with os.fdopen(os.open(last, flags, 0o666, dir_fd=folder), "wb") as f:
                    for block in remote.read_blocks(self._store, os.fsencode(name), f"{self.location}/{name}"):
                        f.write(block.value)
                        self.on_progress()
                    close_durably(f)

    def _read(self, key: str | bytes) -> bytes | None:
        result = self._store.read(key).result(TIMEOUT_S)
        return result.value if result.state == "value" else None

    def _write(self, key: str, content: bytes) -> None:
        self._store.write(key, content).result(TIMEOUT_S)


_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError, DataError)


class _Copies(NamedTuple):
    """What a run knows of the copies in one mirror: steps whose copies are to be deleted, and the one being copied."""

    unwanted: frozenset[int] = frozenset()
    unfinished: int | None = None


def _step_of(key: str) -> int | None:
    """The step of a key checkpoints/<step>/…."""
    return _step(key.split("/")[1])


def _step(name: str) -> int | None:
    """The step that a folder's name means; None if it is not the name of a step."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _range(prefix: str) -> Any:
    import tensorstore

    raw = prefix.encode()
    return tensorstore.KvStore.KeyRange(raw, raw[:-1] + bytes([raw[-1] + 1]))
