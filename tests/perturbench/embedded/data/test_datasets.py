"""Data sets: golden batches, matched controls, and unseen conditions."""

import json
import random
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from primeflow_perturbench.perturbench.embedded.data.cells import Keys
from primeflow_perturbench.perturbench.embedded.data.datasets import (
    Counterfactual,
    CounterfactualWithReference,
    SingleCellPerturbation,
    SingleCellPerturbationWithControls,
    known_conditions,
)
from primeflow_perturbench.perturbench.embedded.data.transforms.pipelines import LinearModelPipeline
from primeflow_perturbench.perturbench.embedded.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[4]
SCREEN = REPOSITORY / "tests" / "files" / "screen"
SHARED = REPOSITORY / ".." / "shared"
COLUMNS = {"perturbation_key": "condition", "covariate_keys": ["cell_type"]}


def with_transform(made):
    """A data set from `from_anndata` that returns tensors."""
    dataset, context = made
    dataset.transform = LinearModelPipeline(
        context["perturbation_uniques"],
        context["covariate_uniques"],
        perturbation_embeddings=dataset.perturbation_embeddings,
    )
    return dataset


def assert_same_batches(a, b) -> None:
    """Assert that all fields but the ids are equal."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), name
        elif isinstance(x, dict):
            assert all(torch.equal(x[key], y[key]) for key in x), name
        elif name != "id":
            assert x == y, name


# The golden files


@pytest.fixture(
    scope="module",
    params=[
        (SCREEN, SCREEN / "screen.h5ad"),
        pytest.param(
            (SHARED / "golden" / "devel", SHARED / "data" / "devel.h5ad"),
            marks=pytest.mark.skipif(not SHARED.exists(), reason="no ../shared beside the repository"),
        ),
    ],
    ids=["screen", "devel"],
)
def golden(request):
    """Folder of the golden files, and their cells with the split in ``obs``."""
    folder, path = request.param
    adata = ad.read_h5ad(path)
    adata.obs["split"] = pd.read_csv(folder / "split.csv", header=None, index_col=0)[1].reindex(adata.obs_names)
    return folder, adata


@pytest.fixture(scope="module")
def golden_train(golden):
    folder, adata = golden
    train = adata[(adata.obs["split"] == "train").to_numpy()]
    return folder, train, *SingleCellPerturbation.from_anndata(train, **COLUMNS)


def test_train_context_equals_perturbench(golden_train):
    folder, train, dataset, context = golden_train
    expected = json.loads((folder / "train_context.json").read_text())
    assert len(dataset) == train.n_obs == expected["n_train"]
    assert context["features_keep"] == dataset.gene_names == expected["genes"]
    for key in ("perturbation_uniques", "perturbation_counts", "covariate_uniques"):
        assert context[key] == expected[key]
    assert list(context["perturbation_counts"]) == context["perturbation_uniques"]
    assert context["num_perturbations"] == len(expected["perturbation_uniques"])
    assert context["perturbation_key"] == "condition"
    assert context["covariate_keys"] == ["cell_type"]
    assert context["perturbation_combination_delimiter"] == "+"
    assert context["perturbation_control_value"] == "control"
    assert context["use_perturbation_embedding"] is False


def test_train_batch_equals_perturbench(golden_train):
    folder, _, dataset, context = golden_train
    expected = np.load(folder / "train_batch.npz")
    batch = with_transform((dataset, context))[range(16)]
    assert batch.id == expected["ids"].tolist()
    np.testing.assert_array_equal(batch.gene_expression, expected["gene_expression"])
    np.testing.assert_array_equal(batch.perturbations, expected["perturbations"])
    np.testing.assert_array_equal(batch.covariates["cell_type"], expected["cell_type"])


def test_counterfactuals_equal_perturbench(golden, golden_train):
    folder, adata = golden
    _, _, train, context = golden_train
    dataset, _ = CounterfactualWithReference.from_anndata(
        adata, split="test", seed=3, max_control_cells_per_covariate=25, features=train.gene_names, **COLUMNS
    )
    dataset.transform = LinearModelPipeline(context["perturbation_uniques"], context["covariate_uniques"])
    expected = np.load(folder / "counterfactual_batch.npz")
    columns = ["cell_type", "condition", "_condition_idx"]
    expected_obs = pd.read_csv(folder / "counterfactual_obs.csv", index_col=0, dtype={"condition": str})
    batch, obs = dataset[range(len(dataset))]
    assert obs[columns].astype(str).to_numpy().tolist() == expected_obs[columns].astype(str).to_numpy().tolist()
    np.testing.assert_array_equal(batch.gene_expression, expected["gene_expression"])
    np.testing.assert_array_equal(batch.perturbations, expected["perturbations"])
    np.testing.assert_array_equal(batch.covariates["cell_type"], expected["cell_type"])
    assert torch.equal(batch.controls, batch.gene_expression)
    assert dataset.reference_adata.n_obs == (adata.obs["split"] == "test").sum()


# Cells


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_backed_cells_give_the_batches_of_cells_in_memory(screen, tmp_path, kind):
    expected = with_transform(SingleCellPerturbation.from_anndata(screen, **COLUMNS))
    screen.X = kind(screen.X.toarray())
    screen.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    wanted = [2000, 5, 5, 700]
    for adata in (screen, backed):
        dataset = with_transform(SingleCellPerturbation.from_anndata(adata, **COLUMNS))
        assert_same_batches(dataset[wanted], expected[wanted])
    half = (np.arange(screen.n_obs) % 2 == 0) & (screen.obs["condition"] != "G0").to_numpy()
    batches = [
        with_transform(SingleCellPerturbation.from_anndata(adata[half], **COLUMNS))[[30, 3]]
        for adata in (screen, backed)
    ]
    assert_same_batches(*batches)
    assert batches[0].id == batches[1].id == screen.obs_names[half][[30, 3]].tolist()


def test_feature_filter_keeps_the_order_of_the_file_of_cells(cells, tmp_path):
    path = tmp_path / "genes.csv"
    path.write_text("g3\nunmeasured\ng1\n")
    dataset, context = SingleCellPerturbation.from_anndata(cells, feature_filter_path=path, **COLUMNS)
    assert dataset.gene_names == context["features_keep"] == ["g1", "g3"]
    assert dataset[[1]].gene_expression.toarray().tolist() == [[12, 14]]
    realigned, _ = SingleCellPerturbation.from_anndata(
        cells, feature_filter_path=path, features=["g3", "g0"], **COLUMNS
    )
    assert realigned[[1]].gene_expression.toarray().tolist() == [[14, 11]]
    path.write_text("unmeasured\n")
    with pytest.raises(DataError, match="none of the genes in .*genes.csv is in the data"):
        SingleCellPerturbation.from_anndata(cells, feature_filter_path=path, **COLUMNS)


def test_batches_have_cell_embeddings(cells):
    cells.obsm["X_pca"] = np.arange(24.0).reshape(12, 2)
    dataset = with_transform(SingleCellPerturbation.from_anndata(cells, embedding_key="X_pca", **COLUMNS))
    assert dataset.embedding_width == 2
    assert dataset[[3, 0]].embeddings.tolist() == [[6, 7], [0, 1]]
    assert with_transform(SingleCellPerturbation.from_anndata(cells, **COLUMNS))[[3]].embeddings is None


def test_perturbation_embeddings_are_kept_with_the_data_set(cells, tmp_path):
    path = tmp_path / "embeddings.parquet"
    pd.DataFrame([[1.0, 2, 3], [10, 20, 30]], index=["P", "Q"]).rename(columns=str).to_parquet(path)
    made = SingleCellPerturbation.from_anndata(cells, perturbation_embeddings_path=path, **COLUMNS)
    dataset = with_transform(made)
    assert made[1]["use_perturbation_embedding"]
    assert dataset.perturbation_embedding_width == 3
    assert dataset[range(4)].perturbations.tolist() == [[1, 2, 3], [0, 0, 0], [11, 22, 33], [10, 20, 30]]

    pd.DataFrame([[1.0]], index=["P"]).rename(columns=str).to_parquet(path)
    dataset, context = SingleCellPerturbation.from_anndata(cells, perturbation_embeddings_path=path, **COLUMNS)
    assert context["perturbation_uniques"] == ["P"]
    assert dataset[range(len(dataset))].id == [f"cell{i}" for i in (0, 1, 4, 5, 6, 7, 10, 11)]


def test_vocabulary_follows_first_appearance(make_cells):
    rows = [("Z", "b"), ("control", "a"), ("Q+A", "b"), ("control+Z", "a"), ("B", "a")]
    cells = make_cells(rows, dose=[3, 1, 2, 5, 4])
    _, context = SingleCellPerturbation.from_anndata(cells, "condition", covariate_keys=["cell_type", "dose"])
    # Sorted labels are B, Q+A, Z, control+Z.
    assert context["perturbation_uniques"] == ["B", "Q", "A", "Z"]
    assert context["perturbation_counts"] == {"B": 1, "Q": 1, "A": 1, "Z": 2}
    assert context["covariate_uniques"] == {"cell_type": ["b", "a"], "dose": None}


def test_a_continuous_covariate_has_no_categories(make_cells):
    cells = make_cells([("P", "a"), ("control", "a"), ("P", "b")], dose=[0.5, 0, 2])
    dataset = with_transform(SingleCellPerturbation.from_anndata(cells, "condition", covariate_keys=["dose"]))
    assert dataset[[2, 0]].covariates["dose"].tolist() == [[2], [0.5]]


@pytest.mark.parametrize("covariate_keys", [None, []])
def test_data_without_covariates_are_accepted(cells, covariate_keys):
    dataset = with_transform(SingleCellPerturbation.from_anndata(cells, "condition", covariate_keys=covariate_keys))
    assert dataset[[0, 1]].covariates == {}
    paired = SingleCellPerturbationWithControls.from_anndata(cells, "condition", covariate_keys=covariate_keys)
    dataset = with_transform(paired)
    controls = {dataset[[0]].controls[0, 0].item()} | {dataset[[7]].controls[0, 0].item()}
    assert controls <= {11, 41, 71, 101}


def test_combinations_are_one_label_without_a_delimiter(cells):
    made = SingleCellPerturbation.from_anndata(cells, perturbation_combination_delimiter=None, **COLUMNS)
    assert made[1]["perturbation_uniques"] == ["P", "P+Q", "Q"]
    assert with_transform(made)[[2]].perturbations.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("position", [5, [5], np.array([5]), np.int64(5)])
def test_a_batch_of_one_cell_keeps_its_shape(cells, position):
    batch = with_transform(SingleCellPerturbation.from_anndata(cells, **COLUMNS))[position]
    assert batch.gene_expression.tolist() == [[51, 52, 53, 54]]
    assert batch.perturbations.tolist() == [[1, 0]]


def test_known_conditions_reports_unknown_labels(cells):
    known, unknown = known_conditions(cells.obs, Keys("condition"), ["P"])
    assert known.tolist() == [True, True, False, False, True, True] * 2
    assert unknown == ["P+Q", "Q"]


# Matched controls


def groups_of_values(values: torch.Tensor) -> list[str]:
    """Return the group of each control, identified by its value of the first gene."""
    return [{11: "b", 41: "b", 71: "a", 101: "a"}[int(value)] for value in values]


def test_controls_come_from_the_same_covariate_group(cells):
    dataset = with_transform(SingleCellPerturbationWithControls.from_anndata(cells, **COLUMNS))
    assert len(dataset) == 8
    batch = dataset[range(8)]
    assert batch.id == [f"cell{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)]
    assert groups_of_values(batch.controls[:, 0]) == ["b"] * 4 + ["a"] * 4
    assert batch.controls.shape == batch.gene_expression.shape


def test_controls_are_means_of_num_control_samples_cells(cells):
    cells.obsm["X_pca"] = cells.X.toarray()[:, :2]
    made = SingleCellPerturbationWithControls.from_anndata(
        cells, num_control_samples=4000, embedding_key="X_pca", **COLUMNS
    )
    batch = with_transform(made)[[0, 7]]
    means = torch.tensor([[26.0, 27, 28, 29], [86, 87, 88, 89]])
    torch.testing.assert_close(batch.controls, means, atol=1.5, rtol=0)
    assert not torch.equal(batch.controls, means)
    torch.testing.assert_close(batch.control_embeddings, batch.controls[:, :2])
    assert batch.embeddings[0].tolist() == [1, 2]


def test_controls_depend_only_on_seed_and_cell(screen):
    def controls(seed, order):
        made = SingleCellPerturbationWithControls.from_anndata(screen, seed=seed, num_control_samples=2, **COLUMNS)
        return with_transform(made)[order].controls

    first = controls(1, [8, 3, 100])
    assert torch.equal(first, controls(1, [100, 8, 3])[[1, 2, 0]])
    assert torch.equal(first[:1], controls(1, [8]))
    assert not torch.equal(first, controls(2, [8, 3, 100]))
    assert torch.equal(controls(None, [8]), controls(0, [8]))


def test_a_covariate_group_without_controls_is_an_error(make_cells):
    cells = make_cells([("P", "a"), ("control", "a"), ("P", "b"), ("control", "c")])
    with pytest.raises(DataError, match="covariate group b: found no control cells"):
        SingleCellPerturbationWithControls.from_anndata(cells, **COLUMNS)


# Conditions to predict


def test_unseen_combinations_of_seen_perturbations_are_accepted(cells):
    conditions = pd.DataFrame({"cell_type": ["a", "b"], "condition": ["Q+P", "P"], "note": ["x", "y"]})
    dataset = with_transform(Counterfactual.from_anndata(cells, conditions, **COLUMNS))
    batch, obs = dataset[[0, 1]]
    assert obs["condition"].tolist() == ["Q+P"] * 2 + ["P"] * 2
    assert obs["cell_type"].tolist() == ["a"] * 2 + ["b"] * 2
    assert obs["_condition_idx"].tolist() == [0, 0, 1, 1]
    assert obs.index.tolist() == batch.id == ["0_0", "0_1", "1_0", "1_1"]
    assert batch.perturbations.tolist() == [[1, 1]] * 2 + [[1, 0]] * 2
    assert batch.covariates["cell_type"].tolist() == [[0, 1]] * 2 + [[1, 0]] * 2
    assert sorted(batch.gene_expression[:, 0].tolist()) == [11, 41, 71, 101]
    assert "note" not in obs


def test_conditions_of_a_group_share_its_controls(screen):
    conditions = pd.DataFrame({"condition": ["G0", "G1", "G2"], "cell_type": ["beta", "alpha", "beta"]})
    dataset = with_transform(
        Counterfactual.from_anndata(screen, conditions, max_control_cells_per_covariate=7, seed=5, **COLUMNS)
    )
    batches = [dataset[index][0] for index in range(3)]
    assert all(len(batch.gene_expression) == 7 for batch in batches)
    assert torch.equal(batches[0].gene_expression, batches[2].gene_expression)
    draw = random.Random(5)
    for group, batch in (("alpha", batches[1]), ("beta", batches[0])):
        is_control = (screen.obs["condition"] == "control") & (screen.obs["cell_type"] == group)
        drawn = draw.sample(np.flatnonzero(is_control).tolist(), 7)
        np.testing.assert_array_equal(batch.gene_expression, screen.X[drawn].toarray())


def test_repeated_conditions_count_once(cells):
    conditions = pd.DataFrame({"cell_type": ["a", "a", "b"], "condition": ["P", "P", "P"]})
    assert len(Counterfactual.from_anndata(cells, conditions, **COLUMNS)[0]) == 2


def test_conditions_may_have_a_continuous_covariate(make_cells):
    cells = make_cells([("P", "a"), ("control", "a"), ("control", "a")], dose=[1.0, 0, 0])
    conditions = pd.DataFrame({"cell_type": ["a"], "dose": [7], "condition": ["P"]})
    made = Counterfactual.from_anndata(cells, conditions, "condition", covariate_keys=["cell_type", "dose"])
    dataset = with_transform(made)
    batch, obs = dataset[[0]]
    assert batch.covariates["dose"].tolist() == [[7], [7]]
    assert obs["dose"].tolist() == [7, 7]


def test_conditions_may_have_no_covariates(cells):
    conditions = pd.DataFrame({"condition": ["P+Q", "Q"]})
    dataset = with_transform(Counterfactual.from_anndata(cells, conditions, "condition"))
    batch, obs = dataset[[1]]
    assert sorted(batch.gene_expression[:, 0].tolist()) == [11, 41, 71, 101]
    assert obs["condition"].tolist() == ["Q"] * 4


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"condition": ["P"]}, "the table of conditions has no column 'cell_type'; its columns are condition"),
        ({"condition": [], "cell_type": []}, "the table of conditions is empty"),
        (
            {"condition": ["P", "P", "Q"], "cell_type": ["d", "a", "c"]},
            "no control cells for c; d; label their unperturbed cells 'control'",
        ),
    ],
)
def test_invalid_conditions_are_errors(cells, conditions, message):
    with pytest.raises(DataError, match=message):
        Counterfactual.from_anndata(cells, pd.DataFrame(conditions), **COLUMNS)


def test_an_unknown_perturbation_of_a_condition_is_an_error(cells):
    conditions = pd.DataFrame({"cell_type": ["a"], "condition": ["P+R"]})
    dataset = with_transform(Counterfactual.from_anndata(cells, conditions, **COLUMNS))
    with pytest.raises(DataError, match="1 perturbations were not seen in training: R"):
        dataset[[0]]


# Conditions of measured cells


@pytest.fixture
def split_cells(cells) -> ad.AnnData:
    cells.obs["split"] = ["train", "test"] * 6
    return cells


@pytest.mark.parametrize("use_synthetic_controls", [False, True])
def test_conditions_are_those_of_the_split(split_cells, use_synthetic_controls):
    dataset, _ = CounterfactualWithReference.from_anndata(
        split_cells, split="test", use_synthetic_controls=use_synthetic_controls, features=["g2", "g0"], **COLUMNS
    )
    found = list(dataset.conditions[["condition", "cell_type"]].itertuples(index=False, name=None))
    perturbed = [("Q", "b"), ("P", "b"), ("Q", "a"), ("P", "a")]
    with_controls = [("control", "b"), *perturbed[:2], ("control", "a"), *perturbed[2:]]
    assert found == (with_controls if use_synthetic_controls else perturbed)
    assert dataset.reference_adata.obs_names.tolist() == [f"cell{i}" for i in range(1, 12, 2)]
    assert dataset.reference_adata.var_names.tolist() == ["g2", "g0"]


def test_all_cells_are_the_reference_without_a_split(cells):
    dataset, _ = CounterfactualWithReference.from_anndata(cells, **COLUMNS)
    assert len(dataset) == 6
    assert dataset.reference_adata.n_obs == 12


def test_splits_without_perturbed_cells_are_errors(cells, split_cells):
    with pytest.raises(DataError, match="obs has no column 'part'"):
        CounterfactualWithReference.from_anndata(cells, split="test", split_key="part", **COLUMNS)
    with pytest.raises(DataError, match="the val split has no perturbed cells to compare predictions with"):
        CounterfactualWithReference.from_anndata(split_cells, split="val", **COLUMNS)
    split_cells.obs["split"] = np.where(split_cells.obs["condition"] == "control", "test", "train")
    with pytest.raises(DataError, match="the test split has no perturbed cells"):
        CounterfactualWithReference.from_anndata(split_cells, split="test", **COLUMNS)
