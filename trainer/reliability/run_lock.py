"""A run directory belongs to one process at a time, on a local disk, a shared file system, gs:// or s3://.

Its owner's record is the object `.lock` there, written only over the generation that was read (a conditional write of
tensorstore), with a counter that the owner raises every few seconds. Whoever wants the run and cannot tell whether the
owner lives watches that counter by its own monotonic clock; the clocks of two machines are never compared.
"""

import dataclasses
import datetime
import errno
import json
import logging
import os
import pathlib
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from data.errors import DataError
from data.storage import remote
from trainer.errors import ConfigError, Stopped
from trainer.reliability import reading

log = logging.getLogger("meshlm")

KEY = ".lock"
# Records are padded to this: one bounded read has all of it, whatever follows. What follows may be the end of a longer
# file that a killed process left half written: tensorstore writes over it without cutting it.
RECORD_BYTES = 1024
TIMEOUT_S = 30  # for one read or write


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, as others can recognise it.

    Attributes:
      machine: /etc/machine-id; two machines may have one host name. '' where there is none.
      boot: of the machine's kernel, another one after a restart; '' where it cannot be told.
      namespace: of process ids; a container does not see the processes of another.
      start: of the process, in ticks since boot; a pid is used again, but not with it.
    """

    id: str
    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"


def this_process() -> Owner:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Owner(
        id=uuid.uuid4().hex,
        host=platform.node() or "unknown host",
        machine=_content("/etc/machine-id"),
        boot=_content("/proc/sys/kernel/random/boot_id"),
        namespace=namespace,
        pid=os.getpid(),
        start=_started(os.getpid()) or 0,
    )


class RunLock:
    """The run, from construction until release().

    Attributes:
      owner: this process, as the record has it.
      lost: another process has taken the run over.
    """

    def __init__(
        self,
        location: str | pathlib.Path,
        *,
        flag: str = "--workdir",
        steal: bool = False,
        on_lost: Callable[[str], None],
        regain: bool = False,
        heartbeat_s: float = 10.0,
        stale_s: float = 60.0,
    ) -> None:
        """Takes the run; waits up to `stale_s` where it cannot tell whether the owner in the record still lives.

        Args:
          location: a directory, which is made where it is missing, or gs://BUCKET/PATH or s3://BUCKET/PATH.
          flag: what names the location, for messages.
          steal: take it over from whoever has it now.
          on_lost: called once, in the heartbeat's thread, when another process has taken it over; told by whom.
          regain: take it again where its record has vanished, as of a folder that was deleted or unmounted. Otherwise
            that is a loss: another one may have had it in between and given it back.
          heartbeat_s: between two signs of life; well below everybody's `stale_s`.

        Raises:
          ConfigError: another process has it, or the location cannot be written.
          Stopped: not just now; it was tried again.
        """
        self.owner = this_process()
        self._location, self._flag = str(location), flag
        self._on_lost, self._regain = on_lost, regain
        self._heartbeat_s = heartbeat_s
        self._beat = 0
        self._lost = self._released = False
        self._stop = threading.Event()
        self._begin(steal, stale_s)
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost

    def release(self) -> None:
        """Gives the run back; another's record stays. Never fails: a record left behind is found to be dead."""
        if self._released:
            return
        self._released = True
        self._stop.set()
        if threading.current_thread() is not self._thread:  # on_lost may call this
            self._thread.join(TIMEOUT_S)
        try:
            while True:
                record, generation = self._read()
                # S3's client checks the condition of a deletion before it, not with it: what it is asked is ours still.
                if not self._is_ours(record) or self._write(None, generation):
                    return
        except OSError as e:
            log.warning("cannot give back the lock of %s: %s", self._location, e.strerror or e)

    def _begin(self, steal: bool, stale_s: float) -> None:
        def begin() -> None:
            self._store, self._key = _open(self._location)
            self._place = _place_of(self._location)
            self._take(steal, stale_s)

        try:
            reading.again(begin)
        except OSError as e:
            hint = "; where access is denied, see docs/data.md" if remote.is_remote(self._location) else ""
            reason = f"cannot write to {self._flag}={self._location}: {e.strerror or e}{hint}"
            raise (Stopped if reading.passes(e) else ConfigError)(reason) from None

    def _take(self, steal: bool, stale_s: float) -> None:
        poll_s = min(1.0, stale_s / 20)
        record, generation = first, _ = self._read()
        waited, now = 0.0, time.monotonic()
        while not self._is_ours(record):  # it is after a write whose answer was lost, too
            owner = _parse(record)
            copied = _place(record) not in ("", self._place)  # with the folder: nobody need be here
            lives = None if copied else _lives(owner, self.owner)
            name = owner or "an unknown process (its record is damaged)"
            over = None
            if record is not None:
                if steal and _same_owner(record, first):
                    over = "by --steal_lock"
                elif lives is False:
                    over = "which has ended"
                elif lives or record != first:
                    raise ConfigError(
                        f"{self._location} is being trained by {name}; wait for it, choose another {self._flag}, "
                        "or take it over with --steal_lock"
                    )
                elif waited >= stale_s:
                    over = f"which gave no sign of life for {stale_s:g} s"
            if record is None or over:
                if self._write(self._record(), generation):
                    if over:
                        log.warning("the lock of %s is taken over from %s, %s", self._location, name, over)
                    if record is not None and lives is not False and waited < stale_s:
                        self._let_it_notice(owner, min(1.5 * self._heartbeat_s, stale_s))
                    return
            else:
                if not waited:
                    log.info("waiting   for the lock of %s, held by %s; %g s at most", self._location, name, stale_s)
                time.sleep(poll_s)
                # Time in which nobody looked (this process stopped, a store that did not answer) is no sign of death.
                last, now = now, time.monotonic()
                waited += min(now - last, 2 * poll_s)
            record, generation = self._read()

    def _let_it_notice(self, owner: Owner | None, limit_s: float) -> None:
        """Until a robbed owner has had a heartbeat to find out: it must not write beside us."""
        log.info("waiting   for it to leave; %g s at most", limit_s)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and _lives(owner, self.owner) is not False:
            time.sleep(min(0.2, limit_s))

    def _keep(self) -> None:
        """The heartbeat's thread."""
        failing = False
        while not self._stop.wait(self._heartbeat_s):
            try:
                if not self._renew():
                    return
            except OSError as e:
                if not failing:
                    why = e.strerror or e
                    log.warning("cannot renew the lock of %s: %s; the run goes on, trying again", self._location, why)
                failing = True
            else:
                if failing:
                    log.info("the lock of %s is renewed again", self._location)
                failing = False

    def _renew(self) -> bool:
        """One heartbeat: whether the run is still ours."""
        self._beat += 1
        while True:
            # Read first: a write whose answer was lost leaves our record under a generation we do not know, and a
            # file's generation (inode and time) can come back within a tick of the kernel's clock.
            record, generation = self._read()
            vanished = record is None and self._regain
            if not self._is_ours(record) and not vanished:
                break
            if self._write(self._record(), generation):
                if vanished:
                    log.warning("the lock of %s had vanished; taken again", self._location)
                return True
        if self._stop.is_set():  # released while the store kept us waiting
            return False
        self._lost = True
        if record is None:
            self._on_lost(f"the lock of {self._location} is gone: another process has had the run, or removed it")
        else:
            by = _parse(record) or "an unknown process"
            self._on_lost(f"{self._location} was taken over by {by}; this process must not write there any more")
        return False

    def _record(self) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")  # for people only
        fields = dataclasses.asdict(self.owner) | {"beat": self._beat, "time": now, "place": self._place}
        text = json.dumps(fields)
        return text.encode().ljust(RECORD_BYTES - 1) + b"\n"

    def _is_ours(self, record: bytes | None) -> bool:
        owner = _parse(record)
        return owner is not None and owner.id == self.owner.id

    def _read(self) -> tuple[bytes | None, bytes]:
        """The record, None where there is none, and the generation to write over."""
        try:
            found = _wait(self._store.read(self._key, byte_range=slice(0, RECORD_BYTES)))
        except _OutOfRange:  # shorter, so none of ours
            found = _wait(self._store.read(self._key))
        return (found.value if found.state == "value" else None), found.stamp.generation

    def _write(self, content: bytes | None, generation: bytes) -> bool:
        """Writes, or deletes, if this generation is still there."""
        assert generation  # b"" is no condition at all to tensorstore; 'nothing there' is b"\x02"
        try:
            return bool(_wait(self._store.write(self._key, content, if_equal=generation)).generation)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS):
                raise
            why = e.strerror
        log.warning("%s has no file locks (%s); jobs that begin there together find that out late", self._location, why)
        self._store, _ = _open(self._location, locking="none")
        return bool(_wait(self._store.write(self._key, content, if_equal=generation)).generation)


