"""Transforms of batches."""

from primeflow_perturbench.perturbench.embedded.data.transforms.pipelines import SingleCellPipeline

__all__ = ["SingleCellPipeline"]
