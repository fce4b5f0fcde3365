"""What all commands share: configuration flags, one-line errors with exit codes, logging.

Nothing here imports JAX, so a mistyped flag or field is reported at once.
"""

import atexit
import contextlib
import dataclasses
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
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn, TextIO

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from data.errors import DataError, UserError
from data.storage.remote import is_remote
from launch import ENDED, INTERRUPTED, INTERRUPTED_LINE
from trainer import fields
from trainer.config import Config, from_dict
from trainer.errors import ConfigError, Stopped

log = logging.getLogger("meshlm")

STOPPED = Stopped.exit_code  # stopped, and resumable by the same command
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Flags that name an input. A user who gives such a flag twice may expect that both inputs are read.
ONCE = ("source", "data_path", "val_path", "tokenizer_path", "special_tokens", "prompt")

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error that would end in one line.")
flags.disclaim_key_flags()  # the flags defined below belong to the calling modules


HELP = {"help", "helpshort", "helpfull", "helpxml", "h", "?"}  # absl's flags


def run(main: Callable[..., int | None], arguments: int = 0, *, restarted: bool = False) -> NoReturn:
    """Parses flags, calls main() with up to `arguments` positional arguments, and exits with the code it returns.

    A UserError ends in one line on stderr and its exit code. A file that cannot be read or written, or too little
    memory, ends in one line and exit code 3; in a command that is `restarted` after a crash both count as crashes.
    Ctrl-C ends in one line and 130, except in launch.train, which handles the signal. With several processes any
    other exception ends this process at once: JAX's shutdown barrier would wait for processes that wait for this one.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if the parent ignores SIGCHLD, children have no exit code
    _fill_closed_streams()
    _escape_unprintable()
    _log_to_console()
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        app.run(
            lambda argv: _call(main, argv[1:], restarted), flags_parser=lambda argv: _parse_or_exit(argv, arguments)
        )
    except KeyboardInterrupt as e:
        for number in (signal.SIGINT, *END_SIGNALS):
            signal.signal(number, signal.SIG_DFL)  # a second signal, while this process exits, shows no traceback
        log.error("\n%s", INTERRUPTED_LINE)
        _exit(ENDED + e.number if isinstance(e, Ended) else INTERRUPTED, wait=False)
    raise AssertionError("app.run does not return")


def _parse_or_exit(argv: Sequence[str], arguments: int) -> list[str]:
    """Parses the flags; returns the program's name and the positional arguments."""
    try:
        if CONFIG_FLAG in flags.FLAGS:
            argv, overrides = _split_overrides(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False))
        rest = flags.FLAGS(argv)
        if CONFIG_FLAG in flags.FLAGS and (recipe := flags.FLAGS[CONFIG_FLAG].value) is not None:
            recipe.override(overrides)
        _check_given_once()
        if len(rest) > 1 + arguments:
            raise ConfigError(f"unexpected argument {rest[-1]!r}; flags are written --name=value")
        for name in flags.FLAGS:
            if isinstance(value := flags.FLAGS[name].value, float) and math.isnan(value):
                raise ConfigError(f"--{name}={value} is not a number")
        return rest
    except SystemExit:
        if HELP.isdisjoint(word.lstrip("-") for word in argv if word.startswith("-")):
            raise  # a recipe exits
        raise SystemExit(0) from None  # absl, which has printed the help, exits with 1
    except UserError as e:
        _fail(e)
    except flags.UnrecognizedFlagError as e:
        known = [name for name in flags.FLAGS if not name.startswith("?")]
        _fail(ConfigError(f"unknown flag --{e.flagname}{_nearest(e.flagname, known)}"))
    except (flags.Error, ValueError, TypeError) as e:
        _fail(ConfigError(" ".join(str(e).split())))


