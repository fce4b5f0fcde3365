"""What every command shares: config flags, one-line errors with exit codes, logging.

Nothing here imports JAX: a mistyped flag or field is answered at once.
"""

import atexit
import contextlib
import difflib
import importlib.util
import io
import logging
import math
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TextIO

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from data.errors import DataError, UserError
from data.storage.remote import is_remote
from launch import ENDED, INTERRUPTED, INTERRUPTED_LINE
from trainer.config import Config, from_dict
from trainer.errors import ConfigError, Stopped

log = logging.getLogger("meshlm")

STOPPED = Stopped.exit_code  # stopped, and resumable by the same command
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Flags that name what is read: given twice, both would seem taken.
ONCE = ("source", "data_path", "val_path", "tokenizer_path", "special_tokens", "prompt")

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error that would end in one line.")
flags.disclaim_key_flags()  # those defined below are of the modules that call


def run(main: Callable[..., int | None], arguments: int = 0, *, restarted: bool = False) -> NoReturn:
    """Parses flags, calls main() with up to `arguments` words that are no flags, and exits with what it returns.

    A UserError ends in one line on stderr and its exit code; so do a file that cannot be read or written, and too
    little memory, with 3, except in a command that is `restarted` after it: there it is a crash. Ctrl-C ends in one
    line and 130, except in launch.train, which handles the signal. With several processes any other exception ends
    this one at once: an ordinary exit would wait in JAX's shutdown barrier for peers that wait for this one.
    """

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may have left it ignored: no exit code could be read

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            argv = _with_recipe_expanded(argv)
            _check_config_names(argv)
            rest = flags.FLAGS(argv)
            _check_given_once()
            if len(rest) > 1 + arguments:
                raise ConfigError(f"unexpected argument {rest[-1]!r}; flags are written --name=value")
            for name in flags.FLAGS:
                if isinstance(value := flags.FLAGS[name].value, float) and math.isnan(value):
                    raise ConfigError(f"--{name}={value} is not a number")
            return rest
        except UserError as e:
            _fail(e)
        except flags.UnrecognizedFlagError as e:
            known = [name for name in flags.FLAGS if not name.startswith("?")]
            _fail(ConfigError(f"unknown flag --{e.flagname}{_nearest(e.flagname, known)}"))
        except (flags.Error, ValueError, TypeError) as e:
            _fail(ConfigError(" ".join(str(e).split())))

    def guarded(argv: Sequence[str]) -> NoReturn:
        if "json" in flags.FLAGS and flags.FLAGS["json"].value:
            _messages_to_stderr()
        try:
            code = main(*argv[1:]) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # what reads our output, such as head, has enough
            _exit(1)
        except UserError as e:
            _fail(e)
        except BaseException as e:
            if isinstance(e, OSError) and not restarted:
                where = e.filename or "what this command reads or prints"
                _fail(DataError(f"{where}: {e.strerror or e}; mend that, or name another file or folder"))
            if isinstance(e, MemoryError) and not restarted:
                what = f" ({e})" if str(e) else ""
                _fail(DataError(f"not enough memory{what}; ask for smaller sizes or fewer --workers, or give it more"))
            if not _several_processes():
                raise
            logging.exception("meshlm: this process ends, and with it the others")
            _exit(1)
        _exit(code)

    _fill_closed_streams()
    _write_any_character()
    _log_to_console()
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt as e:
        for number in (signal.SIGINT, *ENDS):
            signal.signal(number, signal.SIG_DFL)  # a second one while this process ends its own is no traceback
        log.error("\n%s", INTERRUPTED_LINE)
        _exit(ENDED + e.number if isinstance(e, Ended) else INTERRUPTED, wait=False)
    raise AssertionError("app.run does not return")


class Ended(KeyboardInterrupt):
    """A signal that asks this process to end: it ends as by Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def end_in_one_line() -> None:
    """SIGTERM, a closed terminal and the like end this command as Ctrl-C does, with 128 and their number: for commands
    that have something to remove or to close first."""

    def end(number: int, _: object) -> NoReturn:
        raise Ended(number)

    for number in ENDS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)


def _fail(error: UserError) -> NoReturn:
    if flags.FLAGS.is_parsed() and DEBUG.value:
        logging.error("meshlm: the error in full", exc_info=error)
    log.error("error: %s", visible(" ".join(str(error).split())))
    _exit(error.exit_code)


def visible(text: str) -> str:
    """In one line; control characters, such as those of a terminal in the name of a file, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _fill_closed_streams() -> None:
    """A stream that the caller closed becomes /dev/null; else the next file that is opened would take its place."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _write_any_character() -> None:
    """What the console's encoding does not have, and what is no character (in the name of a file), is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: int, wait: bool = True) -> NoReturn:
    """Without `wait` for threads: one that is in a library when Python ends them makes the process abort instead."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again, and leave with 120
            _discard(stream)
    alone = not _several_processes()
    if wait and alone:
        sys.exit(code)
    if alone:
        atexit._run_exitfuncs()  # those of multiprocessing remove its semaphores
    os._exit(code)


def _discard(stream: TextIO) -> None:
    """The pipe or terminal behind it is closed: what is still to be written goes nowhere, and is no error any more."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


