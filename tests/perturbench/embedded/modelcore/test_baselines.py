"""Baselines: what they can fit, the effect of each setting, and their checkpoints."""

import inspect
from copy import deepcopy

import anndata as ad
import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config

from primeflow_perturbench.perturbench.embedded.data.datasets import Counterfactual, SingleCellPerturbationWithControls
from primeflow_perturbench.perturbench.embedded.data.transforms.pipelines import LinearModelPipeline
from primeflow_perturbench.perturbench.embedded.data.types import Batch
from primeflow_perturbench.perturbench.embedded.errors import DataError
from primeflow_perturbench.perturbench.embedded.modelcore.models import DecoderOnly, LatentAdditive, LinearAdditive
from primeflow_perturbench.perturbench.embedded.modelcore.train import train

BASELINES = {"linear_additive": LinearAdditive, "latent_additive": LatentAdditive, "decoder_only": DecoderOnly}
NAMES = sorted(BASELINES)
INJECTED = [
    "n_genes",
    "n_perts",
    "transform",
    "context",
    "evaluation",
    "embedding_width",
    "perturbation_embedding_width",
    "gene_names",
]
B, G, P = 12, 5, 3
CONTEXT = {"covariate_uniques": {"line": ["b", "a"], "dose": None}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name: str, **knobs):
    small = {} if name == "linear_additive" else {"n_layers": 1, "encoder_width": 16}
    if name == "latent_additive":
        small["latent_dim"] = 4
    arguments = {"n_genes": G, "n_perts": P, "transform": None, "context": CONTEXT, "evaluation": None}
    return BASELINES[name](**arguments | small | knobs)


def make_batch(n: int = B, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    line = torch.nn.functional.one_hot(torch.randint(2, (n,), generator=draw), 2).float()
    return Batch(
        gene_expression=torch.rand(n, G, generator=draw) + 0.5,
        perturbations=torch.randint(2, (n, P), generator=draw).float(),
        covariates={"line": line, "dose": torch.rand(n, 1, generator=draw)},
        controls=torch.rand(n, G, generator=draw),
        gene_names=[f"g{i}" for i in range(G)],
    )


def fit(model, batch: Batch, steps: int, lr: float) -> float:
    """Return the mean squared error after some steps of Adam on one batch."""
    model.lr = lr
    optimizer = model.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batch), batch.gene_expression)
        loss.backward()
        optimizer.step()
    return loss.item()


def moved(model, batch: Batch, **changes) -> bool:
    """Whether the predictions depend on these fields of the batch."""
    model.eval()
    return not torch.equal(model.predict(batch), model.predict(batch._replace(**changes)))


# Signatures and configs


@pytest.mark.parametrize("name", NAMES)
def test_unknown_constructor_arguments_are_an_error(name):
    parameters = inspect.signature(BASELINES[name].__init__).parameters
    assert set(INJECTED) <= set(parameters)
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    with pytest.raises(TypeError, match="encoder_widht"):
        make(name, encoder_widht=3)


@pytest.mark.parametrize("name", NAMES)
def test_configs_name_every_constructor_argument(name):
    cfg = compose_config(["data=h5ad_controls", f"model={name}"])
    knobs = set(inspect.signature(BASELINES[name].__init__).parameters) - {"self", "lr_scheduler", *INJECTED}
    assert set(cfg.model) == knobs | {"_target_"}
    model = hydra.utils.instantiate(cfg.model, n_genes=G, n_perts=P, transform=None, context=CONTEXT, evaluation=None)
    assert type(model) is BASELINES[name]
    assert model.lr == cfg.model.lr
    cfg = compose_config(["data=h5ad_controls", f"model={name}", "model/lr_scheduler=warmup_cosine"])
    assert "conf" in cfg.model.lr_scheduler


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_cell_keeps_its_shape(name):
    model = make(name).eval()
    predicted = model.predict(make_batch(1))
    assert predicted.shape == (1, G)
    obs = pd.DataFrame({"condition": ["P"]}, index=["cell"])
    adata = model.predict_anndata((make_batch(1), obs))
    assert adata.shape == (1, G)
    np.testing.assert_array_equal(adata.X, predicted.detach())


