"""Transforms of raw labels and matrices to tensors."""

import numpy as np
import torch

from perturbench.data.transforms.base import Dispatch


def dense(values):
    """Dense float tensor of a sparse matrix, an array or a tensor; nothing else, ``None`` included."""
    if isinstance(values, torch.Tensor):
        return values.float()
    return torch.as_tensor(np.asarray(values.todense() if hasattr(values, "todense") else values), dtype=torch.float32)


class MultiHot:
    """Lists of names as multi-hot rows."""

    def __init__(self, names):
        self.columns = {name: column for column, name in enumerate(names)}

    def __call__(self, labels):
        rows = torch.zeros(len(labels), len(self.columns))
        for row, parts in enumerate(labels):
            if unknown := set(parts) - set(self.columns):
                raise ValueError(f"Labels {unknown} not found in the encoder classes")
            rows[row, [self.columns[part] for part in parts]] = 1
        return rows


class Covariates:
    """One-hot rows of categorical covariates, one column for a numeric covariate."""

    def __init__(self, uniques):
        self.encoders = {name: None if values is None else MultiHot(values) for name, values in uniques.items()}

    def __call__(self, covariates):
        return {name: self.encode(self.encoders[name], values) for name, values in covariates.items()}

    @staticmethod
    def encode(encoder, values):
        if encoder is None:
            return torch.as_tensor(np.asarray(values, dtype=np.float32))[:, None]
        return encoder([[value] for value in values])


class LinearModelPipeline(Dispatch):
    """Perturbations, expression and covariates as tensors."""

    def __init__(self, perturbation_uniques, covariate_uniques, use_perturbation_embedding=False):
        super().__init__(
            perturbations=dense if use_perturbation_embedding else MultiHot(perturbation_uniques),
            gene_expression=dense,
            covariates=Covariates(covariate_uniques),
        )


class LinearModelPipelineControls(LinearModelPipeline):
    """The same, with control cells."""

    def __init__(self, perturbation_uniques, covariate_uniques, use_perturbation_embedding=False):
        super().__init__(perturbation_uniques, covariate_uniques, use_perturbation_embedding)
        self["controls"] = dense