class _Console(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _discard(self.stream)  # nobody reads it any more; that changes neither the run nor its exit code
        else:
            super().handleError(record)


def _log_to_console() -> None:
    """Messages as they are: errors to stderr, the rest to stdout."""
    log.setLevel(logging.INFO)
    log.propagate = False
    out, err = _Console(sys.stdout), _Console(sys.stderr)
    out.addFilter(lambda record: record.levelno < logging.ERROR)
    err.setLevel(logging.ERROR)
    for handler in (out, err):
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def _messages_to_stderr() -> None:
    """For commands whose stdout a program reads."""
    for handler in log.handlers:
        if isinstance(handler, _Console):
            handler.setStream(sys.stderr)


def quiet_console() -> None:
    """Only warnings and errors from here on: for the processes whose messages process 0 prints already."""
    for handler in log.handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


def log_to_file(path: pathlib.Path) -> None:
    """The same messages with times, and the warnings of the libraries.

    Orbax's, some hundred lines for a save that fails, of which a line of ours says why, are there alone.
    """
    for console in logging.getLogger().handlers:
        console.addFilter(lambda record: "orbax" not in pathlib.PurePath(record.pathname).parts)
    sys.excepthook = _without_closed_loops(sys.excepthook)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # the disk is full: the console has it
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    logging.getLogger().addHandler(handler)


def _without_closed_loops(hook: Callable[..., object]) -> Callable[..., object]:
    """Of a save that failed tensorstore's threads find Orbax's event loop closed, once for each array."""
    return lambda kind, error, trace: None if str(error) == "Event loop is closed" else hook(kind, error, trace)


# Paths


class _PathParser(flags.ArgumentParser[str]):
    def __init__(self, parse: Callable[[str], str]):
        self._parse = parse

    def parse(self, argument: str) -> str:
        return self._parse(argument)

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag with a path of this machine, as `local_path` reads it."""
    return flags.DEFINE(_PathParser(local_path), name, default, help)


def define_run_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """The same, for what libraries write to."""
    return flags.DEFINE(_PathParser(run_path), name, default, help)


def define_data_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """The same, but it may be in an object store, too."""
    return flags.DEFINE(_PathParser(expanded), name, default, help)


def check_flag(name: str, check: Callable[[Any], object]) -> None:
    """What `check` refuses of the value of a flag (DataError) is a mistake in a flag, and ends with 2 as others do."""

    def valid(value: object) -> bool:
        try:
            check(value)
        except DataError as e:
            raise flags.ValidationError(str(e)) from None
        return True

    flags.register_validator(name, valid)


def local_path(path: str) -> str:
    """As `expanded`. Raises ConfigError for gs:// and s3://, too: a folder of that name would be made here."""
    if is_remote(path):
        raise ConfigError(f"{path} is in an object store, and a path of this machine is needed; copy what is there")
    return expanded(path)


def run_path(path: str) -> str:
    """As `local_path`. Raises ConfigError for a name that is not UTF-8: Orbax, TensorStore and XLA take no other."""
    found = local_path(path)
    try:
        with contextlib.suppress(OSError):  # the current folder is gone; who uses the path says so
            os.path.realpath(found).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path} has a name that is not UTF-8, or the locale (LC_ALL) is not; no checkpoint can be written there"
        ) from None
    return found


