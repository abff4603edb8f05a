"""Perturbations that training lacks are predicted from their embeddings; without embeddings they are an error."""

import io
import logging
from dataclasses import replace
from functools import partial

import anndata as ad
import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from builders import build_model, fit
from rich.console import Console

from primeflow_perturbench import PRiMeFlow
from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.conditions.embedding_tables import ExternalRows, rows_of, with_tables
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.statistics import MarginalStatistics
from primeflow_perturbench.flow.noise import batch_noise
from primeflow_perturbench.networks.condition_embedding import External, Mixture, MultiHot
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.sampling.predict import predict_run
from primeflow_perturbench.simulation.screen import Screen, ScreenSpec

Batch = load("data.types.Batch")
GENES = [f"gene{i}" for i in range(5)]
NAMES = ["A", "B", "C"]
CONTEXT = {
    "perturbation_uniques": NAMES,
    "covariate_uniques": {"line": ["alpha", "beta"], "dose": None},
    "perturbation_key": "condition",
    "covariate_keys": ["line", "dose"],
    "perturbation_combination_delimiter": "+",
    "perturbation_control_value": "control",
}
TABLE = pd.DataFrame([[1.0, 2.0], [3.0, -1.0], [0.5, 7.0], [2.0, 2.0]], index=[*NAMES, "NEW"])
HERE = {"line": "beta", "dose": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def build(conditions=MultiHot, **settings):
    """A small model whose velocity is not zero."""
    network = partial(MLP, width=8, depth=1, embedding_width=4)
    return build_model(GENES, **{"context": CONTEXT, "network": network, **settings}, conditions=conditions)


def external(kind=External, embeddings=TABLE, **settings):
    return partial(kind, width=4, embeddings=embeddings, **settings)


def cells(model, *labels, embeddings=None, n=3):
    conditions = [{"condition": label, **HERE} for label in labels]
    return model.sample(conditions, n=n, perturbation_embeddings=embeddings).X.toarray()


# --- initial weights


def test_a_multi_hot_model_has_the_initial_weights_of_its_network_alone():
    model = build()
    torch.manual_seed(0)
    width = 3 + 2 + 1 + 1
    alone = MLP(len(GENES), width, width=8, depth=1, embedding_width=4)
    found = {name: value for name, value in model.state_dict().items() if name.startswith("network.")}
    assert set(model.state_dict()) - set(found) == set(build().space.state_dict(prefix="space."))
    scaled = alone.state_dict()["embed.condition.0.weight"] * width**0.5
    for name, value in (alone.state_dict() | {"embed.condition.0.weight": scaled}).items():
        assert torch.equal(found[f"network.{name}"], value)


def test_only_multi_hot_conditions_get_larger_first_weights():
    """Other encoders give features that are rarely 0."""
    first = {}
    for name, conditions in (("multi_hot", MultiHot), ("external", external())):
        weight = build(conditions=conditions).network.embed.condition[0].weight
        # The first weights of a linear layer are uniform within 1 / sqrt(C).
        first[name] = float(weight.abs().max() * weight.shape[1] ** 0.5)
    assert first["external"] <= 1
    assert first["multi_hot"] > 1.5


# --- tables


def test_columns_of_several_tables_are_joined_with_gaps_where_one_has_no_row():
    other = pd.DataFrame([[5], [6]], index=["C", "D"])
    conditions, rows = with_tables(external(embeddings=[TABLE, other]), NAMES)
    expected = [[1, 2, np.nan], [3, -1, np.nan], [0.5, 7, 5]]
    np.testing.assert_array_equal(rows, np.array(expected, dtype=np.float32))
    assert conditions.keywords == {"width": 4, "table_widths": [2, 1]}


def test_a_training_perturbation_without_a_row_is_named():
    with pytest.raises(InputError, match="2 perturbations of the training data without a row .*: 'B', 'C'; add"):
        build(external(embeddings=TABLE.loc[["A", "NEW"]]))
    with pytest.raises(InputError, match="and 3 more; add"):
        with_tables(external(), [f"P{i}" for i in range(13)])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("absent.parquet", "the perturbation embeddings absent.parquet: no such file; give a parquet file"),
        (TABLE.assign(word="x"), "number 1 have the column 'word', which holds no numbers"),
        (TABLE[[]], "have no column, expected one numeric column per feature"),
        (pd.concat([TABLE, TABLE[1:2]]), "name 'B' more than once"),
        (TABLE.replace(7.0, np.inf), "missing or infinite values for 'C'"),
    ],
)
def test_a_bad_table_is_an_error(table, message):
    with pytest.raises(InputError, match=message):
        build(external(embeddings=table))