def _open(location: str, locking: str = "os") -> tuple[Any, str]:
    """The store and the record's key in it; conditions hold only with `locking` by the file system. Raises OSError."""
    try:
        if remote.is_remote(location):
            return remote.open_store(location), KEY
        import tensorstore

        folder = pathlib.Path(location)
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"driver": "file", "path": f"{folder.resolve()}/", "context": {"file_io_locking": {"mode": locking}}}
        return _wait(tensorstore.KvStore.open(spec)), KEY
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory") from None
    except (DataError, ValueError, RuntimeError) as e:  # as of a name that cannot be one
        raise _as_os_error(e) from None


class _OutOfRange(Exception):
    pass


def _wait(future: Any) -> Any:
    try:
        return future.result(timeout=TIMEOUT_S)
    except TimeoutError:
        raise OSError(f"no answer within {TIMEOUT_S} s") from None
    except (ValueError, RuntimeError, OSError) as e:
        if str(e).startswith("OUT_OF_RANGE"):
            raise _OutOfRange from None
        local = re.search(r": ([^:\[\]]+) \[os_error_code='(\d+)'", str(e))
        if local:
            raise OSError(int(local[2]), local[1]) from None
        raise _as_os_error(e) from None


def _as_os_error(error: Exception) -> OSError:
    """With a number that says whether it may pass, and the store's words."""
    return OSError(errno.EAGAIN if reading.passes(error) else errno.EINVAL, _first_line(error))


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


