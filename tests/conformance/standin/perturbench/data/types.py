"""Batches."""

from primeflow_perturbench.perturbench.embedded.data.types import Batch

__all__ = ["Batch"]
