"""What training receives from an atlas."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from primeflow_perturbench.data.atlas.cells import open_atlas
from primeflow_perturbench.data.atlas.module import AtlasDataModule
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.embedded.data.transforms.pipelines import LinearModelPipeline
from primeflow_perturbench.simulation.atlas import simulate_atlas

TRANSFORM = {
    "conf": partial(LinearModelPipeline),
    "dependencies": {"perturbation_uniques": "perturbation_uniques", "covariate_uniques": "covariate_uniques"},
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Three files, 1,500 cells, and genes that some files lack."""
    folder = tmp_path_factory.mktemp("atlas")
    return simulate_atlas(folder, n_files=3, cells=1500, n_genes=80, n_perturbations=6, n_pairs=3).manifest


@pytest.fixture(scope="module")
def obs(manifest) -> pd.DataFrame:
    return open_atlas(manifest).obs


def data_module(manifest: Path, **changed) -> AtlasDataModule:
    """The data module after setup. ``data`` adds settings to the manifest."""
    data = {"filename": manifest} | changed.pop("data", {})
    settings = {"block_size": 8, "val_fraction": 0.1, "loader": {"batch_size": 50}, "transform": TRANSFORM} | changed
    module = AtlasDataModule(data, **settings)
    module.setup("fit")
    return module


def test_batch_holds_the_cells_of_the_files(manifest, obs):
    # The balanced draw may repeat a cell within a batch; with this seed it does not.
    torch.manual_seed(0)
    module = data_module(manifest)
    batch = next(iter(module.train_dataloader()))
    atlas = open_atlas(manifest)
    numbers = obs.index.get_indexer(batch.id)
    assert len(set(numbers)) == 50
    np.testing.assert_array_equal(batch.gene_expression.numpy(), atlas.expression(numbers))
    assert torch.isnan(batch.gene_expression).any()
    context = module.context
    for row, number in enumerate(numbers):
        label = obs["condition"].iloc[number]
        parts = [] if label == "control" else label.split("+")
        hot = np.flatnonzero(batch.perturbations[row].numpy())
        assert sorted(context["perturbation_uniques"][column] for column in hot) == sorted(parts)
        for name in ("cell_type", "method", "dataset"):
            column = int(batch.covariates[name][row].argmax())
            assert context["covariate_uniques"][name][column] == obs[name].iloc[number]
    assert batch.gene_names == module.train_iterator.gene_names == atlas.genes


def test_vocabulary_equals_that_of_a_single_file(manifest, obs):
    module = data_module(manifest)
    training = obs[(module.splits == "train").to_numpy()]
    labels = sorted(set(training["condition"]) - {"control"})
    expected = list(dict.fromkeys(part for label in labels for part in label.split("+")))
    assert module.context["perturbation_uniques"] == expected
    assert module.num_perturbations == len(expected) == 6
    assert module.context["covariate_uniques"]["dataset"] == list(dict.fromkeys(training["dataset"]))
    counts = training["condition"].astype(str).str.split("+").explode().value_counts()
    assert module.context["perturbation_counts"] == {name: counts[name] for name in expected}
    assert (module.num_genes, module.embedding_width, module.perturbation_embedding_width) == (80, None, None)
    assert module.test_iterator is None


def test_training_and_validation_share_labels_but_no_cell(manifest, obs):
    module = data_module(manifest)
    train, val = module.train_iterator.cells, module.val_iterator.cells
    assert not set(train) & set(val)
    assert len(train) + len(val) == len(obs) == len(module.obs_df)
    assert 0.04 < len(val) / len(obs) < 0.15
    seen = {number for batch in module.val_dataloader() for number in obs.index.get_indexer(batch.id)}
    assert seen == set(val)
    pairs = set(zip(obs["dataset"].iloc[val], obs["condition"].iloc[val], strict=True))
    assert pairs <= set(zip(obs["dataset"].iloc[train], obs["condition"].iloc[train], strict=True))
    assert set(obs["dataset"].iloc[val]) == set(obs["dataset"])
    assert module.splits.equals(data_module(manifest).splits)
    assert not module.splits.equals(data_module(manifest, seed=1).splits)


