"""A second place for checkpoints: a folder, or gs://… or s3://… through tensorstore.

    MIRROR/config.json           of the run that it belongs to
    MIRROR/checkpoints/<step>/…  the files of RUN/checkpoints/<step>, Orbax's metadata last: with it a copy is whole

Process 0 copies, on a thread, one step at a time; a step that is overtaken while it waits is left out.

RUN/unwanted_copies.json lists the copies that are to go. It is written before anything that relies on it, and a step
leaves it only when its copy is known to be deleted: what the run went behind is never offered again, in no later life.
"""

import errno
import json
import logging
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any

from data import names, remote
from data.errors import DataError
from data.files import close_durably, sync, write_durably
from trainer import identity, reading
from trainer.config import Config, changes, from_dict, to_json
from trainer.errors import CheckpointError, ConfigError, Stopped
from trainer.lives import METADATA_FILE
from trainer.reading import Unreadable

log = logging.getLogger("meshlm")
TIMEOUT_S = 600  # for one file
PIECE_BYTES = 16 << 20  # held in memory
UNWANTED = "unwanted_copies.json"  # in the run directory
PARTIAL = ".__lock"  # tensorstore's name for a file that is being written
Keep = Callable[[set[int]], set[int]]


class Mirror:
    """Copies of the checkpoints in `source`. For process 0 only.

    Args:
      location: folder or URL.
      source: RUN/checkpoints.
      config: of the run.
      check: is called with the meta of the newest copy, before anything is written; raises what keeps the mirror as
        it is.

    Attributes:
      copying: the step being copied, or None.
      copies: the steps of which there were whole copies when that was last seen.
      alive: is called with each block that is fetched; for a watchdog.

    Raises:
      ConfigError: the location cannot be used, or belongs to another run.
      CheckpointError: the run's list of unwanted copies is damaged.
      Unreadable: not just now.
    """

    def __init__(
        self,
        location: str,
        source: pathlib.Path,
        config: Config,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
    ):
        self.location, self.source = location.rstrip("/"), source
        self.copying: int | None = None
        self.copies: set[int] = set()
        self.alive: Callable[[], None] = lambda: None
        self._waiting: tuple[int, Keep] | None = None
        self._changed = threading.Condition()
        self._list_path = source.parent / UNWANTED
        self._unwanted = reading.patiently(self._read_unwanted, self._list_path)
        self._thread: threading.Thread | None = None
        try:
            reading.again(lambda: self._claim(config, check), _ERRORS)
        except _ERRORS as e:
            reason = f"config.checkpoint.mirror = {location} cannot be used: {_line(e)}"
            raise (Unreadable(reason, Stopped.exit_code) if reading.passes(e) else ConfigError(reason)) from None

    def _claim(self, config: Config, check: Callable[[dict[str, Any]], None]) -> None:
        self._store = remote.open_store(self.location)
        recorded = self._read("config.json")
        if recorded is not None:
            try:
                of_run = from_dict(json.loads(recorded), recorded=True)
            except (ConfigError, ValueError, RecursionError) as e:
                raise ConfigError(
                    f"config.checkpoint.mirror = {self.location} has a config.json that this version does not read "
                    f"({_line(e)}); name another place"
                ) from None
            refused = changes(of_run, config)["refused"]
            if refused:
                raise ConfigError(
                    f"config.checkpoint.mirror = {self.location} holds another run's checkpoints "
                    f"({'; '.join(refused)}); name another place"
                )
        for step in sorted(self._list(), reverse=True):
            raw = self._read(f"checkpoints/{step}/{METADATA_FILE}") or b""
            try:
                newest = identity.meta_from(raw)
            except ValueError:  # a damaged copy; it is found when it is restored
                continue
            check(newest)
            break
        if not remote.is_remote(self.location):
            self._clear_leftovers(pathlib.Path(self.location), is_ours=recorded is not None)
        self._write("config.json", to_json(config).encode())

    @staticmethod
    def _clear_leftovers(folder: pathlib.Path, is_ours: bool) -> None:
        """Of copies that were killed, under the names that tensorstore gives them: the next would end in old bytes."""
        steps = [path for path in folder.glob("checkpoints/*") if is_ours and _step(path.name) is not None]
        partial = f"*{PARTIAL}"
        for leftover in [folder / f"config.json{PARTIAL}", *(path for step in steps for path in step.rglob(partial))]:
            leftover.unlink(missing_ok=True)

    # Copying there

    def offer(self, step: int, keep: Keep) -> None:
        """Copies `step` when the copy under way is done, and deletes the copies of steps that are not to keep.

        Args:
          keep: says which, of the steps of which there are copies: some may be here alone.
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
                self.clean_up(keep)
            except _ERRORS as e:
                log.error("checkpoint at step %d was NOT copied to %s: %s", self.copying, self.location, _line(e))
            finally:
                self.copying = None

    def _copy(self, step: int) -> None:
        self._delete(step)  # a copy of other files under this number, from before the run went back
        folder = self.source / str(step)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METADATA_FILE)
        for path in [*files, folder / METADATA_FILE]:
            self._copy_file(path, f"checkpoints/{step}/{path.relative_to(folder).as_posix()}")
        self.copies = self.copies | {step}

    def _copy_file(self, path: pathlib.Path, key: str) -> None:
        if remote.is_remote(self.location):  # its clients take an object whole; Orbax's files have 2 GB at most
            self._write(key, path.read_bytes())
            return
        with names.opened(pathlib.Path(self.location), key) as (folder, last):
            partial = f"{last}{PARTIAL}"
            there = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
            with path.open("rb") as source, os.fdopen(there, "wb") as f:
                shutil.copyfileobj(source, f, PIECE_BYTES)
                close_durably(f)
            os.rename(partial, last, src_dir_fd=folder, dst_dir_fd=folder)

    def clean_up(self, keep: Keep) -> None:
        """Deletes the copies of other steps; all stay while it cannot be seen what there is."""
        there = self.whole() - self._unwanted
        self.list_unwanted(there - keep(there) - {self.copying})
        self.delete_unwanted()

    def list_unwanted(self, steps: Iterable[int]) -> None:
        """Puts these steps, whether there are copies or not, on the list; they are not offered. Raises OSError."""
        with self._changed:
            self._record(self._unwanted | set(steps))

    def delete_unwanted(self) -> None:
        """Deletes the copies on the list by name; later, if it cannot now. Those of others stay.

        Not that which is being copied: it may be listed meanwhile.
        """
        for step in sorted(self._unwanted - {self.copying}):
            try:
                self._delete(step)
            except _ERRORS as e:
                log.warning("the copy of step %d in %s could not be deleted: %s", step, self.location, _line(e))

    def _delete(self, step: int) -> None:
        """What makes it whole first. Then it is on the list no longer."""
        self._store.write(f"checkpoints/{step}/{METADATA_FILE}", None).result(TIMEOUT_S)
        self._store.delete_range(_range(f"checkpoints/{step}/")).result(TIMEOUT_S)
        with self._changed:
            self._record(self._unwanted - {step})

    def _record(self, unwanted: set[int]) -> None:
        if unwanted != self._unwanted:
            write_durably(self._list_path, json.dumps(sorted(unwanted)).encode())
            sync(self._list_path.parent)
            self._unwanted = unwanted

    def _read_unwanted(self) -> set[int]:
        if not reading.is_there(self._list_path):
            return set()
        try:
            steps = json.loads(self._list_path.read_bytes())
            if any(type(step) is not int or step < 0 for step in steps):
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise CheckpointError(
                f"{self._list_path} is damaged: it names the copies in {self.location} that the run does not go on "
                "from; write them into it, as [4, 6], or remove it if the run never went back"
            ) from None
        return set(steps)

    @property
    def busy(self) -> bool:
        """Whether a copy is under way, or old ones are being deleted."""
        return self._thread is not None

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        """Waits for the copies under way, with a limit."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout_s):
                log.error("step %s is not yet copied to %s after %.0f s", self.copying, self.location, timeout_s)

    # And back

    def steps(self) -> list[int]:
        """Whole copies, newest first; without those that are to be deleted.

        Raises CheckpointError, Unreadable.
        """
        try:
            return sorted(self._list() - self._unwanted, reverse=True)
        except _ERRORS as e:
            if not self.copies:  # nor are there any now: nobody else writes there
                return []
            reason = f"cannot look into {self.location}: {_line(e)}; start again when it answers"
            raise (Unreadable(reason, Stopped.exit_code) if reading.passes(e) else CheckpointError(reason)) from None

    def whole(self) -> set[int]:
        """Steps of which all is there; none when that cannot be told."""
        try:
            return self._list()
        except _ERRORS as e:
            log.warning("cannot look into %s: %s", self.location, _line(e))
            return set()

    def _list(self) -> set[int]:
        keys = self._store.list(_range("checkpoints/")).result(TIMEOUT_S)
        folders = {os.fsdecode(key).split("/")[1] for key in keys if key.endswith(f"/{METADATA_FILE}".encode())}
        found = {step for folder in folders if (step := _step(folder)) is not None}
        if self.copies - found and self._read("config.json") is None:
            raise OSError(errno.ESTALE, "the mirror's config.json is gone; is its file system mounted?")
        self.copies = found
        return found

    def fetch(self, step: int, suffix: str = "") -> bool:
        """Copies `step` into the run, as <step><suffix>; False if that cannot be done.

        Raises Unreadable if it may be done later: nothing older may take its place.
        """
        partial = self.source / f"{step}.orbax-checkpoint-tmp-mirror"

        def fetch() -> None:
            self._download(step, partial)
            partial.rename(self.source / f"{step}{suffix}")

        try:
            reading.again(fetch, _ERRORS)
        except _ERRORS as e:
            reason = f"checkpoint at step {step} cannot be fetched from {self.location}: {_line(e)}"
            if reading.passes(e):
                raise Unreadable(f"{reason}; start again when it answers", Stopped.exit_code) from None
            log.error("%s", reason)
            return False
        log.info("fetched   step %d from %s", step, self.location)
        return True

    def _download(self, step: int, partial: pathlib.Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        prefix = f"checkpoints/{step}/"
        for key in self._store.list(_range(prefix)).result(TIMEOUT_S):
            name = os.fsdecode(key)
            with names.opened(partial, name.removeprefix(prefix)) as (folder, last):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                with os.fdopen(os.open(last, flags, 0o666, dir_fd=folder), "wb") as f:
                    for block in remote.blocks(self._store, key, f"{self.location}/{name}"):
                        f.write(block.value)
                        self.alive()
                    close_durably(f)

    def _read(self, key: str | bytes) -> bytes | None:
        result = self._store.read(key).result(TIMEOUT_S)
        return result.value if result.state == "value" else None

    def _write(self, key: str, content: bytes) -> None:
        self._store.write(key, content).result(TIMEOUT_S)


_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError, DataError)


def _step(name: str) -> int | None:
    """The step whose folder is called so."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _range(prefix: str) -> Any:
    import tensorstore

    raw = prefix.encode()
    return tensorstore.KvStore.KeyRange(raw, raw[:-1] + bytes([raw[-1] + 1]))
