"""Data sets."""

from primeflow_perturbench.perturbench.embedded.data.datasets import (
    Counterfactual,
    CounterfactualWithReference,
    SingleCellPerturbation,
    SingleCellPerturbationWithControls,
)

__all__ = [
    "Counterfactual",
    "CounterfactualWithReference",
    "SingleCellPerturbation",
    "SingleCellPerturbationWithControls",
]