@pytest.mark.parametrize("name", NAMES)
def test_perturbation_embeddings_replace_the_multi_hot(name):
    model = make(name, perturbation_embedding_width=7)
    batch = make_batch()._replace(perturbations=torch.rand(B, 7))
    assert fit(model, batch, 2, 0.1) > 0
    assert moved(model, batch, perturbations=batch.perturbations + 1)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_logged_with_the_number_of_cells(name):
    model, logged = make(name), []
    model.log = lambda key, value, **settings: logged.append((key, value.item(), settings["batch_size"]))
    model.on_fit_start()
    batch = make_batch(5)
    model._trainer = type("Trainer", (), {"global_rank": 0, "current_epoch": 0})()
    loss = model.training_step(batch, 0)
    model.validation_step(batch, 0)
    expected = ((model(batch) - batch.gene_expression) ** 2).mean().item()
    assert logged == [("train_loss", pytest.approx(expected), 5), ("val_loss", pytest.approx(expected), 5)]
    assert loss.requires_grad


# Linear additive


def planted_cells() -> tuple[ad.AnnData, np.ndarray]:
    """Cells of one group whose perturbations add effects (P, G) to constant controls, and the effects."""
    effects = np.arange(1, 1 + P * G).reshape(P, G) / 4.0
    labels = ["control", "A", "B", "C", "A+B", "B+C"] * 4
    parts = np.array([[name in label.split("+") for name in "ABC"] for label in labels], dtype=float)
    expression = 2 + parts @ effects + np.random.default_rng(0).normal(0, 0.01, (len(labels), G))
    expression[parts.sum(1) == 0] = 2
    obs = pd.DataFrame({"condition": labels}, index=[f"cell{i}" for i in range(len(labels))])
    return ad.AnnData(expression.astype(np.float32), obs=obs), effects


