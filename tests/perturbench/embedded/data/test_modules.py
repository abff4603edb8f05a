"""The data module, composed as in a run."""

import logging
from copy import deepcopy
from functools import cache

import anndata as ad
import hydra
import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config
from omegaconf import DictConfig

from primeflow_perturbench.perturbench.embedded.data.datasets import SingleCellPerturbationWithControls
from primeflow_perturbench.perturbench.embedded.data.modules import AnnDataLitModule
from primeflow_perturbench.perturbench.embedded.errors import DataError

CONDITION = "data.data_iter_factory"


@cache
def composed(*overrides: str) -> DictConfig:
    return compose_config(["data=h5ad", "model=primeflow_mlp", *overrides])


@pytest.fixture
def make_module(tmp_path, screen_path):
    """Return a function from overrides to a data module that writes to ``tmp_path``."""

    def make(*overrides: str, filename=screen_path) -> AnnDataLitModule:
        cfg = deepcopy(composed(*overrides))
        cfg.paths.output_dir, cfg.data.data.filename = str(tmp_path), str(filename)
        return hydra.utils.instantiate(cfg.data)

    return make


@pytest.fixture
def write_cells(tmp_path, make_cells):
    """Return a function from (label, group, split) triples to the overrides of a module that reads them."""

    def write(rows) -> list[str]:
        make_cells([row[:2] for row in rows]).write_h5ad(tmp_path / "cells.h5ad")
        split = pd.Series([row[2] for row in rows], index=[f"cell{number}" for number in range(len(rows))])
        split.to_csv(tmp_path / "split.csv", header=False)
        return ["data/splitter=saved", f"data.splitter.split_path={tmp_path / 'split.csv'}"]

    return write


SEEN = [("P", "a", "train"), ("control", "a", "train"), ("P", "b", "val"), ("P", "c", "test")]
CONTROLS = [("control", group, split) for group in "abc" for split in ("train", "val", "test")]
UNSEEN = [("Q", "a", "val"), ("P+R", "a", "test")]


# Stages


def test_fit_prepares_train_and_validation_data(make_module, tmp_path, screen):
    module = make_module()
    module.setup("fit")
    assert module.num_genes == 128
    assert module.gene_names == module.train_iterator.gene_names == screen.var_names.tolist()
    assert module.num_perturbations == len(module.context["perturbation_uniques"]) == 8
    assert module.embedding_width is module.perturbation_embedding_width is None
    assert module.test_iterator is None
    pd.testing.assert_frame_equal(module.obs_df, screen.obs)
    counts = module.splits.value_counts()
    assert len(module.train_iterator) == counts["train"]
    assert len(module.val_iterator) == counts["val"]

    batches = list(module.train_dataloader())
    names = [name for batch in batches for name in batch.id]
    in_train = module.splits.index[module.splits == "train"]
    assert names != in_train.tolist()
    assert sorted(names) == sorted(in_train)
    assert batches[0].gene_expression.shape == (256, 128)
    assert batches[0].perturbations.dtype == torch.float32
    names = [name for batch in module.val_dataloader() for name in batch.id]
    assert names == module.splits.index[module.splits == "val"].tolist()

    train = module.train_iterator
    module.setup("fit")
    assert module.train_iterator is train


def test_split_files_describe_the_split(make_module, tmp_path, screen):
    module = make_module()
    module.setup("fit")
    saved = pd.read_csv(tmp_path / "train_test_split.csv", header=None, index_col=0)[1]
    assert saved.tolist() == module.splits.tolist()
    assert saved.index.tolist() == screen.obs_names.tolist()
    groups = pd.read_csv(tmp_path / "perturbation_covariate_split_map.csv")
    assert groups.columns.tolist() == ["cell_type", "condition", "split", "n_cells"]
    assert groups["n_cells"].sum() == module.splits.notna().sum()
    again = make_module("data/splitter=saved", f"data.splitter.split_path={tmp_path / 'train_test_split.csv'}")
    again.setup("fit")
    assert again.splits.tolist() == module.splits.tolist()


