"""The source, coupling and space of a model's flow."""

import warnings
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from builders import build_model, fit
from torch import nn

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import GeneSpace, PCASpace
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.unet import UNet
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.perturbench.embedded.modelcore.train import train

Batch = load("data.types.Batch")
SCREEN = Path(__file__).parents[1] / "files" / "screen"
G, PERTURBATIONS, LINES = 6, ["G0", "G1"], ["alpha", "beta"]
SMALL = partial(MLP, width=16, depth=1, embedding_width=8)
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class Still(nn.Module):
    """A network with zero velocity: cells end where they start."""

    def __init__(self, n_genes, condition_width):
        super().__init__()
        self.weight, self.n_genes, self.seen = nn.Parameter(torch.zeros(1)), n_genes, []

    def forward(self, x, t, condition):
        self.seen.append((x.detach(), t, condition))
        return x * self.weight


def build(**settings):
    context = {"perturbation_uniques": PERTURBATIONS, "covariate_uniques": {"line": LINES}}
    given = {"network": SMALL, "condition_dropout": 0.0, "gene_names": None}
    return build_model([f"g{i}" for i in range(G)], context, **{**given, **settings})


def batch_of(labels, lines, expression):
    perturbations = torch.tensor([[float(name == label) for name in PERTURBATIONS] for label in labels])
    covariates = {"line": nn.functional.one_hot(torch.tensor([LINES.index(line) for line in lines]), 2).float()}
    return Batch(gene_expression=expression, perturbations=perturbations, covariates=covariates, gene_names=None)


def screen_of(n=40, seed=0):
    """Cells of both lines; controls of alpha hold 1.5, those of beta 2.5, treated cells other values above 5."""
    labels = ["control", "G0", "control", "G1"] * n
    lines = ["alpha", "alpha", "beta", "beta"] * n
    x = 5 + torch.rand(4 * n, G, generator=torch.Generator().manual_seed(seed))
    x[0::4], x[2::4] = 1.5, 2.5
    return batch_of(labels, lines, x)


def fitted(model, *batches, steps=1):
    fit(model, *(batches or [screen_of()]), steps=steps)
    return model


def condition(model, label, line, n=1):
    one = batch_of([label], [line], torch.zeros(1, G))
    return model.encoder(one.perturbations, one.covariates).expand(n)


def joined(*conditions):
    """Several batches of conditions as one."""
    return Condition.from_vector(torch.cat([one.vector() for one in conditions]), len(PERTURBATIONS))


# --- source


def test_training_paths_start_at_controls_of_the_same_covariates():
    model = fitted(build(source="control", source_noise=0.0, network=Still))
    batch = screen_of(seed=1)
    sample, noise = model._sample(batch.gene_expression, model.encoder(batch.perturbations, batch.covariates), 0, 0, 0)
    expected = torch.tensor([1.5, 1.5, 2.5, 2.5] * 40)[:, None].expand(-1, G)
    assert torch.equal(sample.x_0, expected)
    assert torch.equal(sample.x_1, batch.gene_expression)
    torch.testing.assert_close(sample.x_t, expected + noise.t[:, None] * (batch.gene_expression - expected))


def test_the_noise_on_controls_has_the_requested_deviation():
    model = fitted(build(source="control", source_noise=0.3))
    batch = screen_of(n=1000, seed=1)
    sample, _ = model._sample(batch.gene_expression, model.encoder(batch.perturbations, batch.covariates), 0, 0, 0)
    around = sample.x_0 - torch.tensor([1.5, 1.5, 2.5, 2.5] * 1000)[:, None]
    assert around.mean() == pytest.approx(0, abs=0.01)
    assert around.std() == pytest.approx(0.3, rel=0.02)


def test_sampling_starts_at_controls_of_the_same_covariates():
    model = fitted(build(source="control", source_noise=0.2, network=Still), steps=1)
    for line, level in (("alpha", 1.5), ("beta", 2.5)):
        with torch.no_grad():
            model.network.weight.zero_()
        cells = model.generate(condition(model, "G0", line, n=500))
        assert cells.mean() == pytest.approx(level, abs=0.02)
        assert cells.std() == pytest.approx(0.2, rel=0.05)
        assert len(cells.unique(dim=0)) == 500


def test_paths_of_dropped_conditions_start_at_controls_of_the_true_covariates():
    model = fitted(build(source="control", source_noise=0.0, network=Still, condition_dropout=0.9))
    batch = batch_of(["G1"] * 200, ["beta"] * 200, torch.full((200, G), 2.5))
    model.trainer = None
    model.network.seen.clear()
    model.training_step(batch, 0)
    x_t, _, conditions = model.network.seen[0]
    assert (conditions[:, -1] == 1).float().mean() > 0.8
    torch.testing.assert_close(x_t, torch.full((200, G), 2.5))


