import inspect
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from builders import model_settings
from torch import nn

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.unet import UNet
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.sampling.settings import SamplingSettings
from primeflow_perturbench.simulation.screen import Screen, ScreenSpec
from primeflow_perturbench.training.checkpoints import Checkpoint

Batch = load("data.types.Batch")
INJECTED = {
    "n_genes",
    "n_perts",
    "transform",
    "context",
    "evaluation",
    "embedding_width",
    "perturbation_embedding_width",
    "gene_names",
}
GENES = [f"gene{i}" for i in range(6)]
PERTURBATIONS = ["G0", "G1", "G2"]
SMALL_MLP = partial(MLP, width=16, depth=2, embedding_width=8)
SMALL_UNET = partial(UNet, channels=8, multipliers=(1, 2), blocks=1, genes=partial(GenePatches, patch=4))
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def context(covariates=None):
    covariates = {"line": ["alpha", "beta"]} if covariates is None else covariates
    return {
        "perturbation_uniques": PERTURBATIONS,
        "covariate_uniques": covariates,
        "perturbation_key": "condition",
        "covariate_keys": list(covariates),
        "perturbation_combination_delimiter": "+",
        "perturbation_control_value": "control",
    }


def build(perturbed=True, covariates=None, **settings):
    """A small model with parameters that are fixed and not silent."""
    torch.manual_seed(0)
    given = {
        "n_genes": len(GENES),
        "n_perts": len(PERTURBATIONS),
        "transform": None,
        "context": context(covariates),
        "evaluation": None,
        "gene_names": GENES,
        "network": SMALL_MLP,
        "solver": ODESolver("midpoint", steps=3),
        "detection_limit": None,
    }
    model = PRiMeFlow(**model_settings(**{**given, **settings}))
    if perturbed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(labels=("G0", "G0", "G1", "control"), lines=None, perturbations=None, **fields):
    """A batch with a cell for each label, in turn of line alpha and beta."""
    if perturbations is None:
        parts = [label.split("+") for label in labels]
        perturbations = torch.tensor([[float(name in part) for name in PERTURBATIONS] for part in parts])
    lines = torch.arange(len(labels)) % 2 if lines is None else torch.tensor(lines)
    given = {
        "gene_expression": random(len(labels), len(GENES)).abs(),
        "perturbations": perturbations,
        "covariates": {"line": nn.functional.one_hot(lines, 2).float()},
        "gene_names": GENES,
    }
    return Batch(**{**given, **fields})


class Recorder(nn.Module):
    """A network of zero velocity that keeps the conditions it was asked for."""

    def __init__(self, n_genes, condition_width):
        super().__init__()
        self.conditions = []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, condition):
        self.conditions.append(condition)
        return x * self.weight


