"""How commands run that take Hydra's overrides."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from primeflow_perturbench.cli.common import Parser, answering
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.training.overrides import explain_override


def run_application(work: Callable[[DictConfig], Any], config: str) -> None:
    """Run a function with the configuration that the command line composes, once or for each run of a multirun."""
    # Hydra itself then prints nothing about an error and raises it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = options_first(sys.argv[1:])
    application = hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name=config)

    def compose_and_work() -> None:
        try:
            application(work)()
        except ValueError as error:  # Hydra's own, because `work` answers its errors
            raise InputError(explain_override(error)) from error

    answering(compose_and_work)


def options_first(arguments: list[str]) -> list[str]:
    """The options of Hydra before the overrides, because its parser takes no override after an option."""
    parser = get_args_parser()
    parser.__class__, parser.prog = Parser, f"primeflow {Path(sys.argv[0]).stem}"
    overrides = parser.parse_known_intermixed_args(arguments)[0].overrides or []
    rest = list(arguments)
    for override in reversed(overrides):
        del rest[len(rest) - 1 - rest[::-1].index(override)]
    return [*rest, *overrides]