def test_a_table_that_differs_from_the_one_of_training_is_an_error():
    model = build(external())
    with pytest.raises(InputError, match=r"have widths \[1\], but the model was trained with \[2\]"):
        cells(model, "A", embeddings=TABLE[[0]])
    with pytest.raises(InputError, match="have other values for 'A', 'C' than in the model's training"):
        cells(model, "A", embeddings=TABLE.mul([2, 1, 3, 1], axis=0))


def test_perturbench_embeddings_work_with_multi_hot_only():
    assert build(perturbation_embedding_width=2).conditions.width == 2 + 2 + 1 + 1
    with pytest.raises(InputError, match=r"pass the file as model\.conditions\.embeddings instead"):
        build(external(), perturbation_embedding_width=2)


# --- conditions by name


def test_a_training_perturbation_has_the_same_condition_by_name_and_in_a_batch():
    model = build(external(Mixture))
    parts = [("A",), ("C", "A"), ()]
    hot, summed = ExternalRows(model.conditions, CONTEXT).encode(parts, "condition", "the table")
    assert hot.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    covariates = {"line": torch.eye(2)[[0, 0, 1]], "dose": torch.ones(3, 1)}
    assert model.encoder(hot, covariates, summed).row_keys() == model.encoder(hot, covariates).row_keys()


def test_an_unknown_perturbation_has_only_its_row_which_adds_to_those_of_known_ones():
    model = build(external(Mixture))
    rows = ExternalRows(model.conditions, CONTEXT, TABLE)
    hot, summed = rows.encode([("A", "NEW"), ("NEW",)], "condition", "the table")
    assert hot.tolist() == [[1, 0, 0], [0, 0, 0]]
    new = model.conditions.standardized(rows_of(["NEW"], [TABLE]))[0]
    torch.testing.assert_close(summed, torch.stack([model.conditions.table[0] + new, new]))


def test_an_unknown_perturbation_without_a_row_is_named():
    with pytest.raises(InputError, match="1 perturbation not seen in training, .NEW.; .* model/conditions=ext"):
        cells(build(), "A", "NEW")
    model = build(external())
    with pytest.raises(InputError, match="not seen in training, 'NEW'; give perturbation embeddings that have a row"):
        cells(model, "A", "NEW")
    with pytest.raises(InputError, match="not seen in training without a row in the perturbation embeddings, 'NEWER'"):
        cells(model, "NEWER", embeddings=TABLE)
    assert cells(model, "A", "A+NEW", embeddings=TABLE).shape == (6, len(GENES))


# --- files


@pytest.mark.parametrize("kind", [external(), external(Mixture, identity_dropout=0.3)])
def test_a_shared_model_generates_the_same_cells_without_the_table(kind, tmp_path):
    model = build(kind, context={**CONTEXT, "perturbation_counts": {}})
    model.save_pretrained(tmp_path / "model")
    loaded = PRiMeFlow.from_pretrained(tmp_path / "model")
    assert type(loaded.conditions) is type(model.conditions)
    assert loaded.conditions.identity_dropout == model.conditions.identity_dropout
    np.testing.assert_array_equal(cells(loaded, "A", "B+C", "control"), cells(model, "A", "B+C", "control"))
    found, expected = (cells(each, "NEW", embeddings=TABLE) for each in (loaded, model))
    np.testing.assert_array_equal(found, expected)


def test_a_shared_model_keeps_the_units_of_a_continuous_covariate(tmp_path):
    model = build(partial(MultiHot, continuous={"dose": "standardize"}))
    model.conditions.covariates.set_statistics(torch.tensor([0.5, 0.5, 3.0]), torch.tensor([0.5, 0.5, 2.0]))
    model.save_pretrained(tmp_path / "model")
    loaded = PRiMeFlow.from_pretrained(tmp_path / "model")
    assert loaded.conditions.covariates.mean.tolist() == [3.0]
    np.testing.assert_array_equal(cells(loaded, "A"), cells(model, "A"))
    assert (cells(build(), "A") != cells(model, "A")).any()


# --- calibration


