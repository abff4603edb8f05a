"""Data sets."""

from primeflow_perturbench.benchmark.embedded.data.datasets import (
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
