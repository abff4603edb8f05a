"""Shared by the subcommands: the console, and how errors end a command."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from primeflow_perturbench.console import PlainConsole, flagged

# The launcher of this process: the first process of a run, torchrun or srun.
PARENT = os.getppid()
# Longer than the first process needs to print its error, or a launcher needs to end the other processes.
GRACE_SECONDS = 15
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


def quieten_lightning() -> None:
    """Let Lightning log errors only. Call it after the import of Lightning, which sets its log levels."""
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)


def answering(work: Callable[[], object]) -> None:
    """Do the work and turn errors into exit statuses.

    Invalid input prints one sentence and exits with status 2. The loss of another process of the run prints a note and
    exits with status 1. Any other error is a bug and shows its traceback.
    """
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue

    from primeflow_perturbench.errors import InputError
    from primeflow_perturbench.perturbench.backend import load_embedded

    DataError = load_embedded("errors.DataError")

    try:
        work()
    except MissingMandatoryValue as error:
        exit_with_error(f"{error.full_key} must be given: add {error.full_key}=VALUE")
    except InstantiationException as error:
        # Hydra wraps the error of an object that rejects a value or an unknown setting.
        for cause in (error.__cause__, getattr(error.__cause__, "__cause__", None)):
            if isinstance(cause, ValueError | TypeError):
                exit_with_error(str(cause))
        raise
    except (InputError, DataError) as error:
        exit_with_error(str(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        if is_first():
            message = "Another process of this run has ended, so this one ends too."
            PlainConsole(stderr=True).print(message)
        sys.exit(1)


def exit_with_error(message: str) -> None:
    """Print the message and exit with status 2.

    All processes of a run usually fail with the same message, so the others give the first one time to print it.
    """
    if not is_first():
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            if os.getppid() != PARENT:
                sys.exit(2)
    PlainConsole(stderr=True).print(flagged("error", message))
    sys.exit(2)