def test_conditions_of_unknown_perturbations_are_generated_without_calibration(caplog):
    def calibrated(how):
        model = build(external(), calibrate=how, calibration_cells=32, detection_limit=0.2)
        draw = torch.Generator().manual_seed(0)
        hot = torch.eye(4, 3).repeat(50, 1)
        known = model.encoder(hot, {"line": torch.eye(2).repeat(100, 1), "dose": torch.ones(200, 1)})
        statistics = MarginalStatistics()
        expression = torch.randn(200, len(GENES), generator=draw).abs() + hot @ torch.ones(3, len(GENES))
        statistics.add(known.without_external(), expression)
        model.marginals = Marginals.fit(model.encoder, statistics)
        return model

    labels = ["A", "NEW", "B+NEW", "control"]
    model = calibrated("marginals")
    with caplog.at_level(logging.WARNING):
        found = cells(model, *labels, embeddings=TABLE, n=40).reshape(4, 40, -1)
        cells(model, *labels, embeddings=TABLE, n=1)
    messages = [record.getMessage() for record in caplog.records if "calibration" in record.getMessage()]
    assert len(messages) == 1
    assert "2 labels" in messages[0]
    assert "'B+NEW', 'NEW'" in messages[0]
    raw = cells(calibrated("none"), *labels, embeddings=TABLE, n=40).reshape(4, 40, -1)
    assert [bool((one == other).all()) for one, other in zip(found, raw, strict=True)] == [False, True, True, False]


# --- training


def test_identity_dropout_applies_to_its_share_of_the_cells_that_keep_their_condition(monkeypatch):
    model = build(external(Mixture, identity_dropout=0.5), condition_dropout=0.2)
    seen, chance = [], torch.arange(1000) / 1000
    monkeypatch.setattr(model.conditions, "forward", lambda condition: seen.append(condition) or torch.zeros(1000, 8))
    plain = "primeflow_perturbench.model.batch_noise"
    monkeypatch.setattr(plain, lambda *given: replace(batch_noise(*given), chance=chance))
    batch = Batch(
        gene_expression=torch.rand(1000, len(GENES)),
        perturbations=torch.eye(3)[[0]].expand(1000, -1),
        covariates={"line": torch.eye(2)[[0]].expand(1000, -1), "dose": torch.ones(1000, 1)},
    )
    model.training_step(batch, 0)
    (dropped,), condition = seen, model.encoder(batch.perturbations, batch.covariates)
    alone = (dropped.perturbations == 0).all(1) & ~dropped.is_null
    kept = ~dropped.is_null & ~alone
    assert dropped.is_null.sum() == 200
    assert alone.sum() == 400
    assert torch.equal(dropped.external[alone], condition.external[alone])
    assert torch.equal(dropped.covariates[alone], condition.covariates[alone])
    assert dropped[kept].row_keys() == condition[kept].row_keys()


def test_a_continuous_covariate_is_standardized_by_the_training_cells():
    doses = torch.tensor([0.0, 1.0, 10.0, 100.0])
    batch = Batch(
        gene_expression=torch.rand(4, len(GENES)),
        perturbations=torch.eye(4, 3),
        covariates={"line": torch.eye(2)[[0, 1, 0, 1]], "dose": doses[:, None]},
    )
    model = build(partial(MultiHot, continuous={"dose": "standardize"}))
    fit(model, batch)
    units = model.conditions.covariates
    assert units.mean.tolist() == pytest.approx([27.75])
    assert units.std.tolist() == pytest.approx([np.std(doses.numpy())], rel=1e-5)


def compose(folder, *overrides, root="train"):
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return hydra.compose(root, overrides=[*overrides, f"paths.output_dir={folder}", "run_name=test"])