def _call(main: Callable[..., int | None], arguments: Sequence[str], restarted: bool) -> NoReturn:
    """Calls main and exits with its code, or with that of its error."""
    if "json" in flags.FLAGS and flags.FLAGS["json"].value:
        _messages_to_stderr()
    try:
        code = main(*arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads our output, such as head, has closed it
        _exit(1)
    except UserError as e:
        _fail(e)
    except BaseException as e:
        if isinstance(e, OSError) and not restarted:
            where = e.filename or "what this command reads or prints"
            _fail(DataError(f"{where}: {e.strerror or e}; fix that, or name another file or folder"))
        if isinstance(e, MemoryError) and not restarted:
            what = f" ({e})" if str(e) else ""
            _fail(DataError(f"not enough memory{what}; ask for smaller sizes or fewer --workers, or give it more"))
        if not _several_processes():
            raise
        logging.exception("meshlm: this process ends, and with it the others")
        _exit(1)
    _exit(code)


class Ended(KeyboardInterrupt):
    """Raised when a signal asks this process to end, which then ends as it does by Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def end_in_one_line() -> None:
    """SIGTERM, SIGHUP and SIGUSR1 end this command as Ctrl-C does, with exit code 128 + their number: it is for
    commands that have to remove or close something before they end."""

    def end(number: int, _: object) -> NoReturn:
        raise Ended(number)

    for number in END_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)


def _fail(error: UserError) -> NoReturn:
    if flags.FLAGS.is_parsed() and DEBUG.value:
        logging.error("meshlm: the error in full", exc_info=error)
    log.error("error: %s", visible(" ".join(str(error).split())))
    _exit(error.exit_code)


def visible(text: str) -> str:
    """The text in one line; control characters, which a file name may contain, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _fill_closed_streams() -> None:
    """Replaces streams that the caller closed by /dev/null; otherwise the next opened file would take their place."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _escape_unprintable() -> None:
    """Escapes characters that the console's encoding lacks, and bytes of file names that are not text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: int, wait: bool = True) -> NoReturn:
    """Exits; wait=False skips the wait for threads: Python aborts if it ends while a thread is in a library."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again, and exit with 120
            _discard(stream)
    single = not _several_processes()
    if wait and single:
        sys.exit(code)
    if single:
        atexit._run_exitfuncs()  # multiprocessing's exit functions remove its semaphores
    os._exit(code)


def _discard(stream: TextIO) -> None:
    """Sends pending and later output of a closed pipe or terminal to /dev/null, so that writing it is not an error."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


# Logging


class _Console(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _discard(self.stream)  # no one reads it any more; the run and its exit code stay the same
        else:
            super().handleError(record)


def _log_to_console() -> None:
    """Prints messages as they are: errors to stderr, the rest to stdout."""
    log.setLevel(logging.INFO)
    log.propagate = False
    out, err = _Console(sys.stdout), _Console(sys.stderr)
    out.addFilter(lambda record: record.levelno < logging.ERROR)
    err.setLevel(logging.ERROR)
    for handler in (out, err):
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def _messages_to_stderr() -> None:
    """Sends all messages to stderr, for commands whose stdout is read by a program."""
    for handler in log.handlers:
        if isinstance(handler, _Console):
            handler.setStream(sys.stderr)


def quiet_console() -> None:
    """Prints only warnings and errors from here on: process 0 prints the messages for all processes."""
    for handler in log.handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


def log_to_file(path: pathlib.Path) -> None:
    """Writes the same messages with times, and the libraries' warnings, to a file.

    Orbax's messages go only to the file: a failed save logs some hundred lines, and a line of ours gives the reason.
    """
    for console in logging.getLogger().handlers:
        console.addFilter(lambda record: "orbax" not in pathlib.PurePath(record.pathname).parts)
    sys.excepthook = _without_closed_loops(sys.excepthook)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # disk full: the console has the message
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    logging.getLogger().addHandler(handler)


def _without_closed_loops(hook: Callable[..., object]) -> Callable[..., object]:
    """Hides an error that tensorstore's threads raise for each array of a failed save: Orbax's event loop is closed."""
    return lambda kind, error, trace: None if str(error) == "Event loop is closed" else hook(kind, error, trace)


# Flags


class _Parser(flags.ArgumentParser[Any]):
    """Parses the text of a flag with the function `parse`."""

    def __init__(self, parse: Callable[[str], Any], kind: str = "path"):
        self._parse = parse
        self._kind = kind

    def parse(self, argument: str) -> Any:
        return self._parse(argument) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return self._kind


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag for a path on this machine; see `local_path`."""
    return flags.DEFINE(_Parser(local_path), name, default, help)


def define_run_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag for a path that libraries write to; see `run_path`."""
    return flags.DEFINE(_Parser(run_path), name, default, help)


def define_data_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag for a path on this machine or in an object store."""
    return flags.DEFINE(_Parser(expanded), name, default, help)


def check_flag(name: str, check: Callable[[Any], object]) -> None:
    """Reports a DataError of `check` as a mistake in the flag, with exit code 2 as for other flags."""

    def valid(value: object) -> bool:
        try:
            check(value)
        except DataError as e:
            raise flags.ValidationError(str(e)) from None
        return True

    flags.register_validator(name, valid)


def local_path(path: str) -> str:
    """As `expanded`, but raises ConfigError for gs:// and s3://, which would become the name of a local folder."""
    if is_remote(path):
        raise ConfigError(f"{path} is in an object store, and a path on this machine is needed; copy it first")
    return expanded(path)


def run_path(path: str) -> str:
    """As `local_path`. Raises ConfigError for a name that is not UTF-8: Orbax, TensorStore and XLA need UTF-8."""
    found = local_path(path)
    try:
        with contextlib.suppress(OSError):  # the current folder was deleted; the first use of the path reports it
            os.path.realpath(found).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path} has a name that is not UTF-8, or the locale (LC_ALL) is not; no checkpoint can be written there"
        ) from None
    return found