def test_linear_additive_recovers_planted_effects():
    cells, effects = planted_cells()
    dataset, context = SingleCellPerturbationWithControls.from_anndata(cells, "condition")
    dataset.transform = LinearModelPipeline(context["perturbation_uniques"])
    assert context["perturbation_uniques"] == ["A", "B", "C"]
    batch = dataset[range(len(dataset))]
    model = LinearAdditive(G, P, dataset.transform, context, None, wd=0.0, softplus_output=False)
    residual = (batch.gene_expression - batch.controls).double()
    inputs = torch.cat([batch.perturbations, torch.ones(len(residual), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, residual).solution[:-1]
    fit(model, batch, 2500, 0.05)
    found = model.fc_pert.weight.T.detach()
    np.testing.assert_allclose(found, solution, atol=1e-3)
    np.testing.assert_allclose(found, effects, atol=0.03)

    # An unseen combination gets the sum of its parts.
    conditions = pd.DataFrame({"condition": ["A+C"]})
    unseen, _ = Counterfactual.from_anndata(cells, conditions, "condition")
    unseen.transform = dataset.transform
    predicted = model.predict_anndata(unseen[[0]])
    np.testing.assert_allclose(predicted.X, np.tile(2 + effects[0] + effects[2], (4, 1)), atol=0.06)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("observed_as_control", [True, False])
def test_linear_additive_equals_its_formula(softplus, observed_as_control):
    batch = make_batch()
    model = make("linear_additive", softplus_output=softplus, observed_as_control=observed_as_control)
    assert inspect.signature(LinearAdditive).parameters["softplus_output"].default is True

    def formula(start):
        x = start + batch.perturbations @ model.fc_pert.weight.T + model.fc_pert.bias
        return torch.log1p(x.exp()) if softplus else x

    torch.testing.assert_close(model.predict(batch), formula(batch.controls))
    torch.testing.assert_close(model.predict(batch._replace(controls=None)), formula(batch.gene_expression))
    start = batch.gene_expression if observed_as_control else batch.controls
    model.log = lambda *args, **kwargs: None
    loss = model.validation_step(batch, 0)
    torch.testing.assert_close(loss, (formula(start) - batch.gene_expression).square().mean())


def test_linear_additive_can_use_covariates():
    batch = make_batch()
    other = {"line": 1 - batch.covariates["line"], "dose": batch.covariates["dose"]}
    for inject in (False, True):
        model = make("linear_additive", inject_covariates=inject)
        fit(model, batch, 3, 0.1)
        assert model.fc_pert.in_features == P + 3 * inject
        assert moved(model, batch, covariates=other) == inject


# Latent additive


def test_latent_additive_overfits_a_batch():
    batch = make_batch()
    model = make("latent_additive", encoder_width=64, latent_dim=16)
    before = torch.nn.functional.mse_loss(model(batch), batch.gene_expression).item()
    assert fit(model, batch, 300, 0.01) < 0.001 < 0.05 < before


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_latent_additive_can_use_covariates(where):
    batch = make_batch()
    other = {"line": 1 - batch.covariates["line"], "dose": batch.covariates["dose"]}
    models = [make("latent_additive", **{f"inject_covariates_{where}": inject}) for inject in (False, True)]
    assert [moved(model, batch, covariates=other) for model in models] == [False, True]
    widths = [getattr(model, where)[0].in_features for model in models]
    assert widths[1] - widths[0] == 3


def test_latent_additive_adds_latents():
    model, batch = make("latent_additive").eval(), make_batch()
    latent = model.encoder(batch.controls) + model.perturbation_encoder(batch.perturbations)
    torch.testing.assert_close(model.predict(batch), torch.nn.functional.softplus(model.decoder(latent)))


def test_latent_additive_reads_controls_else_cells_else_embeddings():
    model, batch = make("latent_additive"), make_batch()
    assert moved(model, batch, controls=batch.controls + 1)
    assert not moved(model, batch, gene_expression=batch.gene_expression + 1)
    assert torch.equal(
        model.predict(batch._replace(controls=None)), model.predict(batch._replace(controls=batch.gene_expression))
    )
    model = make("latent_additive", embedding_width=2)
    batch = batch._replace(control_embeddings=torch.rand(B, 2), embeddings=torch.rand(B, 2))
    assert moved(model, batch, control_embeddings=torch.rand(B, 2))
    assert not moved(model, batch, controls=batch.controls + 1)
    assert moved(model, batch, control_embeddings=None)


@pytest.mark.parametrize("knobs", [{"n_layers": 2}, {"encoder_width": 17}, {"latent_dim": 5}])
def test_latent_additive_has_the_configured_sizes(knobs):
    count = [sum(p.numel() for p in make("latent_additive", **k).parameters()) for k in ({}, knobs)]
    assert count[0] < count[1]


def test_latent_additive_applies_dropout():
    batch = make_batch()
    for dropout in (0.0, 0.5):
        model = make("latent_additive", dropout=dropout)
        assert torch.equal(model(batch), model(batch)) == (dropout == 0)
        assert torch.equal(model.eval()(batch), model(batch))


# Decoder only


@pytest.mark.parametrize(("perturbations", "covariates"), [(True, True), (True, False), (False, True)])
def test_decoder_only_reads_the_configured_inputs(perturbations, covariates):
    model, batch = make("decoder_only", use_perturbations=perturbations, use_covariates=covariates), make_batch()
    other = {"line": batch.covariates["line"], "dose": 1 + batch.covariates["dose"]}
    assert moved(model, batch, perturbations=1 - batch.perturbations) == perturbations
    assert moved(model, batch, covariates=other) == covariates
    assert not moved(model, batch, controls=batch.controls + 1, gene_expression=batch.gene_expression + 1)


@pytest.mark.parametrize("knobs", [{"n_layers": 2}, {"encoder_width": 17}])
def test_decoder_only_has_the_configured_sizes(knobs):
    count = [sum(p.numel() for p in make("decoder_only", **k).parameters()) for k in ({}, knobs)]
    assert count[0] < count[1]


# Both


@pytest.mark.parametrize("name", ["decoder_only", "latent_additive"])
def test_softplus_makes_the_output_positive(name):
    lowest = {}
    for softplus in (False, True):
        torch.manual_seed(0)
        model = make(name, softplus_output=softplus)
        lowest[softplus] = model.predict(make_batch(200)).min().item()
    assert lowest[False] < 0 < lowest[True]


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("latent_additive", {"latent_dim": 0}, "expected positive sizes"),
        ("decoder_only", {"n_layers": 0}, "expected positive sizes, found 6 inputs, width 16, 0 layers, 5 outputs"),
        ("latent_additive", {"dropout": 1.0}, "dropout: expected at least 0 and below 1, found 1.0"),
        ("decoder_only", {"use_perturbations": False, "use_covariates": False}, "decoder has no input: set use_pert"),
        (
            "decoder_only",
            {"use_perturbations": False, "context": {"covariate_uniques": {}}},
            "the decoder has no input: .* data that have covariates",
        ),
    ],
)
def test_invalid_settings_are_errors(name, knobs, message):
    with pytest.raises(DataError, match=message):
        make(name, **knobs)


