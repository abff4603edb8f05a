"""What a velocity network is trained on: where paths begin, how ends are paired, how often the condition is hidden."""

from dataclasses import dataclass
from typing import Literal

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.coupling import COUPLINGS

SOURCES = ("gaussian", "control")


@dataclass(frozen=True)
class Objective:
    """Settings of training, ``model.objective`` in the configuration.

    Attributes
    ----------
    condition_dropout
        Share of training cells whose condition is replaced by the null condition (Ho and Salimans 2022), in [0, 1).
    source
        Where paths begin: ``"gaussian"`` is standard normal noise, ``"control"`` a control cell of the training set
        with the same covariates, plus noise.
    source_noise
        Standard deviation of the noise added to a control cell, in units of the space.
    source_cells
        Maximum number of control cells kept for each combination of covariates.
    coupling
        How sources are paired with the cells of a batch: ``"independent"``, or ``"ot"`` for optimal transport.
    precondition
        Whether the network learns only what a Gaussian of each gene does not already predict.

    Raises
    ------
    InputError
        If a setting is out of range or contradicts another.
    """

    condition_dropout: float = 0.2
    source: Literal["gaussian", "control"] = "gaussian"
    source_noise: float = 0.1
    source_cells: int = 500
    coupling: Literal["independent", "ot"] = "independent"
    precondition: bool = False

    def __post_init__(self):
        if not 0 <= self.condition_dropout < 1:
            raise InputError(f"condition_dropout must be at least 0 and below 1, got {self.condition_dropout}")
        if self.source not in SOURCES:
            raise InputError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.coupling not in COUPLINGS:
            raise InputError(f"coupling must be one of {', '.join(COUPLINGS)}, got {self.coupling!r}")
        if not self.source_noise >= 0:
            raise InputError(f"source_noise must be at least 0, got {self.source_noise}")
        if self.source_cells < 1:
            raise InputError(f"source_cells must be at least 1, got {self.source_cells}")
        if self.source == "control" and self.precondition:
            raise InputError("precondition assumes a Gaussian source: set precondition=false or source=gaussian")
