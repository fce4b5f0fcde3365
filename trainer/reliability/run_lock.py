"""A run directory belongs to one process at a time, on a local disk, a shared file system, gs:// or s3://.

The owner's record is the object `.lock` in the directory. It is written only over the generation that was read
(TensorStore's conditional write), and has a counter that the owner increments every few seconds. A process that wants
the run, and cannot tell whether the owner is alive, watches that counter by its own monotonic clock: the clocks of two
machines are never compared.
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
# Records are padded to this length, so that one bounded read returns a whole record. More bytes may follow: if a killed
# process has left a longer file half written, TensorStore writes over it without truncation.
RECORD_BYTES = 1024
TIMEOUT_S = 30  # for one read or write


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, with what identifies it to others.

    Attributes:
      machine: /etc/machine-id, because two machines may have the same host name; '' if there is none.
      boot: id of the kernel's boot, which changes when the machine restarts; '' if not known.
      namespace: the namespace of its process id, because a container does not see the processes of another one.
      start: when the process was started, in ticks since boot, because process ids are reused.
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
    """The lock of a run, held from construction until release().

    Attributes:
      owner: this process, as the record describes it.
      lost: whether another process has taken the run over.
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
        """Takes the lock; waits up to `stale_s` if it cannot tell whether the owner in the record is still alive.

        Args:
          location: a directory, which is created if it is missing, or gs://BUCKET/PATH or s3://BUCKET/PATH.
          flag: the flag that sets the location, for messages.
          steal: take the lock over from its current owner.
          on_lost: called once, on the heartbeat's thread, when another process has the lock; the message names it.
          regain: take the lock again if its record has vanished, because the folder was deleted or unmounted. If this
            is False, the lock then counts as lost: another process may have taken and released it.
          heartbeat_s: seconds between two increments of the counter; well below the `stale_s` of all processes.

        Raises:
          ConfigError: another process has the lock, or the location cannot be written.
          Stopped: retries also failed, with an error that may pass.
        """
        self.owner = this_process()
        self._location = str(location)
        self._flag = flag
        self._on_lost = on_lost
        self._regain = regain
        self._heartbeat_s = heartbeat_s
        self._store: Any = None
        self._place = ""
        self._beat = 0
        self._lost = False
        self._released = False
        self._stop = threading.Event()
        self._begin(steal, stale_s)
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost

    def release(self) -> None:
        """Deletes the record if it is ours. Never raises: if the record stays, others find that its owner is dead."""
        if self._released:
            return
        self._released = True
        self._stop.set()
        if threading.current_thread() is not self._thread:  # on_lost may call release()
            self._thread.join(TIMEOUT_S)
        try:
            while True:
                record, generation = self._read()
                # S3's client checks the condition before a deletion, not with it, so this deletes only our own record.
                if not self._is_ours(record) or self._write(None, generation):
                    return
        except OSError as e:
            log.warning("cannot release the lock of %s: %s", self._location, e.strerror or e)

    def _begin(self, steal: bool, stale_s: float) -> None:
        def begin() -> None:
            self._store = _open(self._location)
            self._place = _place_of(self._location)
            self._take(steal, stale_s)

        try:
            reading.again(begin)
        except OSError as e:
            hint = "; if access is denied, see docs/data.md" if remote.is_remote(self._location) else ""
            reason = f"cannot write to {self._flag}={self._location}: {e.strerror or e}{hint}"
            raise (Stopped if reading.passes(e) else ConfigError)(reason) from None

    def _take(self, steal: bool, stale_s: float) -> None:
        poll_s = min(1.0, stale_s / 20)
        record, generation = first, _ = self._read()
        waited, now = 0.0, time.monotonic()
        while not self._is_ours(record):  # ours, too, if the answer to our write was lost
            owner = _parse(record)
            copied = _place(record) not in ("", self._place)  # the folder is a copy, and has the record of its original
            alive = None if copied else _is_alive(owner, self.owner)
            name = owner or "an unknown process (its record is damaged)"
            over = None
            if record is not None:
                if steal and _same_owner(record, first):
                    over = "by --steal_lock"
                elif alive is False:
                    over = "which has ended"
                elif alive or record != first:
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
                    if record is not None and alive is not False and waited < stale_s:
                        self._wait_for_exit(owner, min(1.5 * self._heartbeat_s, stale_s))
                    return
            else:
                if not waited:
                    log.info("waiting   for the lock of %s, held by %s; %g s at most", self._location, name, stale_s)
                time.sleep(poll_s)
                # Time without a read (this process was suspended, or the store did not answer) does not prove a death.
                last, now = now, time.monotonic()
                waited += min(now - last, 2 * poll_s)
            record, generation = self._read()

    def _wait_for_exit(self, owner: Owner | None, limit_s: float) -> None:
        """Waits until the former owner has ended, or had time for a heartbeat: only one may write to the run."""
        log.info("waiting   for it to exit; %g s at most", limit_s)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and _is_alive(owner, self.owner) is not False:
            time.sleep(min(0.2, limit_s))

    def _keep(self) -> None:
        """Renews the lock until release(), on the heartbeat's thread."""
        failing = False
        while not self._stop.wait(self._heartbeat_s):
            try:
                if not self._renew():
                    return
            except OSError as e:
                if not failing:
                    why = e.strerror or e
                    log.warning("cannot renew the lock of %s: %s; training continues, retrying", self._location, why)
                failing = True
            else:
                if failing:
                    log.info("the lock of %s is renewed again", self._location)
                failing = False

    def _renew(self) -> bool:
        """Makes one heartbeat; returns whether the run is still ours."""
        self._beat += 1
        while True:
            # Read before each write: if the answer to a write was lost, our record has a generation that is not known
            # here, and a file's generation (inode and time) can repeat within a tick of the kernel's clock.
            record, generation = self._read()
            vanished = record is None and self._regain
            if not self._is_ours(record) and not vanished:
                break
            if self._write(self._record(), generation):
                if vanished:
                    log.warning("the lock of %s had vanished; taken again", self._location)
                return True
        if self._stop.is_set():  # release() was called while the store did not answer
            return False
        self._lost = True
        if record is None:
            self._on_lost(f"the lock of {self._location} is gone: another process has had the run, or removed it")
        else:
            by = _parse(record) or "an unknown process"
            self._on_lost(f"{self._location} was taken over by {by}; this process must not write there any more")
        return False

    def _record(self) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")  # only people read it
        fields = dataclasses.asdict(self.owner) | {"beat": self._beat, "time": now, "place": self._place}
        text = json.dumps(fields)
        return text.encode().ljust(RECORD_BYTES - 1) + b"\n"

    def _is_ours(self, record: bytes | None) -> bool:
        owner = _parse(record)
        return owner is not None and owner.id == self.owner.id

    def _read(self) -> tuple[bytes | None, bytes]:
        """The record (None if there is none), and the generation to write over."""
        try:
            found = _wait(self._store.read(KEY, byte_range=slice(0, RECORD_BYTES)))
        except _OutOfRange:  # the object is shorter than our records
            found = _wait(self._store.read(KEY))
        return (found.value if found.state == "value" else None), found.stamp.generation

    def _write(self, content: bytes | None, generation: bytes) -> bool:
        """Writes `content`, or if that is None deletes the record. Returns False if the generation has changed."""
        assert generation  # TensorStore takes b"" for any generation; b"\x02" means that there is no record
        try:
            return bool(_wait(self._store.write(KEY, content, if_equal=generation)).generation)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS):
                raise
            why = e.strerror
        log.warning("%s has no file locks (%s); jobs that start there together may notice it late", self._location, why)
        self._store = _open(self._location, locking="none")
        return bool(_wait(self._store.write(KEY, content, if_equal=generation)).generation)