# Runs


@pytest.fixture(scope="module")
def configs(screen_path):
    """Configs of tiny runs by name of the model."""
    settings = [
        f"data.data.filename={screen_path}",
        "data.loader.batch_size=250",
        "data.evaluation.chunk_size=100",
        "trainer.max_steps=8",
        "trainer.val_check_interval=4",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "~callbacks.lr_monitor",
        "~callbacks.progress_bar",
        "~logger",
        "callbacks.model_checkpoint.save_top_k=-1",
        "test=false",
    ]
    choices = {name: ("h5ad_controls", name) for name in NAMES} | {"no controls": ("h5ad", "decoder_only")}
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return {
            name: hydra.compose("train", [f"data={data}", f"model={model}", *settings])
            for name, (data, model) in choices.items()
        }


def run(cfg, folder, ckpt_path=None):
    cfg = deepcopy(cfg)
    cfg.paths.output_dir, cfg.ckpt_path = str(folder), ckpt_path and str(ckpt_path)
    return train(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_checkpoint_predicts_the_same(configs, tmp_path, name):
    done = run(configs[name], tmp_path)
    datamodule = done["datamodule"]
    assert {"train_loss", "val_loss"} <= set(done["metrics"])
    model = (
        BASELINES[name]
        .load_from_checkpoint(
            tmp_path / "checkpoints" / "last.ckpt",
            evaluation=None,
            lr=0.5,
            lr_scheduler=None,
            map_location="cpu",
            weights_only=False,
        )
        .eval()
    )
    assert model.lr == 0.5
    assert model.training_record["train_context"] == datamodule.context
    datamodule.setup("test")
    batch, _ = next(iter(datamodule.test_dataloader()))
    with torch.no_grad():
        expected, found = done["model"].eval().predict(batch), model.predict(batch)
        untrained = type(model)(**model.hparams).eval().predict(batch)
    assert torch.equal(expected, found)
    assert not torch.equal(expected, untrained)
    assert found.shape == batch.gene_expression.shape


def test_dropout_is_the_same_after_a_restart(configs, tmp_path):
    cfg = deepcopy(configs["latent_additive"])
    assert cfg.model.dropout > 0
    run(cfg, tmp_path / "unbroken")
    torch.manual_seed(99)
    run(cfg, tmp_path / "resumed", tmp_path / "unbroken/checkpoints/step4.ckpt")
    assert not (tmp_path / "resumed/checkpoints/step4.ckpt").exists()
    weights = [
        torch.load(tmp_path / name / "checkpoints/step8.ckpt", weights_only=False)["current_model_state"]
        for name in ("unbroken", "resumed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("name", NAMES)
def test_only_decoder_only_accepts_data_without_controls(configs, tmp_path, name):
    cfg = deepcopy(configs[name])
    cfg.data = configs["no controls"].data
    if name == "decoder_only":
        assert run(cfg, tmp_path)["trainer"].global_step == 8
    else:
        with pytest.raises(DataError, match="needs a data set of class .*WithControls, found SingleCellPerturbation; "):
            run(cfg, tmp_path)
