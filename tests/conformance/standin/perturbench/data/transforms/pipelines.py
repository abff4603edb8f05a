"""Transforms of batches."""

from primeflow_perturbench.benchmark.embedded.data.transforms.pipelines import SingleCellPipeline

__all__ = ["SingleCellPipeline"]