def expanded(path: str) -> str:
    """The path with a leading `~` or `~user` expanded, which a shell does not do in --out=~/x. ./~ is not expanded.

    Raises:
      ConfigError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{path} is in the home of a user {user[1:]!r} who is not known; write ./{user} for a file")
    return found


def _check_given_once() -> None:
    """Refuses an input flag that is given twice: only its last value would count, and the other be ignored silently."""
    for name in ONCE:
        if name in flags.FLAGS and (times := flags.FLAGS[name].present) > 1:
            raise ConfigError(f"--{name} is given {times} times; it takes one value")


def _nearest(given: str, known: Sequence[str], prefix: str = "--") -> str:
    """'; did you mean …?', or '' if no known name is similar."""
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if not found:  # the right field in the wrong section
        found = [name for name in known if name.split(".")[-1] == given.split(".")[-1]][:1]
    if not found:
        return ""
    return f"; did you mean {'' if '/' in found[0] else prefix}{found[0]}?"


# Configuration

CONFIG_FLAG = "config"
PATH_FIELDS = ("init_from", "init_adapters", "data.path", "data.val_path", "data.tokenizer_path", "checkpoint.mirror")
OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<name>[^=]*)(=(?P<text>.*))?", re.DOTALL)


@dataclasses.dataclass
class Recipe:
    """A recipe file's configuration, with what --config.section.field=value overrides."""

    name: str  # as it was given: configs/NAME.py or configs/NAME.py:VARIANT
    config: ConfigDict

    def override(self, values: dict[str, Any]) -> None:
        """Sets fields, by dotted name, in the ConfigDict itself: fields of the recipe that refer to them follow."""
        for name, value in values.items():
            *sections, field = name.split(".")
            node = self.config
            for section in sections:
                if section not in node:
                    node[section] = ConfigDict()
                node = node[section]
                if not isinstance(node, ConfigDict):
                    raise ConfigError(f"--config={self.name}: {section} is {node!r}; it must be a section")
            with node.ignore_type():  # the dataclass determines the type, not the value in the recipe
                node[field] = value


