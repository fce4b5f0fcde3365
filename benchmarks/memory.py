"""Samples the memory of a command and its child processes."""

import pathlib
import threading


class PeakMemory:
    """Largest sum of proportional set sizes (man 5 proc) of a process and its children, sampled."""

    def __init__(self, pid: int):
        self.pid = pid
        self.peak = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(0.05):
            self.peak = max(self.peak, sum(map(_pss, (self.pid, *_children(self.pid)))))

    def result(self) -> float:
        self.stop.set()
        self.thread.join()
        return self.peak / 1024**2


def _children(pid: int) -> list[int]:
    try:
        tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _pss(pid: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