def test_split_files_are_written_only_with_save(make_module, tmp_path):
    make_module("data.splitter.save=false").setup("fit")
    assert list(tmp_path.iterdir()) == []


def test_the_test_stage_has_the_conditions_of_the_split(make_module, screen):
    module = make_module("data.evaluation.chunk_size=2")
    module.setup("fit")
    module.setup("test")
    conditions = module.test_iterator.conditions
    test = screen.obs[(module.splits == "test") & (screen.obs["condition"] != "control")]
    assert set(conditions.itertuples(index=False, name=None)) == set(
        test[["cell_type", "condition"]].itertuples(index=False, name=None)
    )
    chunks = list(module.test_dataloader())
    assert len(chunks) == -(-len(conditions) // 2)
    batch, obs = chunks[0]
    assert len(batch.gene_expression) == len(obs)
    assert obs["_condition_idx"].unique().tolist() == [0, 1]
    reference = module.test_iterator.reference_adata
    assert reference.n_obs == (module.splits == "test").sum()


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_backed_cells_give_the_same_batches(make_module, stage):
    modules = [
        make_module(f"+data.data.backed={backed}", "data.evaluation.chunk_size=100") for backed in ("true", "false")
    ]
    for module in modules:
        module.setup("fit")
        module.setup("test")
    assert modules[0].adata.isbacked
    assert modules[0].context == modules[1].context
    if stage == "fit":
        pairs = zip(modules[0].val_dataloader(), modules[1].val_dataloader(), strict=True)
    else:
        pairs = [[next(iter(module.test_dataloader()))[0] for module in modules]]
        references = [module.test_iterator.reference_adata for module in modules]
        assert (references[0].X != references[1].X).nnz == 0
    for a, b in pairs:
        assert a.id == b.id
        assert torch.equal(a.gene_expression, b.gene_expression)


def test_several_workers_read_backed_cells(make_module):
    def expression(*overrides):
        module = make_module("data.loader.batch_size=500", *overrides)
        module.setup("fit")
        return torch.cat([batch.gene_expression for batch in module.val_dataloader()])

    assert torch.equal(expression("+data.data.backed=true", "data.loader.num_workers=2"), expression())


def test_the_predict_stage_has_the_conditions_of_the_table(make_module, tmp_path, screen):
    trained = make_module()
    trained.setup("fit")
    table = tmp_path / "conditions.csv"
    table.write_text("condition,cell_type\nG0+G7,beta\nG3,alpha\n")
    module = make_module(f"data.prediction.prediction_dataframe_path={table}", "data.prediction.chunk_size=1")
    record = {"transform": trained.transform, "train_context": trained.context}
    module.use_training_record(record, screen.var_names[::-1].tolist())
    module.setup("predict")
    (first, obs), (second, _) = module.predict_dataloader()
    uniques = trained.context["perturbation_uniques"]
    expected = [float(name in ("G0", "G7")) for name in uniques]
    assert first.perturbations.unique(dim=0).tolist() == [expected]
    assert set(obs["condition"]) == {"G0+G7"}
    is_control = (screen.obs["condition"] == "control") & (screen.obs["cell_type"] == "alpha")
    assert len(second.gene_expression) == is_control.sum()
    assert first.gene_names == screen.var_names[::-1].tolist()
    assert module.num_genes == 128


def test_labels_of_a_table_stay_text(make_module, tmp_path, make_cells):
    make_cells([("1", "007"), ("control", "007"), ("NA", "NA"), ("control", "NA")]).write_h5ad(tmp_path / "cells.h5ad")
    table = tmp_path / "conditions.csv"
    table.write_text("condition,cell_type\nNA,007\n1,NA\n")
    module = make_module(f"data.prediction.prediction_dataframe_path={table}", filename=tmp_path / "cells.h5ad")
    context = {"covariate_uniques": {"cell_type": ["007", "NA"]}, "perturbation_uniques": ["1", "NA"]}
    context["use_perturbation_embedding"] = False
    module.use_training_record({"transform": None, "train_context": context})
    module.setup("predict")
    assert module.predict_iterator.conditions["condition"].tolist() == ["NA", "1"]
    (batch, obs), *_ = module.predict_dataloader()
    assert obs["cell_type"].tolist() == ["007", "NA"]
    # The transform is built from the context.
    assert batch.covariates["cell_type"].argmax(dim=1).tolist() == [0, 1]
    assert batch.perturbations.argmax(dim=1).tolist() == [1, 0]


def test_test_and_predict_need_a_training_record(make_module, tmp_path):
    for stage in ("test", "predict"):
        with pytest.raises(DataError, match=r"needs the training context: .*give ckpt_path"):
            make_module().setup(stage)
    module = make_module(f"data.prediction.prediction_dataframe_path={tmp_path / 'absent.csv'}")
    module.use_training_record({"transform": None, "train_context": {}})
    with pytest.raises(DataError, match=r"absent.csv: no such file; give prediction_dataframe_path=PATH"):
        module.setup("predict")


def test_cells_can_be_paired_with_controls(make_module):
    L.seed_everything(4, verbose=False)
    module = make_module("data=h5ad_controls", f"{CONDITION}.num_control_samples=3")
    module.setup("fit")
    assert isinstance(module.train_iterator, SingleCellPerturbationWithControls)
    assert (module.train_iterator.num_control_samples, module.train_iterator.seed) == (3, 4)
    batch = next(iter(module.train_dataloader()))
    assert batch.controls.shape == batch.gene_expression.shape
    assert (batch.perturbations.sum(dim=1) > 0).all()


@pytest.mark.parametrize("task", ["combine", "combine_inverse"])
def test_data_without_covariates_are_split(make_module, tmp_path, task):
    module = make_module(f"{CONDITION}.covariate_keys=[]", f"data/splitter={task}")
    module.setup("fit")
    module.setup("test")
    assert module.context["covariate_uniques"] == {}
    assert module.test_iterator.conditions.columns.tolist() == ["condition"]
    assert next(iter(module.train_dataloader())).covariates == {}
    groups = pd.read_csv(tmp_path / "perturbation_covariate_split_map.csv")
    assert groups.columns.tolist() == ["condition", "split", "n_cells"]


def test_transfer_needs_covariates(make_module):
    with pytest.raises(DataError, match="covariate_keys of the splitter is empty: .* use task combine"):
        make_module(f"{CONDITION}.covariate_keys=[]").setup("fit")


def test_perturbation_embeddings_reach_the_batches(make_module, tmp_path):
    path = tmp_path / "embeddings.parquet"
    names = [f"G{number}" for number in range(8)]
    pd.DataFrame(np.eye(8)[:, :5] + 1, index=names).rename(columns=str).to_parquet(path)
    module = make_module(f"{CONDITION}.perturbation_embeddings_path={path}")
    module.setup("fit")
    assert module.perturbation_embedding_width == 5
    assert module.num_perturbations == 8
    assert next(iter(module.train_dataloader())).perturbations.shape == (256, 5)


# Perturbations without training cells


def test_unseen_perturbations_are_dropped_with_a_warning(make_module, write_cells, tmp_path, caplog):
    overrides = write_cells([*SEEN, *CONTROLS, *UNSEEN])
    module = make_module(*overrides, filename=tmp_path / "cells.h5ad")
    with caplog.at_level(logging.WARNING):
        module.setup("fit")
        module.setup("test")
    assert "2 validation and test cells are left out: training has no cell of P+R, Q" in caplog.text
    assert module.context["perturbation_uniques"] == ["P"]
    assert module.splits.isna().sum() == 2
    assert "Q" not in set(module.val_iterator.cells.labels)
    assert module.test_iterator.conditions["condition"].tolist() == ["P"]
    assert pd.read_csv(tmp_path / "train_test_split.csv", header=None)[1].isna().sum() == 2


def test_unseen_perturbations_can_join_the_vocabulary(make_module, write_cells, tmp_path, caplog):
    overrides = write_cells([*SEEN, *CONTROLS, *UNSEEN])
    module = make_module(*overrides, "data.filter_split_perturbations=false", filename=tmp_path / "cells.h5ad")
    with caplog.at_level(logging.WARNING):
        module.setup("fit")
        module.setup("test")
    assert "left out" not in caplog.text
    assert module.context["perturbation_uniques"] == ["P", "R", "Q"]
    assert module.num_perturbations == 3
    assert set(module.val_iterator.cells.labels) == {"P", "Q", "control"}
    assert set(module.test_iterator.conditions["condition"]) == {"P", "P+R"}
    batch = next(iter(module.val_dataloader()))
    assert batch.perturbations.sum(dim=0).tolist() == [1, 0, 1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_with_only_unseen_perturbations_is_an_error(make_module, write_cells, tmp_path, split):
    kept = [row for row in SEEN if row[2] != split]
    overrides = write_cells([*kept, ("control", "a", "train"), ("Q", "a", split)])
    with pytest.raises(DataError, match=f"the {split} split has no perturbed cell once perturbations"):
        make_module(*overrides, filename=tmp_path / "cells.h5ad").setup("fit")


def test_a_split_with_only_controls_is_an_error(make_module, write_cells, tmp_path):
    kept = [row for row in SEEN if row[2] != "test"]
    overrides = write_cells([*kept, *CONTROLS, ("Q", "a", "test")])
    with pytest.raises(DataError, match="the test split has no perturbed cell once perturbations that training lacks"):
        make_module(*overrides, filename=tmp_path / "cells.h5ad").setup("fit")


def test_a_split_file_without_test_cells_is_an_error(make_module, write_cells, tmp_path):
    overrides = write_cells([*SEEN[:3], *CONTROLS])
    with pytest.raises(DataError, match="the split has no perturbed cell in test: see .*split.csv"):
        make_module(*overrides, filename=tmp_path / "cells.h5ad").setup("fit")


# Invalid files and settings


def test_a_missing_file_is_an_error(make_module, tmp_path):
    with pytest.raises(DataError, match=r"absent.h5ad: no such file; give the h5ad file as data.data.filename"):
        make_module(filename=tmp_path / "absent.h5ad").setup("fit")


@pytest.mark.parametrize("backed", ["true", "false"])
@pytest.mark.parametrize("content", [b"condition,cell_type\n", b"", b"\x89HDF\r\n\x1a\n cut short"])
def test_a_file_that_is_not_h5ad_is_an_error(make_module, tmp_path, content, backed):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cells.h5ad: not a readable h5ad file \("):
        make_module(f"+data.data.backed={backed}", filename=path).setup("fit")


def test_a_truncated_file_is_an_error(make_module, tmp_path, screen_path):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(screen_path.read_bytes()[:30_000])
    with pytest.raises(DataError, match=r"cells.h5ad: not a readable h5ad file \("):
        make_module(filename=path).setup("fit")


def test_a_missing_column_is_an_error(make_module):
    with pytest.raises(DataError, match=r"no perturbation column 'gene'.*\['condition', 'cell_type', 'treatment'\]"):
        make_module(f"{CONDITION}.perturbation_key=gene").setup("fit")


def test_an_unknown_mode_is_an_error(make_module):
    with pytest.raises(hydra.errors.InstantiationException, match="data mode .*cell.*expected .*batch") as error:
        make_module("data.mode=cell")
    assert isinstance(error.value.__cause__, DataError)


def test_one_condition_and_one_gene_are_enough(make_module, write_cells, tmp_path):
    overrides = write_cells(SEEN + CONTROLS)
    ad.read_h5ad(tmp_path / "cells.h5ad")[:, ["g1"]].write_h5ad(tmp_path / "one.h5ad")
    module = make_module(*overrides, filename=tmp_path / "one.h5ad")
    module.setup("fit")
    module.setup("test")
    assert module.num_genes == 1
    batch, obs = next(iter(module.test_dataloader()))
    assert batch.gene_expression.shape == (1, 1)
    assert obs["condition"].tolist() == ["P"]