class Batches(L.LightningDataModule):
    """The same batch of log1p cells, or of what is given, a few times an epoch."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = list(batches)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def fit(model, *batches, steps=1, **settings):
    given = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**given, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=Batches(*batches))
    return trainer


# --- the signature


def test_the_signature_is_strict_and_has_what_the_host_injects():
    parameters = inspect.signature(PRiMeFlow.__init__).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert set(parameters) >= INJECTED


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence'"):
        build(guidence=2.0)


@pytest.mark.parametrize("name", ["primeflow", "primeflow_fast", "primeflow_mlp"])
def test_the_keys_of_every_model_config_are_parameters(name):
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        config = hydra.compose("train", overrides=["data=h5ad", f"model={name}"]).model
    known = set(inspect.signature(PRiMeFlow.__init__).parameters)
    assert set(config) - {"_target_"} <= known
    assert len(config) > 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition_dropout": 1.0}, "condition_dropout must be at least 0 and below 1, got 1.0"),
        ({"condition_dropout": -0.1}, "condition_dropout must be at least 0 and below 1, got -0.1"),
        ({"guidance": -1.0}, "guidance must be at least 0, got -1.0"),
        ({"guidance": 2.0, "condition_dropout": 0.0}, "guidance 2.0 needs a null condition"),
        ({"guidance": 0.0, "condition_dropout": 0.0}, "guidance 0.0 needs a null condition"),
        ({"calibrate": True}, "got True"),
        ({"calibration_cells": 0}, "calibration_cells must be at least 1, got 0"),
        ({"cells_per_condition": 0}, "cells_per_condition must be at least 1, got 0"),
        ({"detection_limit": "learnt"}, "must be 'learned', 'none' or a number, got 'learnt'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        build(**settings)


def test_no_guidance_needs_no_dropout():
    assert build(guidance=1.0, condition_dropout=0.0).sampler.guidance == 1


# --- training


def test_a_training_step_repeats_and_another_batch_seed_or_epoch_differs(monkeypatch):
    batch = batch_of()
    for step in (PRiMeFlow.training_step, PRiMeFlow.validation_step):
        monkeypatch.setattr(PRiMeFlow, step.__name__, torch.no_grad()(step))
    loss = build().training_step(batch, 3)
    assert loss.shape == ()
    assert torch.equal(loss, build().training_step(batch, 3))
    torch.randn(5)
    model = build()
    assert torch.equal(loss, model.training_step(batch, 3))
    others = [model.training_step(batch, 4), model.validation_step(batch, 3)]
    model.seed = 1
    others.append(model.training_step(batch, 3))
    model.seed = 0
    monkeypatch.setattr(PRiMeFlow, "current_epoch", 1)
    others.append(model.training_step(batch, 3))
    assert all(abs(float(other - loss)) > 1e-4 for other in others)
    assert len({float(other) for other in others}) == 4


def test_a_validation_step_is_the_same_in_every_epoch(monkeypatch):
    model, batch = build(), batch_of()
    first = model.validation_step(batch, 2)
    monkeypatch.setattr(PRiMeFlow, "current_epoch", 7)
    assert torch.equal(first, model.validation_step(batch, 2))
    assert not torch.equal(first, model.validation_step(batch, 3))


def test_the_loss_of_no_velocity_is_known():
    """Noise and data are apart, so mean |x_1 - x_0|^2 = mean x_1^2 + 1."""
    n = 4000
    batch = batch_of(["G0"] * n, gene_expression=random(n, len(GENES)).abs() + 2)
    loss = build(perturbed=False, network=Recorder).training_step(batch, 0)
    expected = float((batch.gene_expression**2).mean()) + 1
    assert float(loss.detach()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_condition_dropout_acts_in_training_alone(share):
    n = 4000
    model = build(network=Recorder, condition_dropout=share)
    model.training_step(batch_of(["G0"] * n), 0)
    model.validation_step(batch_of(["G0"] * n), 0)
    trained, validated = (
        (seen == model.conditions(model.encoder.null)).all(dim=1) for seen in model.network.conditions
    )
    assert trained.float().mean() == pytest.approx(share, abs=0.03)
    assert not validated.any()


def test_the_network_sees_the_perturbations_and_the_covariates():
    model = build(network=Recorder)
    model.validation_step(batch_of(["G0+G2", "control"]), 0)
    assert model.network.conditions[0].tolist() == [[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_the_network_trains_on_a_known_screen():
    screen = Screen(ScreenSpec(n_genes=16, n_perturbations=3, n_pairs=0, cell_lines=("alpha",))).adata()
    x = torch.from_numpy(np.asarray(screen.X.todense()))
    labels = screen.obs["condition"].tolist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cells = [batch_of([labels[i] for i in rows], gene_expression=x[rows], gene_names=None) for rows in order.split(64)]
    model = build(n_genes=16, gene_names=None, perturbed=False, lr=1e-2, network=partial(SMALL_MLP, width=64))

    def loss():
        model.trainer = None
        with torch.no_grad():
            return np.mean([float(model.validation_step(batch, 0)) for batch in cells])

    before = loss()
    fit(model, *cells, steps=150)
    assert loss() < 0.5 * before
    generated = model.predict(batch_of(["control"] * 100, lines=[0] * 100))
    truth = x[(screen.obs["condition"] == "control").to_numpy()].mean(0)
    assert (generated.mean(0) - truth).square().mean() < 0.1 * truth.square().mean()


# --- the detection limit


def fraction_between(cells, low, high):
    return float(((cells > low) & (cells < high)).float().mean())


def test_a_given_limit_acts():
    batch = batch_of(["G0"] * 64)
    free, limited = build().predict(batch), build(detection_limit=0.7).predict(batch)
    assert (free >= 0).all()
    assert fraction_between(free, 0, 0.7) > 0.05
    assert fraction_between(limited, 0, 0.7) == 0
    assert torch.equal(limited, torch.where(free < 0.7, 0, free))
    assert torch.equal(build(detection_limit="none").predict(batch), free)


def test_the_learned_limit_is_half_the_tenth_percentile_of_the_training_cells():
    batch = batch_of(["G0"] * 50)
    model = build(detection_limit="learned")
    with pytest.raises(InputError, match="learned in training: train first, or set detection_limit=none"):
        model.predict(batch)
    fit(model, batch)
    expected = np.quantile(batch.gene_expression.numpy(), 0.1) / 2
    assert model.learned_detection_limit == pytest.approx(expected, abs=0.01)
    assert expected > 0.03
    cells = model.predict(batch)
    assert fraction_between(cells, 0, model.learned_detection_limit) == 0
    assert (cells > 0).any()


def test_statistics_stop_at_enough_cells(monkeypatch):
    monkeypatch.setattr(PRiMeFlow, "STATISTICS_CELLS", 4)
    early, late = batch_of(), batch_of(gene_expression=batch_of().gene_expression + 5)
    model = build(detection_limit="learned")
    fit(model, early, late)
    assert model.learned_detection_limit < 1


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (torch.tensor([[0.0, 3, 250, 1, 0, 7]]), "whole numbers up to 250, which look like raw counts"),
        (torch.tensor([[0.0, 0.5, -1.5, 1, 0, 7]]), "1 negative values, but log1p expression is never negative"),
        (torch.tensor([[0.0, 0.5, torch.nan, torch.inf, 0, 7]]), "2 NaN or infinite values"),
    ],
)
def test_cells_that_are_not_log1p_expression_are_refused(expression, message):
    batch = batch_of(gene_expression=expression.repeat(4, 1) if "counts" in message else expression)
    with pytest.raises(InputError, match=message):
        fit(build(), batch)


# --- prediction


@pytest.mark.parametrize("network", [SMALL_MLP, SMALL_UNET])
def test_one_cell_keeps_its_axis(network):
    cells = build(network=network).predict(batch_of(["G0"]))
    assert cells.shape == (1, len(GENES))
    assert cells.device.type == "cpu"
    assert not cells.requires_grad
    many = build(network=network).predict(batch_of(["G0"] * 3, lines=[0, 0, 0]))
    assert torch.equal(cells, many[:1])


def test_one_gene():
    model = build(n_genes=1, gene_names=["gene0"], network=SMALL_UNET)
    assert model.predict(batch_of(["G0"])).shape == (1, 1)
    assert model.training_step(batch_of(["G0"], gene_expression=torch.ones(1, 1)), 0).isfinite()


def test_condition_seed_guidance_and_solver_change_the_cells():
    batch, plain = batch_of(["G0"] * 4, lines=[0] * 4), build().predict(batch_of(["G0"] * 4, lines=[0] * 4))
    assert torch.equal(plain, build().predict(batch))
    others = [
        build().predict(batch_of(["G1"] * 4, lines=[0] * 4)),
        build().predict(batch_of(["G0"] * 4, lines=[1] * 4)),
        build(seed=1).predict(batch),
        build(guidance=3.0).predict(batch),
        build(solver=ODESolver("euler", steps=3)).predict(batch),
    ]
    assert all((other - plain).abs().max() > 1e-3 for other in others)


def test_the_batch_size_of_sampling_changes_no_bit():
    batch = batch_of(["G0"] * 70, lines=[0] * 70)
    first = build(sample_batch_size=1).predict(batch)
    assert torch.equal(first, build(sample_batch_size=512).predict(batch))


def test_embeddings_of_perturbations_take_the_place_of_the_multi_hot():
    model = build(perturbation_embedding_width=5)
    assert model.conditions.width == 5 + 2 + 1
    one, other = (batch_of(perturbations=random(4, 5, seed=s)) for s in (0, 1))
    assert model.training_step(one, 0).isfinite()
    assert model.predict(one).shape == (4, len(GENES))
    assert not torch.equal(model.predict(one), model.predict(other))
    with pytest.raises(ValueError, match=r"are \[3, 2\], but the model was built with \[5, 2\]"):
        model.predict(batch_of())


def test_a_continuous_covariate():
    model = build(covariates={"line": ["alpha", "beta"], "dose": None})
    assert model.conditions.width == 3 + 2 + 1 + 1
    line = batch_of().covariates["line"]
    low, high = (batch_of(covariates={"line": line, "dose": torch.full((4, 1), dose)}) for dose in (0.0, 3.0))
    assert model.training_step(low, 0) != model.training_step(high, 0)
    assert not torch.equal(model.predict(low), model.predict(high))


@pytest.mark.parametrize("covariates", [{}, None])
def test_no_covariates(covariates):
    model = build(covariates={})
    batch = batch_of(covariates=covariates)
    assert model.conditions.width == 3 + 1
    assert model.training_step(batch, 0).isfinite()
    assert model.predict(batch).shape == (4, len(GENES))


def table():
    """Two rows of G0 in alpha, one of G0 in beta, one of the control in alpha, with indices of conditions."""
    labels, lines = ["G0", "G0", "G0", "control"], [0, 0, 1, 0]
    obs = pd.DataFrame(
        {"condition": labels, "line": [["alpha", "beta"][i] for i in lines], "_condition_idx": [0, 0, 1, 2]},
        index=["a", "b", "c", "d"],
    )
    return batch_of(labels, lines=lines), obs


def test_an_anndata_has_a_cell_for_each_row():
    model = build()
    predicted = model.predict_anndata(table())
    assert list(predicted.var_names) == GENES
    assert list(predicted.obs["condition"]) == ["G0", "G0", "G0", "control"]
    assert list(predicted.obs["line"]) == ["alpha", "alpha", "beta", "alpha"]
    assert list(predicted.obs_names) == ["0_0", "0_1", "1_0", "2_0"]
    np.testing.assert_array_equal(predicted.X, model.predict(table()[0]).numpy())


def test_an_anndata_has_so_many_cells_of_each_condition():
    predicted = build(cells_per_condition=40).predict_anndata(table())
    counts = predicted.obs.groupby(["condition", "line"]).size()
    assert counts.to_dict() == {("G0", "alpha"): 40, ("G0", "beta"): 40, ("control", "alpha"): 40}
    assert predicted.obs_names.is_unique
    # The cells of the smaller table are the first of the larger.
    few = build().predict_anndata(table())
    np.testing.assert_array_equal(predicted["0_1"].X, few["0_1"].X)
    np.testing.assert_array_equal(predicted["2_0"].X, few["2_0"].X)
    np.testing.assert_array_equal(build(cells_per_condition=1).predict_anndata(table()).X, predicted.X[::40])


def test_an_anndata_of_one_cell_and_without_indices_of_conditions():
    batch, obs = batch_of(["G0"]), table()[1].iloc[:1].drop(columns="_condition_idx")
    predicted = build().predict_anndata((batch, obs))
    assert predicted.shape == (1, len(GENES))
    assert list(predicted.obs_names) == ["cell0"]
    unnamed = build(gene_names=None).predict_anndata((batch._replace(gene_names=GENES[::-1]), obs))
    assert list(unnamed.var_names) == GENES[::-1]


# --- checkpoints


SIZES = ("model.network.width=16", "model.network.depth=1", "model.network.embedding_width=8")


def compose(folder, screen_path, *overrides, sizes=SIZES):
    """Three steps of a small perceptron on the screen of the tests."""
    settings = [
        "data=h5ad",
        "data/splitter=saved",
        f"data.data.filename={screen_path}",
        f"data.splitter.split_path={screen_path.parent / 'split.csv'}",
        "data.splitter.save=false",
        "model=primeflow_mlp",
        *sizes,
        "model.sampler.solver.steps=4",
        "model.sampler.detection_limit=learned",
        "trainer.max_steps=3",
        "trainer.val_check_interval=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "+trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=1",
        f"paths.output_dir={folder}",
        "~logger",
        "~callbacks.lr_monitor",
        "~callbacks.progress_bar",
        "test=false",
        *overrides,
    ]
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return hydra.compose("train", overrides=settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, screen_path):
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(compose(folder, screen_path)), folder


def reload(path):
    return PRiMeFlow.load_from_checkpoint(path, evaluation=None, map_location="cpu", weights_only=False)


def test_a_checkpoint_gives_the_same_cells_and_keeps_the_detection_limit(trained):
    run, folder = trained
    path = folder / "checkpoints" / "step3.ckpt"
    model, again = reload(path), reload(path)
    assert model.learned_detection_limit == run["model"].learned_detection_limit > 0.1
    assert model.gene_names == run["datamodule"].train_iterator.gene_names
    assert model.training_record["train_context"]["perturbation_uniques"]
    batch = next(iter(run["datamodule"].val_dataloader()))
    cells = model.predict(batch)
    assert torch.equal(cells, again.predict(batch))
    assert cells.shape == batch.gene_expression.shape
    assert fraction_between(cells, 0, model.learned_detection_limit) == 0
    # Another model with these weights and this limit is the same model.
    run["model"].load_state_dict(model.state_dict())
    assert torch.equal(run["model"].predict(batch), cells)


def test_a_checkpoint_can_be_asked_for_other_sampling(trained):
    path = trained[1] / "checkpoints" / "step3.ckpt"
    batch = next(iter(trained[0]["datamodule"].val_dataloader()))
    guided = PRiMeFlow.load_from_checkpoint(
        path, evaluation=None, map_location="cpu", weights_only=False, sampler=SamplingSettings(guidance=3.0)
    )
    assert guided.sampler.guidance == 3
    assert not torch.equal(guided.predict(batch), reload(path).predict(batch))


def test_calibrated_cells_have_the_predicted_marginals_and_a_checkpoint_keeps_them(tmp_path, screen_path):
    calibrate = ["model.sampler.calibrate=marginals", "model.sampler.calibration_cells=256"]
    run = train(compose(tmp_path, screen_path, *calibrate))
    loaded = reload(tmp_path / "checkpoints" / "step3.ckpt")
    dataset = run["datamodule"].train_iterator
    cells = dataset[list(range(len(dataset)))]
    vectors = loaded.encoder(cells.perturbations, cells.covariates).vector()
    distinct, counts = vectors.unique(dim=0, return_counts=True)
    vector = distinct[counts.argmax()][None]
    most = Condition.from_vector(vector, cells.perturbations.shape[1])
    # Where many cells were measured the predicted mean is near theirs, and so is that of as many generated ones.
    measured = cells.gene_expression[(vectors == vector).all(1)].mean(0)
    limit = loaded.learned_detection_limit
    (mean,), (rate,), _ = loaded.marginals.targets(most, limit)
    assert torch.equal(mean, run["model"].marginals.targets(most, limit).mean[0])
    assert (mean - measured).abs().max() < 0.15
    generated = loaded.generate(most.expand(256))
    assert (generated.mean(0) - mean).abs().max() < 0.02
    assert ((generated > 0).float().mean(0) - rate).abs().max() < 0.003
    # Few cells are the first of many.
    assert torch.equal(loaded.generate(most.expand(3)), generated[:3])
    loaded.sampler = replace(loaded.sampler, calibrate="none")
    assert (loaded.generate(most.expand(256)).mean(0) - mean).abs().max() > 0.2


def test_calibration_needs_a_training_that_learned_the_means(trained):
    model = PRiMeFlow.load_from_checkpoint(
        trained[1] / "checkpoints" / "step3.ckpt",
        evaluation=None,
        map_location="cpu",
        weights_only=False,
        sampler=SamplingSettings(calibrate="marginals"),
    )
    with pytest.raises(InputError, match="learned in training: train first, or set model.sampler.calibrate=none"):
        model.predict(next(iter(trained[0]["datamodule"].val_dataloader())))


def test_counts_in_the_file_are_refused(tmp_path, screen_path, screen):
    screen.X = np.round(np.expm1(screen.X.toarray() if hasattr(screen.X, "toarray") else screen.X))
    screen.write_h5ad(tmp_path / "counts.h5ad")
    config = compose(tmp_path, screen_path, f"data.data.filename={tmp_path / 'counts.h5ad'}")
    with pytest.raises(InputError, match=r"look like raw counts, but PRiMeFlow models log1p .* sc\.pp\.log1p first"):
        train(config)


@pytest.mark.parametrize("last", [5, 6])
def test_the_last_step_is_saved_however_the_interval_falls(tmp_path, last):
    callback = Checkpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, save_last=True, monitor=None
    )
    model = build()
    fit(model, *[batch_of()] * 4, steps=last, enable_checkpointing=True, callbacks=[callback])
    saved = torch.load(Path(callback.best_model_path), weights_only=False)
    assert saved["global_step"] == last
    assert Path(callback.best_model_path).name == f"step={last}.ckpt"
    assert {path.name for path in tmp_path.iterdir()} == {f"step={last}.ckpt", "last.ckpt"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == last
    for name, value in model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)


def test_a_trial_run_leaves_no_checkpoint(tmp_path):
    callback = Checkpoint(dirpath=tmp_path, every_n_train_steps=2)
    fit(build(), batch_of(), enable_checkpointing=True, callbacks=[callback], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