HELD_OUT = ["G3", "G11"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A screen whose effects are linear in the embeddings; two perturbations are held out everywhere."""
    folder = tmp_path_factory.mktemp("screen")
    spec = ScreenSpec(
        n_genes=40,
        n_programs=2,
        n_perturbations=32,
        n_pairs=0,
        cell_lines=("alpha",),
        cells_per_condition=40,
        control_cells_per_line=200,
        effect_size=1.5,
        context_specificity=0.0,
        responder_fraction=(1.0, 1.0),
        n_batches=1,
    )
    truth = Screen(spec)
    truth.write(folder / "cells.h5ad")
    embeddings = np.stack([truth.shift("alpha", name) for name in truth.perturbations])
    table = pd.DataFrame(embeddings, index=truth.perturbations, columns=["x", "y"])
    table.to_parquet(folder / "right.parquet")
    wrong = table.copy()
    wrong.loc[HELD_OUT] = -table.loc[HELD_OUT].to_numpy()
    wrong.to_parquet(folder / "wrong.parquet")
    adata = ad.read_h5ad(folder / "cells.h5ad")
    number = pd.Series(np.arange(adata.n_obs) % 10, index=adata.obs_names)
    split = number.map({0: "val", 1: "test"}).fillna("train")
    split[adata.obs["condition"].isin(HELD_OUT).to_numpy()] = "test"
    split.to_csv(folder / "split.csv", header=False)
    return folder, adata


def trained(screen, folder, *overrides):
    given = [
        "data=h5ad",
        "data/splitter=saved",
        "model=primeflow_mlp",
        f"data.data.filename={screen[0] / 'cells.h5ad'}",
        f"data.splitter.split_path={screen[0] / 'split.csv'}",
        "data.loader.batch_size=128",
        "model.network.width=64",
        "model.network.depth=2",
        "model.network.embedding_width=32",
        "model.lr=3e-3",
        "model.lr_scheduler.conf.warmup_steps=10",
        "model.sampler.solver.steps=10",
        "trainer.max_steps=400",
        "trainer.val_check_interval=200",
        "trainer.accelerator=cpu",
        "callbacks.ema.decay=0.98",
        "test=false",
        "seed=0",
        "~callbacks.progress_bar",
    ]
    train(compose(folder, *given, *overrides))
    return folder / "checkpoints" / "last.ckpt"


def predict(checkpoint, folder, *overrides):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"cell_type": "alpha", "condition": HELD_OUT}).to_csv(folder / "table.csv", index=False)
    given = [
        f"ckpt_path={checkpoint}",
        f"prediction_dataframe_path={folder / 'table.csv'}",
        f"output_path={folder / 'predicted.h5ad'}",
        "n_cells=128",
        "accelerator=cpu",
        "precision=32-true",
    ]
    return ad.read_h5ad(predict_run(compose(folder, *given, *overrides, root="predict"), Console(file=io.StringIO())))


def errors(predicted, measured):
    """Distance of predicted to measured means, in units of the distance of controls, for each held-out perturbation."""

    def mean(cells, label):
        return np.asarray(cells.X[(cells.obs["condition"] == label).to_numpy()].mean(axis=0)).ravel()

    control = mean(measured, "control")
    return [
        np.linalg.norm(mean(predicted, name) - mean(measured, name)) / np.linalg.norm(control - mean(measured, name))
        for name in HELD_OUT
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["external", "mixture"])
def test_held_out_perturbations_are_predicted_from_their_embeddings(screen, tmp_path, kind):
    """Their own embeddings predict better than control cells, wrong ones worse; Python generates the same cells."""
    folder, measured = screen
    right = f"perturbation_embeddings_path={folder / 'right.parquet'}"
    settings = [f"model/conditions={kind}", "model.conditions.width=16", right]
    checkpoint = trained(screen, tmp_path / "run", *settings)
    predicted = predict(checkpoint, tmp_path / "right", right)
    wrong = predict(checkpoint, tmp_path / "wrong", f"perturbation_embeddings_path={folder / 'wrong.parquet'}")
    close, far = errors(predicted, measured), errors(wrong, measured)
    assert max(close) < 0.6
    assert min(far) > 1.2
    model = PRiMeFlow.load_from_checkpoint(checkpoint, evaluation=None, map_location="cpu", weights_only=False)
    conditions = [{"perturbation": name, "cell_type": "alpha"} for name in HELD_OUT]
    table = pd.read_parquet(folder / "right.parquet")
    sampled = model.eval().sample(conditions, n=128, perturbation_embeddings=table)
    np.testing.assert_array_equal(sampled.X.toarray(), predicted.X.toarray())
    with pytest.raises(InputError, match="2 perturbations not seen in training, 'G3' .*'G11'"):
        model.sample(conditions, n=1)


def test_multi_hot_names_the_held_out_perturbations_it_cannot_predict(screen, tmp_path):
    checkpoint = trained(screen, tmp_path / "run", "trainer.max_steps=1", "trainer.val_check_interval=1")
    with pytest.raises(InputError, match="2 perturbations not seen in training, 'G3' .*'G11'"):
        predict(checkpoint, tmp_path / "out", f"perturbation_embeddings_path={screen[0] / 'right.parquet'}")


def test_a_perturbation_of_the_vocabulary_that_training_lacks_is_predicted_from_its_row(screen, tmp_path):
    embeddings = f"perturbation_embeddings_path={screen[0] / 'right.parquet'}"
    short = ["trainer.max_steps=2", "trainer.val_check_interval=1", "data.filter_split_perturbations=false"]
    checkpoint = trained(screen, tmp_path / "run", "model/conditions=mixture", embeddings, *short)
    model = PRiMeFlow.load_from_checkpoint(checkpoint, evaluation=None, map_location="cpu", weights_only=False)
    names = model.training_record["train_context"]["perturbation_uniques"]
    assert {name for name, seen in zip(names, model.conditions.seen, strict=True) if not seen} == set(HELD_OUT)
    hot = torch.eye(len(names))[[names.index(name) for name in HELD_OUT]]
    condition = model.encoder(hot, {"cell_type": torch.ones(2, 1)})
    assert condition.perturbations.abs().max() == 0
    assert not condition.is_known.any()
