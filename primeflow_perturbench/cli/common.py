"""Shared by the subcommands: the console, and how errors end a command."""

import argparse
import errno
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from primeflow_perturbench.console import PlainConsole, flagged
from primeflow_perturbench.errors import InputError, first_line, with_nearest

# The launcher of this process: the first process of a run, torchrun or srun.
PARENT = os.getppid()
# Longer than the first process needs to print its error, or a launcher needs to end the other processes.
GRACE_SECONDS = 15
# Exit statuses of a program that SIGINT or SIGTERM ended.
INTERRUPTED, TERMINATED = 130, 143
HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "write to another disk, or raise the limit of file sizes",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path on another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EEXIST: "there is a file in the place of a folder; give another path",
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "give a shorter path",
}
PACKAGE = "primeflow_perturbench."
# Parts of the messages of gloo, NCCL and TCPStore when another process is gone.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exiting",
    "Connection was likely closed",
)


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


class LogPrinter(logging.Handler):
    """Prints log messages on a console."""

    def __init__(self, console: PlainConsole):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        self.console.print(self.format(record))


def make_console() -> PlainConsole:
    """Console that only the first process prints to; log messages are printed on it without decoration."""
    console = PlainConsole(quiet=not is_first())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogPrinter(console)], force=True)
    warnings.filterwarnings("ignore")
    return console


def exit_on_sigterm() -> None:
    """Let SIGTERM raise, so that temporary files are removed and child processes end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


def quieten_lightning() -> None:
    """Let Lightning log errors only. Call it after the import of Lightning, which sets its log levels."""
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)


def answering(work: Callable[[], object]) -> None:
    """Do the work and turn errors into exit statuses.

    Invalid input, and a disk or memory that is full, print one sentence and exit with status 2. The loss of another
    process of the run exits with status 1, an interruption with 130. Any other error is a bug: its traceback goes to a
    file, or to the terminal if the environment variable PRIMEFLOW_DEBUG is set.
    """
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended. Python flushes again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        exit_with_note("Interrupted.", INTERRUPTED)
    except Exception as error:
        if (sentence := explain(error)) is not None:
            exit_with_error(sentence)
        if any(words in str(error) for words in LOST):
            exit_with_note("Another process of this run has ended, so this one ends too.", 1)
        if os.environ.get("PRIMEFLOW_DEBUG"):
            raise
        with tempfile.NamedTemporaryFile("w", prefix="primeflow-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        exit_with_error(
            f"an unexpected error, {type(error).__name__}: {first_line(error)}; this is a bug, please report it with "
            f"the traceback in {file.name}",
            status=1,
        )


def explain(error: Exception) -> str | None:
    """A sentence about an error that a user can do something about; ``None`` for any other error."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from primeflow_perturbench.perturbench.backend import load_embedded
    from primeflow_perturbench.training.overrides import explain_override

    if isinstance(error, InputError | UsageError | load_embedded("errors.DataError")):
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=VALUE"
    if isinstance(error, HydraException | OmegaConfBaseException) and not isinstance(error, InstantiationException):
        return explain_override(error)
    if (sentence := explain_disk(error)) is not None:
        return sentence
    if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
        return f"the memory does not suffice ({first_line(error)}); free some, or use a smaller file or smaller batches"
    if isinstance(error, InstantiationException):
        # Hydra wraps the error of an object that rejects a value or an unknown setting.
        causes = (error.__cause__, getattr(error.__cause__, "__cause__", None))
        cause = next((each for each in causes if isinstance(each, ValueError | TypeError)), error.__cause__ or error)
        return str(cause) if isinstance(cause, InputError) else first_line(cause)
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; this module does not import it
        return first_line(error)
    # Our own objects report values that they refuse as ValueError.
    return first_line(error) if isinstance(error, ValueError) and raised_by(error).startswith(PACKAGE) else None


def raised_by(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


def explain_disk(error: BaseException | None) -> str | None:
    """A sentence about an error of the file system, or about one that it caused; ``None`` for any other error."""
    if error is None:
        return None
    # HDF5 and PyTorch mention the number of the error in their message.
    named = re.search(r"errno = (\d+)", str(error))
    number = int(named[1]) if named else error.errno if isinstance(error, OSError) else None
    if "PytorchStreamWriter failed writing" in str(error) or "file write failed" in str(error):
        number = number or errno.ENOSPC
    if number is None and not isinstance(error, OSError):
        return explain_disk(error.__cause__ or error.__context__)
    name = getattr(error, "filename", None)
    reason = os.strerror(number).lower() if number else first_line(error)
    hint = HINTS.get(number, "check the path and the disk")
    return f"{name}: {reason}; {hint}" if name else f"a file cannot be read or written: {reason}; {hint}"


def exit_with_note(message: str, status: int) -> NoReturn:
    """Print a message that is no error on the error stream, once, and exit."""
    if is_first():
        PlainConsole(stderr=True).print(message)
    sys.exit(status)


def exit_with_error(message: str, status: int = 2) -> NoReturn:
    """Print the message and exit.

    All processes of a run usually fail with the same message, so the others give the first one time to print it.
    """
    if not is_first():
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            if os.getppid() != PARENT:
                sys.exit(status)
    PlainConsole(stderr=True).print(flagged("error", message))
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """Parser that suggests the nearest option, and lets the values of a list end where a missing argument begins."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does; ``--covariate-keys a file.h5ad`` leaves the file to the command's own argument."""
        given = list(sys.argv[1:] if args is None else args)
        before = {} if namespace is None else dict(vars(namespace))
        try:
            found, rest = super().parse_known_args(given, namespace)
        except UsageError as error:
            missing = re.search("arguments are required: (.*)", str(error))
            for arguments in rearranged(given, missing[1].count(",") + 1) if missing else ():
                try:
                    return super().parse_known_args(arguments, argparse.Namespace(**before))
                except UsageError:
                    continue
            exit_with_error(f"{with_choice(error)}; {self.prog} --help shows how it is used")
        if unknown := [argument.partition("=")[0] for argument in rest if re.match("--?[a-zA-Z]", argument)]:
            known = with_nearest(unknown, self._option_string_actions)
            exit_with_error(f"unknown option {known}; {self.prog} --help lists the options")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise what `parse_known_args` reports."""
        raise UsageError(message)


class UsageError(Exception):
    """A command line that a parser cannot read."""


def at_least(least: int) -> Callable[[str], int]:
    """A type of options: whole numbers from ``least`` on."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number


def rearranged(arguments: list[str], count: int) -> Iterator[list[str]]:
    """Ways to move the last ``count`` values of a list of values to the end, where they are arguments of their own."""
    ends = [i for i, each in enumerate(arguments) if each.startswith("-") and i > count] + [len(arguments)]
    for end in reversed(ends):
        moved = arguments[end - count : end]
        if end > count and not any(each.startswith("-") for each in arguments[end - count - 1 : end]):
            yield [*arguments[: end - count], *arguments[end:], "--", *moved]


def with_choice(error: UsageError) -> str:
    """The message of an error, with the nearest of the choices."""
    if match := re.search(r"^argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", str(error)):
        choices = [choice.strip("' ") for choice in match[3].split(",")]
        return (
            f"unknown {match[1] or 'argument'} {with_nearest([match[2]], choices)}, choose among {', '.join(choices)}"
        )
    return str(error)
