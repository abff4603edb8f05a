"""What the subcommands share: the console, and how bad input is answered."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

# The first process on a machine, where that has started this one, or the launcher of both.
PARENT = os.getppid()
# Longer than the first process takes to end, or a launcher to end the others once one has failed.
GRACE_SECONDS = 15
# What gloo, NCCL and the store of all processes say where one at the other end is gone.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exiting",
    "Connection was likely closed",
)


def is_first() -> bool:
    """Whether this is the first of the processes that a launcher has started, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def make_console() -> Console:
    """Console for people, silent but on the first of several processes; our warnings in plain sentences."""
    console = Console(quiet=not is_first())
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    warnings.filterwarnings("ignore")
    return console


def quieten_lightning() -> None:
    """Let Lightning report errors alone; to be called once it is imported, for then it sets its loggers."""
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)


def answering(work: Callable[[], object]) -> None:
    """Do the work; bad input ends with one sentence and status 2, another process's end with a note and status 1."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue

    from primeflow_perturbench.errors import InputError
    from primeflow_perturbench.perturbench.backend import load_embedded

    DataError = load_embedded("errors.DataError")

    try:
        work()
    except MissingMandatoryValue as error:
        refuse(f"{error.full_key} must be given: add {error.full_key}=VALUE")
    except InstantiationException as error:
        # A wrong value or an unknown name in the settings; anything else is a fault of ours and shows its trace.
        for cause in (error.__cause__, getattr(error.__cause__, "__cause__", None)):
            if isinstance(cause, ValueError | TypeError):
                refuse(str(cause))
        raise
    except (InputError, DataError) as error:
        refuse(str(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        if is_first():
            Console(stderr=True).print("Another process of this run has ended, and this one with it.", soft_wrap=True)
        sys.exit(1)


def refuse(sentence: str) -> None:
    """Print why and end with status 2; where all of several processes would say the same, the first alone does."""
    if not is_first():
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            if os.getppid() != PARENT:
                sys.exit(2)
    Console(stderr=True).print(f"[bold red]error:[/bold red] {sentence}", highlight=False, soft_wrap=True)
    sys.exit(2)