def _parse(record: bytes | None) -> Owner | None:
    """Whose record it is; None where there is none, or it is damaged."""
    try:
        found = json.loads(record or b"")
        owner = Owner(**{field.name: found[field.name] for field in dataclasses.fields(Owner)})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    values = dataclasses.asdict(owner)
    numbers = (values.pop("pid"), values.pop("start"))
    sane = all(type(n) is int and 0 <= n < 2**63 for n in numbers) and 0 < owner.pid < 2**31
    return owner if sane and all(isinstance(v, str) and v.isprintable() for v in values.values()) else None


def _place_of(location: str) -> str:
    """What tells a folder from a copy of it."""
    return location[:256] if remote.is_remote(location) else f"folder {pathlib.Path(location).stat().st_ino}"


def _place(record: bytes | None) -> str:
    """The place that a record was written for; '' where it does not say."""
    try:
        place = json.loads(record or b"")["place"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return place if isinstance(place, str) else ""


def _same_owner(record: bytes, other: bytes | None) -> bool:
    a, b = _parse(record), _parse(other)
    return record == other or (a is not None and b is not None and a.id == b.id)


def _lives(owner: Owner | None, me: Owner) -> bool | None:
    """Whether the process still runs; None where that cannot be told from here."""
    # Another boot is no restart for certain: machines and containers are made from images, with host name and id.
    if owner is None or (owner.host, owner.machine, owner.boot) != (me.host, me.machine, me.boot) or not me.boot:
        return None
    if owner.namespace != me.namespace:
        return None
    started = _started(owner.pid)
    if started is not None:
        return started == owner.start
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's, and /proc does not show it
        return None
    return None


def _started(pid: int) -> int | None:
    """When it was started, in ticks since boot; -1 where it has ended and nobody has asked how; None where not seen."""
    try:
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def _content(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""
