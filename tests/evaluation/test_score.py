"""Files are scored only where both hold log1p expression."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.score import evaluate_files

COLUMNS = {
    "perturbation_key": "condition",
    "covariate_keys": [],
    "perturbation_control_value": "control",
    "perturbation_combination_delimiter": "+",
}


def write(path, values):
    obs = pd.DataFrame({"condition": ["control", "A"] * (len(values) // 2)}, index=[str(i) for i in range(len(values))])
    ad.AnnData(np.asarray(values, np.float32), obs=obs).write_h5ad(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (40, 12))
    return {
        "counts": write(tmp_path / "counts.h5ad", counts),
        "normalized": write(tmp_path / "normalized.h5ad", counts * 1.7),
        "log1p": write(tmp_path / "log1p.h5ad", np.log1p(counts * 1.7)),
    }


@pytest.mark.parametrize("wrong", ["counts", "normalized"])
@pytest.mark.parametrize("predicted", [True, False])
def test_another_scale_is_refused_in_either_file(files, wrong, predicted):
    pair = (files[wrong], files["log1p"]) if predicted else (files["log1p"], files[wrong])
    with pytest.raises(InputError, match="expected log1p of normalized counts"):
        evaluate_files(*pair, COLUMNS, "default", Console(quiet=True))


def test_the_same_scale_is_scored(files):
    summary = evaluate_files(files["log1p"], files["log1p"], COLUMNS, "default", Console(quiet=True))
    assert float(summary.loc["rmse_average"].iloc[0]) == pytest.approx(0, abs=1e-6)