def define_config() -> flags.FlagHolder:
    return flags.DEFINE(
        _Parser(load_recipe, "recipe"),
        CONFIG_FLAG,
        None,
        "Recipe: configs/NAME.py or configs/NAME.py:VARIANT. Override any field with --config.section.field=value; "
        "trainer/config.py, model/config.py and data/config.py list them.",
    )


def config_from(recipe: Recipe | None) -> Config:
    """The typed, validated configuration. Raises ConfigError."""
    if recipe is None:
        raise ConfigError("--config is missing; name a recipe, for example --config=configs/tiny.py")
    tree = recipe.config.to_dict()
    for section, _, name in (field.rpartition(".") for field in PATH_FIELDS):
        values = tree.get(section) if section else tree
        if isinstance(values, dict) and isinstance(values.get(name), str):
            paths = re.split(r"((?<!\\),\s*)", values[name])
            values[name] = "".join(expanded(path) for path in paths)
    return from_dict(tree)


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words that are not overrides of fields, and the overrides: dotted names and values.

    Raises:
      ConfigError: there is no such field, or the text is not a value of its type.
    """
    kinds = dict(fields.leaves(Config))
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif match := OVERRIDE.fullmatch(word):
            name = match["name"]
            _check_field(name, kinds)
            overrides.pop(name, None)  # the last one counts, and takes its place in the order
            overrides[name] = _override_value(name, kinds[name], match, words)
        else:
            rest.append(word)
    return rest, overrides


def _check_field(name: str, kinds: dict[str, Any]) -> None:
    if name in kinds:
        return
    if inside := [other.removeprefix(f"{name}.") for other in kinds if other.startswith(f"{name}.")]:
        raise ConfigError(f"--config.{name} is a section; set one of its fields: {', '.join(inside)}")
    raise ConfigError(f"unknown field --config.{name}{_nearest(name, list(kinds), '--config.')}")


def _override_value(name: str, kind: Any, match: re.Match[str], words: Iterator[str]) -> Any:
    """The value of a field from --config.NAME=TEXT, from --config.NAME TEXT, or of a switch: --[no]config.NAME."""
    text = match["text"]
    if text is None and kind is bool:
        return not match["no"]
    if match["no"]:
        raise ConfigError(f"unknown flag {match[0]}; write --config.{name}=VALUE")
    if text is None and (text := next(words, None)) is None:
        raise ConfigError(f"--config.{name} has no value; write --config.{name}=VALUE")
    try:
        return fields.from_text(kind, text)
    except ValueError:
        default = fields.to_text(fields.flatten(Config())[name])
        example = f", such as {default}" if default.strip() else ""
        raise ConfigError(f"config.{name} is {text!r}; it must be {fields.describe(kind)}{example}") from None


def load_recipe(value: str) -> Recipe:
    """The recipe NAME.py or NAME.py:VARIANT. Raises ConfigError."""
    value = expanded(value)
    path, _, variant = value.partition(":")
    if not os.path.isfile(path):
        if any(os.path.isfile(value[: match.start()]) for match in re.finditer(":|$", value)):
            raise ConfigError(f"--config={value}: a colon begins the variant, so the path must have none; rename it")
        there: list[str] = []
        with contextlib.suppress(OSError):  # the folder is missing or cannot be read: nothing to suggest
            there = [os.path.join(os.path.dirname(path), f) for f in os.listdir(os.path.dirname(path) or ".")]
        raise ConfigError(f"--config={value}: there is no file {path}{_nearest(path, there)}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={value}: {path} is not a Python file, and a recipe is one")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = _get_config(module, variant)
        config = config if isinstance(config, ConfigDict) else ConfigDict(config, convert_dict=True)
        return Recipe(value, config.unlock())
    except Exception as e:
        raise ConfigError(f"--config={value}: {type(e).__name__}: {e}") from e


def _get_config(module: ModuleType, variant: str) -> Any:
    return module.get_config(variant) if variant else module.get_config()