def test_the_control_a_cell_starts_at_does_not_depend_on_chunks_order_or_number():
    model = fitted(build(source="control"), steps=3)
    one, other = condition(model, "G0", "alpha", 70), condition(model, "G1", "beta", 40)
    whole = model.generate(joined(one, other))
    assert torch.equal(model.generate(joined(other, one)), torch.cat([whole[70:], whole[:70]]))
    assert torch.equal(model.generate(one[:33]), whole[:33])
    streamed = [cells for _, _, cells in model.stream(joined(one[:1], other[:1]), [70, 40])]
    assert torch.equal(torch.cat(streamed), whole)
    model.seed = 1
    assert not torch.equal(model.generate(one), whole[:70])


def test_covariates_without_controls_are_named():
    beta_alone = batch_of(["control", "G0", "G0"], ["beta", "beta", "alpha"], torch.rand(3, G) + 0.1)
    with pytest.raises(InputError, match="the training cells contain no control cells with line=alpha"):
        fitted(build(source="control"), beta_alone)
    model = fitted(build(source="control"), batch_of(["control", "G0"], ["beta", "beta"], torch.rand(2, G) + 0.1))
    stream = model.stream(joined(condition(model, "G0", "beta"), condition(model, "G0", "alpha")), [10**6, 1])
    with pytest.raises(InputError, match="the training cells contain no control cells with line=alpha"):
        next(stream)


def test_collection_goes_on_until_every_context_has_its_controls(monkeypatch):
    monkeypatch.setattr(PRiMeFlow, "STATISTICS_CELLS", 1)
    early = batch_of(["G0", "control"], ["alpha", "beta"], torch.rand(2, G) + 0.1)
    model = fitted(build(source="control", source_cells=1), early, screen_of())
    assert set(model.controls.cells[:, 0].tolist()) == {1.5, float(early.gene_expression[1, 0])}


def test_an_untrained_model_has_no_controls():
    model = build(source="control")
    with pytest.raises(InputError, match="that training keeps: train with this setting first"):
        model.generate(condition(model, "G0", "alpha"))


def test_counterfactual_cells_of_a_still_flow_are_noised_control_cells_of_their_context():
    """Without velocity both transports are the identity: only ``t x + (1 - t) noise`` remains."""
    model = fitted(build(network=Still, control_start=0.9), screen_of())
    for line, value in (("alpha", 1.5), ("beta", 2.5)):
        cells = model.generate(condition(model, "G0", line).expand(4000))
        assert float(cells.mean()) == pytest.approx(0.9 * value, abs=0.01)
        assert float(cells.std()) == pytest.approx(0.1, abs=0.01)
    # A condition that training lacks has the control cells of its context, too.
    assert float(model.generate(condition(model, "G1", "alpha").expand(400)).mean()) == pytest.approx(1.35, abs=0.05)


def test_one_start_at_control_cells_excludes_the_other():
    with pytest.raises(InputError, match="control_start encodes control cells for a Gaussian source"):
        build(source="control", control_start=0.5)


# --- coupling


def total_cost(sample):
    return float((sample.x_0 - sample.x_1).square().sum())


@pytest.mark.parametrize("source", ["gaussian", "control"])
def test_optimal_transport_permutes_sources_and_keeps_cells_with_their_conditions(source):
    pytest.importorskip("ot")
    models = [fitted(build(source=source, coupling=coupling)) for coupling in ("independent", "ot")]
    batch = screen_of(n=8, seed=1)
    vectors = models[0].encoder(batch.perturbations, batch.covariates)
    plain, moved = (model._sample(batch.gene_expression, vectors, 0, 0, 0)[0] for model in models)
    assert torch.equal(moved.x_1, batch.gene_expression)
    assert torch.equal(moved.t, plain.t)
    assert total_cost(moved) < total_cost(plain)
    found = (moved.x_0[:, None] == plain.x_0).all(2)
    assert (found.sum(0) == 1).all()
    assert (found.sum(1) == 1).all()
    assert not torch.equal(moved.x_0, plain.x_0)
    if source == "control":
        lines = batch.covariates["line"].argmax(1)
        assert torch.equal(lines[found.int().argmax(1)], lines)
        assert torch.equal((moved.x_0.mean(1) > 2).long(), lines)


def test_optimal_transport_without_its_library_is_an_error_before_training(monkeypatch):
    monkeypatch.setattr("primeflow_perturbench.flow.coupling.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'primeflow-perturbench\[ot\]'"):
        fitted(build(coupling="ot"))
    assert fitted(build()).controls is None


# --- space


def test_a_flow_of_components_generates_genes():
    model = fitted(build(space=partial(PCASpace, n_components=3), network=Still), screen_of(), screen_of(seed=1))
    batch = screen_of(seed=1)
    assert model.network.n_genes == 3
    sample, _ = model._sample(batch.gene_expression, model.encoder(batch.perturbations, batch.covariates), 0, 0, 0)
    assert torch.equal(sample.x_1, model.space.encode(batch.gene_expression))
    assert sample.x_0.std() == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        model.network.weight.zero_()
    # Noise in the components: around the mean of the cells, and only in the span of the components.
    cells = model.generate(condition(model, "G0", "alpha", n=2000))
    assert cells.shape == (2000, G)
    raw = model.space.decode(torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))).clamp(min=0)
    torch.testing.assert_close(cells.mean(0), raw.mean(0), rtol=0, atol=0.15)