def expanded(path: str) -> str:
    """The path with a leading `~` or `~user` replaced, which a shell leaves in --out=~/x; ./~ is a file of that name.

    Raises:
      ConfigError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{path} begins with the home of a user {user[1:]!r} who is not known; ./{user} is a file")
    return found


def _with_recipe_expanded(argv: Sequence[str]) -> list[str]:
    words = list(argv)
    for i, word in enumerate(argv):
        match = CONFIG_ARGUMENT.match(word)
        if match and not match["path"] and match["value"]:
            words[i] = f"--config={expanded(match['value'])}"
        elif i and argv[i - 1] in ("--config", "-config"):
            words[i] = expanded(word)
    return words


def _check_given_once() -> None:
    """Of a flag that is given twice the last counts, as is usual; but not where the first would be left out unseen."""
    for name in ONCE:
        if name in flags.FLAGS and (times := flags.FLAGS[name].present) > 1:
            raise ConfigError(f"--{name} is given {times} times; it takes one value")


# Configuration

PATH_FIELDS = ("data.path", "data.val_path", "data.tokenizer_path", "checkpoint.mirror")
CONFIG_ARGUMENT = re.compile(r"^--?config(?P<path>(\.\w+)*)(=(?P<value>.*))?$", re.DOTALL)


def define_config() -> flags.FlagHolder:
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe, as configs/NAME.py or configs/NAME.py:VARIANT. Override any field with --config.section.field=value; "
        "trainer/config.py, model/config.py and data/config.py list them.",
        lock_config=True,
    )


def config_from(value: ConfigDict | None) -> Config:
    """The typed, validated configuration. Raises ConfigError."""
    if value is None:
        raise ConfigError("--config is missing; name a recipe, for example --config=configs/tiny.py")
    fields = value.to_dict()
    for section, _, name in (field.partition(".") for field in PATH_FIELDS):
        values = fields.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            paths = re.split(r"((?<!\\),\s*)", values[name])
            values[name] = "".join(expanded(path) for path in paths)
    return from_dict(fields)


def _check_config_names(argv: Sequence[str]) -> None:
    """Raises ConfigError for a recipe that is not there, or a --config.FIELD that the recipe does not have."""
    matches = [m for m in map(CONFIG_ARGUMENT.match, argv[1:]) if m]
    recipes = [m["value"] for i, m in enumerate(matches) if not m["path"]]
    for i, argument in enumerate(argv[1:-1], start=1):
        if argument in ("--config", "-config"):
            recipes = [argv[i + 1]]
    if not recipes or recipes[-1] is None or "config" not in flags.FLAGS:
        return
    config = _load_recipe(recipes[-1])
    for match in matches:
        node, names = config, match["path"].split(".")[1:]
        for depth, name in enumerate(names):
            last = depth == len(names) - 1
            if not isinstance(node, ConfigDict) or name not in node:
                given = ".".join(names)
                raise ConfigError(f"unknown field --config.{given}{_nearest(given, _fields(config), '--config.')}")
            node = node[name]
            if last and isinstance(node, ConfigDict):
                raise ConfigError(f"--config.{'.'.join(names)} is a section; set one of its fields: {', '.join(node)}")
        if names and match["value"] is not None:
            _check_type(".".join(names), node, match["value"])


def _check_type(name: str, default: object, text: str) -> None:
    """Raises ConfigError when `text` cannot stand for a value of the type of `default`."""
    kind = type(default)
    try:
        if kind is bool:
            if text.lower() not in ("true", "false", "1", "0", "t", "f", "yes", "no", "y", "n"):
                raise ValueError
        elif kind in (int, float):
            kind(text)
    except ValueError:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"config.{name} is {text!r}; it must be {wanted}, such as {default}") from None


def _load_recipe(value: str) -> ConfigDict:
    path, _, variant = value.partition(":")
    if not os.path.isfile(path):
        if any(os.path.isfile(value[: match.start()]) for match in re.finditer(":|$", value)):
            raise ConfigError(f"--config={value}: a colon begins the variant, so the path must have none; rename it")
        there: list[str] = []
        with contextlib.suppress(OSError):  # the folder is not there, or not to be read: nothing to propose
            there = [os.path.join(os.path.dirname(path), f) for f in os.listdir(os.path.dirname(path) or ".")]
        raise ConfigError(f"--config={value}: there is no file {path}{_nearest(path, there)}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={value}: a recipe is a Python file, and {path} is none")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return _get_config(module, variant)
    except Exception as e:
        raise ConfigError(f"--config={value}: {type(e).__name__}: {e}") from e


def _get_config(module: ModuleType, variant: str) -> ConfigDict:
    return module.get_config(variant) if variant else module.get_config()


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in config.items():
        names += _fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def _nearest(given: str, known: Sequence[str], prefix: str = "--") -> str:
    """'; did you mean …?' or nothing."""
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if not found:  # right name, wrong section
        found = [name for name in known if name.split(".")[-1] == given.split(".")[-1]][:1]
    if not found:
        return ""
    return f"; did you mean {'' if '/' in found[0] else prefix}{found[0]}?"
