"""Batches."""

from primeflow_perturbench.benchmark.embedded.data.types import Batch

__all__ = ["Batch"]