@pytest.mark.parametrize("balance", [{"dataset": 0, "condition": 0}, {"dataset": 1, "condition": 1}, {}])
def test_epoch_balances_data_sets_and_conditions(manifest, obs, balance):
    torch.manual_seed(0)
    module = data_module(manifest, balance=balance)
    names = [name for batch in module.train_dataloader() for name in batch.id]
    drawn, training = obs.loc[names], obs.iloc[module.train_iterator.cells]
    assert len(drawn) == len(training)
    a, b = balance.get("dataset", 0.5), balance.get("condition", 0.5)
    sizes = training["dataset"].value_counts()
    found = drawn["dataset"].value_counts()
    for dataset, size in sizes.items():
        expected = len(training) * size**a / (sizes**a).sum()
        assert found[dataset] == pytest.approx(expected, rel=0.03)
        labels = training.loc[training["dataset"] == dataset, "condition"].value_counts()
        labels = labels[labels > 0]
        of_label = drawn.loc[drawn["dataset"] == dataset, "condition"].value_counts()
        share = labels**b / (labels**b).sum()
        assert np.abs(of_label[labels.index] - expected * share).max() < 6 * np.sqrt(expected * share.max())
    assert sizes.max() / sizes.min() > 2


def test_missing_genes_are_nan_only_if_masked(manifest):
    masked, zero = data_module(manifest), data_module(manifest, data={"missing": "zero"})
    assert masked.unmeasured_are_nan
    assert not zero.unmeasured_are_nan
    assert not torch.isnan(next(iter(zero.train_dataloader())).gene_expression).any()
    common = data_module(manifest, data={"genes": "intersection"})
    assert not common.unmeasured_are_nan
    assert 0 < common.num_genes < 80


def test_covariates_can_be_chosen_and_unknown_ones_are_errors(manifest):
    assert list(data_module(manifest, covariate_keys=["cell_type"]).context["covariate_uniques"]) == ["cell_type"]
    with pytest.raises(InputError, match="covariate_keys names donor, but the covariates of the atlas are .*cell_type"):
        data_module(manifest, covariate_keys=["donor"])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"balance": {"dataset": 2}}, "data.balance.dataset must be from 0 .* got 2"),
        ({"balance": {"gene": 1}}, "data.balance has no setting gene; it has dataset and condition"),
        ({"block_size": 0}, "data.block_size must be at least 1, got 0"),
        ({"fetch_factor": 0}, "data.fetch_factor must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "data.val_fraction must be above 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_errors(manifest, changed, sentence):
    with pytest.raises(InputError, match=sentence):
        data_module(manifest, **changed)


def test_testing_on_an_atlas_is_an_error(manifest):
    with pytest.raises(InputError, match="no cells to test on: pretrain with test=false"):
        data_module(manifest).setup("test")


def test_narrowing_trains_on_one_context_and_on_test_perturbations_elsewhere(manifest, obs):
    here = (obs["cell_type"] == "context0").to_numpy()
    labels = obs["condition"].astype(str)
    test = [name for name in labels[here].unique() if name in set(labels[~here]) - {"control"}][:1]
    module = data_module(manifest, narrowing={"context": {"cell_type": "context0"}, "test": test})
    for iterator in (module.train_iterator, module.val_iterator):
        assert not (here & labels.isin(test).to_numpy())[iterator.cells].any()
    assert (~here & labels.isin(test).to_numpy())[module.train_iterator.cells].any()
    assert set(module.splits) == {"train", "val", "test", "unused"}


def test_held_out_pair_in_training_is_an_error_in_any_spelling(manifest, obs, tmp_path):
    label = next(label for label in obs["condition"][obs["cell_type"] == "context0"].unique() if "+" in label)
    swapped = "+".join(reversed(label.split("+")))
    heldout = tmp_path / "heldout.csv"
    pd.DataFrame({"cell_type": [" CONTEXT0"], "condition": [swapped]}).to_csv(heldout, index=False)
    with pytest.raises(InputError, match="cells of held-out conditions would be trained on: .*study0"):
        data_module(manifest, heldout=heldout)
    pd.DataFrame({"cell_type": ["elsewhere"], "condition": [swapped]}).to_csv(heldout, index=False)
    assert len(data_module(manifest, heldout=heldout).train_iterator)


def test_continuous_covariate_stays_a_number(manifest, tmp_path):
    description = yaml.safe_load(manifest.read_text())
    description["covariates"].append("dose")
    for number, entry in enumerate(description["files"]):
        entry["path"] = str(manifest.parent / entry["path"])
        entry.setdefault("constants", {})["dose"] = 0.5 * number
    changed = tmp_path / "manifest.yaml"
    changed.write_text(yaml.safe_dump(description))
    module = data_module(changed)
    batch = next(iter(module.train_dataloader()))
    assert module.context["covariate_uniques"]["dose"] is None
    expected = 0.5 * module.atlas.dataset_of[module.obs_df.index.get_indexer(batch.id)]
    assert batch.covariates["dose"].ravel().tolist() == expected.tolist()
    assert len(set(expected)) == 3