def _open(location: str, locking: str = "os") -> Any:
    """The store of the record. Conditional writes are safe only with `locking` by the file system. Raises OSError."""
    try:
        if remote.is_remote(location):
            return remote.open_store(location)
        import tensorstore

        folder = pathlib.Path(location)
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"driver": "file", "path": f"{folder.resolve()}/", "context": {"file_io_locking": {"mode": locking}}}
        return _wait(tensorstore.KvStore.open(spec))
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory") from None
    except (DataError, ValueError, RuntimeError) as e:  # for example an invalid name
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
    """An OSError with the store's message and a number by which reading.passes() tells whether it may pass."""
    return OSError(errno.EAGAIN if reading.passes(error) else errno.EINVAL, _first_line(error))


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


def _parse(record: bytes | None) -> Owner | None:
    """The owner in a record; None if there is no record, or if it is damaged."""
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
    """What distinguishes a folder from a copy of it."""
    return location[:256] if remote.is_remote(location) else f"folder {pathlib.Path(location).stat().st_ino}"


def _place(record: bytes | None) -> str:
    """The place that a record was written for; '' if it has none."""
    try:
        place = json.loads(record or b"")["place"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return place if isinstance(place, str) else ""


def _same_owner(record: bytes, other: bytes | None) -> bool:
    a, b = _parse(record), _parse(other)
    return record == other or (a is not None and b is not None and a.id == b.id)


def _is_alive(owner: Owner | None, me: Owner) -> bool | None:
    """Whether the process `owner` is still running; None if this process cannot know."""
    # A different boot id does not prove a restart: machines made from one image may share host name and machine id.
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
    except OSError:  # the process belongs to another user, and /proc hides it
        return None
    return None


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since boot; -1 if it is a zombie; None if it is not visible."""
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
