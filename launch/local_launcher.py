"""Run the processes of one run on this machine as one command; launch/local/run.sh execs it.

  python -m launch.local_launcher LINE ...

Each LINE is a command, quoted as for a shell. Its output lines are prefixed with its number. SIGTERM, SIGINT, SIGUSR1,
SIGHUP and SIGQUIT are passed on to all, each time they arrive. A run needs all of its processes: ten seconds after one
has ended, the others get a SIGTERM. If this process is killed, all get a SIGTERM, too. The exit code is 0 if all
exited with 0, otherwise the most informative one.
"""

import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from launch import cli, supervise
from trainer.errors import ConfigError

log = logging.getLogger("meshlm")

GRACE_S = 10.0  # time for the other processes to end by themselves and say why


class Member:
    """One of the commands, and a program that prefixes its lines.

    That program is a separate process, so that it survives if this process is killed. Once nothing reads its output, it
    only drains the pipe: a command whose writes fail could neither log nor save at its end.
    """

    def __init__(self, number: int, command: Sequence[str]):
        self.number = number
        # A terminal's Ctrl-C does not reach other sessions directly, so they get it only once, from this process.
        mark = ["sh", "-c", 'sed -u "$0" 2>/dev/null || exec cat >/dev/null', f"s/^/[{number}] /"]
        self.printer = subprocess.Popen(mark, stdin=subprocess.PIPE, start_new_session=True)
        assert self.printer.stdin is not None
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.printer.stdin,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=supervise.end_with_parent(),
            )
        except OSError as e:
            raise ConfigError(f"{command[0]} cannot be started: {e.strerror}") from None
        finally:
            self.printer.stdin.close()

    @property
    def code(self) -> int | None:
        """The exit code, 128 + n for a death by signal n; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


def main(*lines: str) -> int:
    if not lines:
        raise ConfigError("a command for each process is missing; launch/local/run.sh writes them")
    signals = supervise.SignalQueue()
    members = [Member(i, shlex.split(line)) for i, line in enumerate(lines)]
    wait_until_all_end(members, signals)
    wait_for_output(members, signals)
    return most_informative([member.code or 0 for member in members])


def wait_until_all_end(members: list[Member], signals: supervise.SignalQueue) -> None:
    due: float | None = None  # when the remaining commands get the next SIGTERM
    while running := [member for member in members if member.code is None]:
        now = time.monotonic()
        if due is None and len(running) < len(members):
            due = now + GRACE_S
        if due is not None and now >= due:
            ended = [f"process {member.number} with {member.code}" for member in members if member not in running]
            log.info("Ended: %s. Stopping the others.", ", ".join(ended))
            send(running, signal.SIGTERM)
            due = now + GRACE_S
        for number in signals.read(None if due is None else due - now):
            if number in supervise.FORWARDED:
                send(running, number)


def wait_for_output(members: list[Member], signals: supervise.SignalQueue) -> None:
    """Waits for a trainer that is still saving after its supervisor was killed; another stop signal ends the wait."""
    while any(member.printer.poll() is None for member in members):
        if set(signals.read()) & set(supervise.STOPS):
            return


def send(members: list[Member], number: int) -> None:
    for member in members:
        member.process.send_signal(number)


def most_informative(codes: Sequence[int]) -> int:
    """A code that forbids a restart, if there is one; otherwise that of a crash; otherwise 42."""
    final = (2, 3, 4, 130)
    for code in final:
        if code in codes:
            return code
    return max(codes, key=lambda code: (code != 0, code != cli.STOPPED, code))


if __name__ == "__main__":
    cli.run(main, arguments=sys.maxsize)
