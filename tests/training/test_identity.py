"""Data go by name: a checkpoint meets the same cells, genes and labels, or the run is refused."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config

from primeflow_perturbench.perturbench.embedded.errors import DataError
from primeflow_perturbench.perturbench.embedded.modelcore.checkpoints import load_checkpoint
from primeflow_perturbench.perturbench.embedded.modelcore.train import train

SCREEN = Path(__file__).parents[1] / "files" / "screen"
SETTINGS = [
    "data/splitter=saved",
    "data.loader.batch_size=250",
    "trainer.val_check_interval=2",
    "+trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "~logger",
    "~callbacks.lr_monitor",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
    "test=false",
]
MODELS = {
    "primeflow": ["data=h5ad", "model=primeflow_small", "model.network.width=8", "model.network.depth=1"],
    "linear": ["data=h5ad_controls", "model=linear_additive"],
}
# Each changes the cells, or their splits, in place or returns new ones.
Change = Callable[[ad.AnnData, pd.Series], tuple[ad.AnnData, pd.Series]]


def run(name: str, folder: Path, cells: ad.AnnData | None = None, split: pd.Series | None = None, **changes) -> Path:
    """Train in a folder, on other cells or with another split if they are given; return the last checkpoint."""
    cfg = deepcopy(compose_config([*SETTINGS, *MODELS[name]]))
    cfg.paths.output_dir, cfg.trainer.max_steps = str(folder), changes.pop("steps", 2)
    inputs = folder.parent / f"{folder.name}-inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    cfg.data.data.filename, cfg.data.splitter.split_path = str(SCREEN / "screen.h5ad"), str(SCREEN / "split.csv")
    if cells is not None:
        cfg.data.data.filename = str(inputs / "cells.h5ad")
        cells.write_h5ad(cfg.data.data.filename)
    if split is not None:
        cfg.data.splitter.split_path = str(inputs / "split.csv")
        split.to_csv(cfg.data.splitter.split_path, header=False)
    for key, value in changes.items():
        cfg[key] = value if not isinstance(value, Path) else str(value)
    train(cfg)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    return {name: run(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture
def split() -> pd.Series:
    return pd.read_csv(SCREEN / "split.csv", header=None, index_col=0)[1]


def rows_reversed(cells, split):
    return cells[::-1].copy(), split[::-1]


def genes_reversed(cells, split):
    return cells[:, ::-1].copy(), split


def renamed(column: str, old: str, new: str) -> Change:
    def change(cells, split):
        cells.obs[column] = cells.obs[column].astype(str).replace(old, new)
        return cells, split

    return change


def without_a_gene(cells, split):
    return cells[:, 1:].copy(), split


def test_training_goes_on_with_the_same_cells_in_another_order(trained, tmp_path, screen, split):
    for name, checkpoint in trained.items():
        plain = load_checkpoint(run(name, tmp_path / name / "plain", ckpt_path=checkpoint, steps=5))
        for change in (rows_reversed, genes_reversed):
            cells, other = change(screen.copy(), split)
            again = run(name, tmp_path / name / change.__name__, cells, other, ckpt_path=checkpoint, steps=5)
            assert plain["global_step"] == 5
            for key, value in load_checkpoint(again)["current_model_state"].items():
                assert torch.equal(value, plain["current_model_state"][key]), (name, change.__name__, key)


def a_gene_more(cells, split):
    more = ad.AnnData(cells.X[:, :1], obs=cells.obs, var=pd.DataFrame(index=["NEW"]))
    return ad.concat([cells, more], axis=1, merge="first"), split


def another_split(cells, split):
    label = cells.obs["condition"].astype(str) + cells.obs["cell_type"].astype(str)
    split, label = split.copy(), label.reindex(split.index)
    perturbed = cells.obs["condition"].astype(str).reindex(split.index) != "control"
    train_pair, test_pair = (label[perturbed & (split == name)].iloc[0] for name in ("train", "test"))
    split[label == train_pair], split[label == test_pair] = "test", "train"
    return cells, split


def a_cell_less(cells, split):
    split = split.copy()
    split[split.index[split == "train"][0]] = ""
    return cells, split


RESUMED = {
    "perturbation": (renamed("condition", "G0", "ZZ"), "'ZZ' is not in the checkpoint"),
    "category": (renamed("cell_type", "alpha", "omega"), "'omega' is not in the checkpoint and 'alpha' is missing"),
    "gene less": (without_a_gene, "1 of 128 genes are missing"),
    "gene more": (a_gene_more, "'NEW' is not in the checkpoint"),
    "split": (another_split, "training cannot go on with another split: .* cells of"),
    "cell less": (a_cell_less, "1 cells are not in the split"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", RESUMED)
def test_training_does_not_go_on_with_other_data(trained, tmp_path, screen, split, name, case):
    change, message = RESUMED[case]
    with pytest.raises(DataError, match=message):
        run(name, tmp_path / "run", *change(screen, split), ckpt_path=trained[name], steps=5)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use", ["test", "finetune"])
def test_test_cells_of_another_split_must_not_have_been_trained_on(trained, tmp_path, screen, split, name, use):
    changes = {"train": False, "test": True} if use == "test" else {"finetune": True}
    with pytest.raises(DataError, match="perturbed test cells were training cells of the checkpoint, with the cond"):
        run(name, tmp_path / "run", *another_split(screen, split), ckpt_path=trained[name], **changes)
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_leak_of_the_first_training_is_found_after_a_second_one(trained, tmp_path, screen, split):
    cells, other = another_split(screen, split)
    kept = split.mask((split == "train") & (other == "test"), "")
    second = run("primeflow", tmp_path / "second", None, kept, ckpt_path=trained["primeflow"], finetune=True)
    with pytest.raises(DataError, match="perturbed test cells were training cells"):
        run("primeflow", tmp_path / "third", cells, other, ckpt_path=second, finetune=True)


def test_other_cells_may_have_the_same_names(trained, tmp_path, screen, split):
    """Cells that are numbered in every file: most of those that share a name have another condition."""
    order = np.random.default_rng(0).permutation(screen.n_obs)
    other = screen[order].copy()
    split = pd.Series(split.reindex(other.obs_names).to_numpy(), index=screen.obs_names)
    other.obs_names = screen.obs_names
    run("primeflow", tmp_path / "run", other, split.dropna(), ckpt_path=trained["primeflow"], finetune=True)


def test_a_new_category_is_refused_before_a_test(trained, tmp_path, screen, split):
    change = renamed("cell_type", "alpha", "omega")
    with pytest.raises(DataError, match="'omega' is not in the checkpoint"):
        run(
            "primeflow",
            tmp_path / "run",
            *change(screen, split),
            ckpt_path=trained["primeflow"],
            train=False,
            test=True,
        )


@pytest.mark.parametrize("use", [{}, {"train": False, "test": True}, {"finetune": True}])
def test_a_checkpoint_of_another_model_is_refused(trained, tmp_path, use):
    for name, other in (("primeflow", "linear"), ("linear", "primeflow")):
        with pytest.raises(Exception, match=r"is not of the|of another kind of model") as error:
            run(name, tmp_path / "run", ckpt_path=trained[other], steps=5, **use)
        assert isinstance(error.value, ValueError)
        assert not (tmp_path / "run" / "checkpoints").exists()