def test_preconditioning_uses_the_moments_of_the_cells_in_their_space():
    batch = screen_of()
    for space in (GeneSpace, partial(PCASpace, n_components=3)):
        expression = batch.gene_expression.clone()
        expression[:60, 0] = 0
        model = fitted(build(space=space, precondition=True), batch._replace(gene_expression=expression))
        z = model.space.encode(expression).numpy()
        np.testing.assert_allclose(model.network.mean, z.mean(0), atol=1e-4)
        np.testing.assert_allclose(model.network.std, np.maximum(z.std(0), 0.02), rtol=1e-3)


def test_the_space_is_fitted_to_fit_cells_cells_only():
    first, second = screen_of(n=10), screen_of(n=10, seed=1)
    part = fitted(build(space=partial(PCASpace, n_components=2, fit_cells=40)), first, second)
    alone = fitted(build(space=partial(PCASpace, n_components=2)), first)
    whole = fitted(build(space=partial(PCASpace, n_components=2)), first, second)
    assert torch.equal(part.space.components, alone.space.components)
    assert not torch.equal(part.space.components, whole.space.components)


def test_initial_gene_vectors_are_an_error_for_components():
    network = partial(UNet, channels=8, multipliers=(1,), genes=partial(GenePatches, patch=2, initial_vectors="x"))
    build(network=network)
    with pytest.raises(InputError, match=r"initial_vectors describes genes, but with model/space=pca"):
        build(network=network, space=partial(PCASpace, n_components=4))


# --- checkpoints and resuming

CONTROL = ("model.objective.source=control", "model.objective.source_cells=20")
PCA = ("model/space=pca", "model.space.n_components=8", "model.objective.precondition=true")


def composed(folder, *overrides):
    settings = [
        "data=h5ad",
        "data/splitter=saved",
        f"data.data.filename={SCREEN / 'screen.h5ad'}",
        f"data.splitter.split_path={SCREEN / 'split.csv'}",
        "data.splitter.save=false",
        "data.loader.batch_size=250",
        "data.loader.num_workers=0",
        "model=primeflow_mlp",
        "model.network.width=16",
        "model.network.depth=1",
        "model.network.embedding_width=8",
        "model.sampler.solver.steps=4",
        "trainer.max_steps=8",
        "trainer.val_check_interval=4",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "+trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=1",
        "callbacks.model_checkpoint.every_n_train_steps=3",
        "callbacks.model_checkpoint.save_top_k=-1",
        f"paths.output_dir={folder}",
        "~logger",
        "~callbacks.lr_monitor",
        "~callbacks.progress_bar",
        "test=false",
        *overrides,
    ]
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return hydra.compose("train", overrides=settings)


def trained(folder, *overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(deepcopy(composed(folder, *overrides)))


def tensors(state, where=""):
    """All tensors of a nested dictionary by their place."""
    if isinstance(state, dict):
        return dict(chain.from_iterable(tensors(value, f"{where}.{key}").items() for key, value in state.items()))
    return {where: state} if isinstance(state, torch.Tensor) else {}


@pytest.mark.parametrize("settings", [CONTROL, PCA], ids=["control", "pca"])
def test_a_resumed_run_equals_an_uninterrupted_one_and_its_checkpoint_generates_the_same_cells(tmp_path, settings):
    whole = trained(tmp_path / "whole", *settings)
    trained(tmp_path / "part", *settings, f"ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'step3.ckpt'}")
    paths = [tmp_path / name / "checkpoints" / "step8.ckpt" for name in ("whole", "part")]
    names = ("state_dict", "current_model_state", "optimizer_states", "primeflow")
    one, other = (tensors({name: torch.load(path, weights_only=False)[name] for name in names}) for path in paths)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [name for name in one if ".controls." in name or ".space." in name]
    assert len(kept) >= 1
    first, second = (PRiMeFlow.load_from_checkpoint(path, evaluation=None, weights_only=False) for path in paths)
    batch = next(iter(whole["datamodule"].val_dataloader()))
    cells = first.predict(batch)
    assert cells.shape == batch.gene_expression.shape
    assert (cells > 0).any()
    assert torch.equal(cells, second.predict(batch))
    whole["model"].load_state_dict(first.state_dict())
    assert torch.equal(whole["model"].eval().predict(batch), cells)


def test_finetuning_keeps_the_space_of_the_weights(tmp_path):
    first = trained(tmp_path / "first", *PCA, "model.space.fit_cells=200")["model"].space
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    later = trained(tmp_path / "later", *PCA, f"ckpt_path={checkpoint}", "finetune=true")["model"].space
    assert torch.equal(later.components, first.components)
    assert torch.equal(later.mean, first.mean)


@pytest.mark.parametrize("gene_embedding", [True, False])
def test_the_embedding_of_genes_is_a_setting_of_the_u_net(gene_embedding):
    given = ["data=h5ad", "model=primeflow", f"model.network.genes.gene_embedding={str(gene_embedding).lower()}"]
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        config = hydra.compose("train", overrides=given)
    network = hydra.utils.instantiate(config.model.network)(20, 5)
    assert network.genes.embedding.shape == (64, 20 if gene_embedding else 1)
