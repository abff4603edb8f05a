"""Genes that some files lack: they count neither in the loss nor in what is learned, and training resumes exactly."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from builders import compose_config
from omegaconf import DictConfig

from primeflow_perturbench.data.atlas.cells import open_atlas
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.detection_limit import learn_detection_limit
from primeflow_perturbench.expression.statistics import ExpressionStatistics
from primeflow_perturbench.expression.unmeasured import fill_unmeasured
from primeflow_perturbench.flow.loss import flow_matching_loss
from primeflow_perturbench.flow.noise import batch_noise
from primeflow_perturbench.flow.path import PathSample
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.simulation.atlas import simulate_atlas
from primeflow_perturbench.training import resolvers

STEPS = 20
SETTINGS = [
    "experiment=atlas/small",
    "data.loader.batch_size=50",
    "data.block_size=8",
    "data.fetch_factor=4",
    "data.val_fraction=0.1",
    "model/network=mlp",
    "model.network.width=16",
    "model.network.depth=1",
    "model.network.embedding_width=8",
    "model.lr_scheduler.conf.warmup_steps=5",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=7",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "~logger",
    "callbacks.ema.decay=0.8",
    "callbacks.model_checkpoint.every_n_train_steps=3",
    "callbacks.model_checkpoint.save_top_k=-1",
    "~callbacks.lr_monitor",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
]


class Kill(L.Callback):
    """Ends the process half-way through a step, with a signal that lets no handler tidy up."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Three files, 700 cells, genes that some of them lack: 13 batches an epoch."""
    folder = tmp_path_factory.mktemp("atlas")
    return simulate_atlas(folder, n_files=3, cells=700, n_genes=60, n_perturbations=4, n_pairs=0).manifest


@cache
def composed(*overrides: str) -> DictConfig:
    resolvers.register()
    return compose_config([*SETTINGS, *overrides])


def run(manifest: Path, folder: Path, *overrides: str, ckpt_path: Path | None = None, num_workers: int = 0) -> dict:
    """Train in a folder."""
    cfg = deepcopy(composed(*overrides))
    cfg.data.data.filename, cfg.data.data.cache_dir = str(manifest), str(manifest.parent / "unpacked")
    cfg.paths.output_dir, cfg.ckpt_path = str(folder), ckpt_path and str(ckpt_path)
    cfg.data.loader.num_workers = num_workers
    return train(cfg)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked_sample(dx_t):
    x = random(*dx_t.shape, seed=1)
    return PathSample(x_0=x, x_1=x, x_t=random(*dx_t.shape, seed=2), dx_t=dx_t, t=torch.linspace(0, 1, len(dx_t)))


def loss_and_gradient(dx_t, measured):
    weight = random(4, 4, seed=3).requires_grad_()
    velocities = []

    def network(x, t, condition):
        velocities.append(x @ weight)
        velocities[-1].retain_grad()
        return velocities[-1]

    loss = flow_matching_loss(network, masked_sample(dx_t), torch.zeros(6, 2), measured)
    loss.backward()
    return loss.detach(), weight.grad, velocities[0]


def test_the_masked_loss_is_the_mean_over_what_was_measured():
    dx_t, measured = random(6, 4), random(6, 4, seed=5) > -0.3
    measured[:, 2] = False
    loss, _, velocity = loss_and_gradient(dx_t, measured)
    residuals = (velocity.detach() - dx_t).numpy()[measured.numpy()]
    assert float(loss) == pytest.approx(float((residuals**2).mean()), rel=1e-6)
    assert float(loss) != pytest.approx(float(((velocity.detach() - dx_t) ** 2).mean()), rel=1e-3)


@pytest.mark.parametrize("there", [1e6, torch.nan, torch.inf])
def test_what_stands_where_nothing_was_measured_changes_neither_loss_nor_gradient(there):
    dx_t, measured = random(6, 4), random(6, 4, seed=5) > -0.3
    loss, gradient, _ = loss_and_gradient(dx_t, measured)
    other_loss, other_gradient, velocity = loss_and_gradient(dx_t.masked_fill(~measured, there), measured)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient, other_gradient)
    assert (velocity.grad[~measured] == 0).all()
    assert (velocity.grad[measured] != 0).all()


def test_with_everything_measured_the_loss_is_the_plain_one_and_with_nothing_it_is_zero():
    dx_t = random(6, 4)
    everything, nothing = torch.ones(6, 4, dtype=torch.bool), torch.zeros(6, 4, dtype=torch.bool)
    plain, gradient, _ = loss_and_gradient(dx_t, None)
    masked, masked_gradient, _ = loss_and_gradient(dx_t, everything)
    torch.testing.assert_close(masked, plain)
    torch.testing.assert_close(masked_gradient, gradient)
    loss, gradient, _ = loss_and_gradient(dx_t, nothing)
    assert loss == 0
    assert (gradient == 0).all()


def test_statistics_take_means_and_deviations_over_the_cells_that_have_a_gene():
    values = random(50, 5).abs().double()
    values[:20, 1], values[30:, 2], values[:, 3] = torch.nan, torch.nan, torch.nan
    statistics, parts = (
        ExpressionStatistics(unmeasured_are_nan=True),
        [ExpressionStatistics(unmeasured_are_nan=True) for _ in "ab"],
    )
    statistics.add(values)
    for part, rows in zip(parts, values.split([7, 43]), strict=True):
        part.add(rows)
    seen = values[:, [0, 1, 2, 4]].numpy()
    for found in (statistics, ExpressionStatistics.merge(parts)):
        np.testing.assert_allclose(found.mean[[0, 1, 2, 4]], np.nanmean(seen, 0))
        np.testing.assert_allclose(found.std[[0, 1, 2, 4]], np.nanstd(seen, 0), rtol=1e-6)
        assert (found.mean[3], found.std[3], found.not_finite, found.cells) == (0, 0, 0, 50)
        assert found.histogram.sum() == np.isfinite(seen).sum()
    limit = 0.5 * np.quantile(seen[np.isfinite(seen)], 0.1)
    assert learn_detection_limit(statistics) == pytest.approx(limit, abs=0.01)
    values[0, 0] = torch.inf
    statistics.add(values)
    assert statistics.not_finite == 1
    strict = ExpressionStatistics()
    strict.add(values)
    assert strict.not_finite == 1 + int(values.isnan().sum())


def test_gaps_are_filled_with_the_means_of_genes():
    filled, measured = fill_unmeasured(torch.tensor([[1.0, torch.nan], [torch.nan, 0.0]]), torch.tensor([5.0, 7.0]))
    assert filled.tolist() == [[1.0, 7.0], [5.0, 0.0]]
    assert measured.tolist() == [[True, False], [False, True]]


@pytest.fixture(scope="module")
def unbroken(manifest, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and objects of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(manifest, folder)


def test_what_is_learned_without_gradients_is_of_measured_values(manifest, unbroken):
    model, module = unbroken[1]["model"], unbroken[1]["datamodule"]
    torch.manual_seed(0)
    drawn = [name for batch in module.train_dataloader() for name in batch.id]
    cells = open_atlas(manifest).expression(module.obs_df.index.get_indexer(drawn)).astype(float)
    assert np.isnan(cells).any()
    np.testing.assert_allclose(model.gene_means, np.nanmean(cells, 0), rtol=1e-5)
    np.testing.assert_allclose(model.network.mean, np.nanmean(cells, 0), rtol=1e-5)
    np.testing.assert_allclose(model.network.std, np.nanstd(cells, 0).clip(0.02), rtol=1e-4)
    limit = 0.5 * np.quantile(cells[cells > 0], 0.1)
    assert model.learned_detection_limit == pytest.approx(limit, abs=0.005)


def test_a_step_leaves_out_what_was_not_measured(unbroken, monkeypatch):
    """The loss of a batch, against a rewrite with the means put in by hand."""
    model, module = unbroken[1]["model"], unbroken[1]["datamodule"]
    batch = next(iter(module.train_dataloader()))
    logged = []
    monkeypatch.setattr(model, "log", lambda *a, **k: logged.append(k["batch_size"]))
    with torch.no_grad():
        found = model.validation_step(batch, 0)
        x_1 = torch.where(batch.gene_expression.isnan(), model.gene_means, batch.gene_expression)
        condition = model.conditions(model.encoder(batch.perturbations, batch.covariates))
        noise = batch_noise(x_1, [model.seed, 1, 0, 0])
        x_t = (1 - noise.t[:, None]) * noise.x_0 + noise.t[:, None] * x_1
        errors = (model.velocity(x_t, noise.t, condition) - (x_1 - noise.x_0)).square()
    measured = ~batch.gene_expression.isnan()
    assert float(found) == pytest.approx(float(errors[measured].mean()), rel=1e-5)
    assert float(found) != pytest.approx(float(errors.mean()), rel=1e-4)
    assert logged == [int(measured.sum())]


def test_a_device_counts_for_the_values_that_it_measured(unbroken, monkeypatch):
    model, module = unbroken[1]["model"], unbroken[1]["datamodule"]
    batch = next(iter(module.train_dataloader()))
    counted = []
    monkeypatch.setattr(model, "log", lambda *a, **k: None)
    monkeypatch.setattr(model, "_share", lambda count: counted.append(int(count)) or 2.0)
    twice = model.training_step(batch, 0)
    monkeypatch.setattr(model, "_share", lambda count: 1.0)
    assert float(twice) == pytest.approx(2 * float(model.training_step(batch, 0)), rel=1e-6)
    assert counted == [int((~batch.gene_expression.isnan()).sum())]


def test_the_mean_over_devices_is_the_mean_over_all_measured_values(unbroken):
    """Two devices with different numbers of measured values; the strategy is a stand-in."""
    model = unbroken[1]["model"]
    errors = [random(40).square(), 3 * random(10, seed=1).square()]
    counts = [len(each) for each in errors]
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: torch.tensor(np.mean(counts)))
    trainer, model._trainer = model._trainer, SimpleNamespace(world_size=2, strategy=strategy)
    try:
        losses = [each.mean() * model._share(torch.tensor(len(each))) for each in errors]
    finally:
        model._trainer = trainer
    assert float(sum(losses) / 2) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.sampler.calibrate=marginals",
            "model.sampler.calibrate=marginals needs every gene .* model.sampler.calibrate=none",
        ),
        (
            "model.objective.source=control",
            "model.objective.source=control needs every gene .* model.objective.source=gaussian",
        ),
        (
            "model.objective.coupling=ot",
            "model.objective.coupling=ot needs every gene .* model.objective.coupling=independent",
        ),
        ("model/space=pca", "model/space=pca needs every gene .* model/space=genes"),
    ],
)
def test_settings_that_need_every_gene_are_refused(manifest, tmp_path, override, sentence):
    more = ["model.objective.precondition=false"] if "control" in override else []
    with pytest.raises(InputError, match=sentence):
        run(manifest, tmp_path, override, *more)


def test_the_same_settings_take_an_atlas_whose_files_have_all_genes(manifest, tmp_path):
    done = run(
        manifest, tmp_path, "model.sampler.calibrate=marginals", "data.data.genes=intersection", "trainer.max_steps=1"
    )
    assert done["trainer"].global_step == 1
    assert done["model"].gene_means is None


def differing(a: Path, b: Path) -> list[str]:
    """Names in the last checkpoints of two runs whose values are not equal to the bit."""
    first, second = (
        torch.load(folder / f"checkpoints/step{STEPS}.ckpt", map_location="cpu", weights_only=False)
        for folder in (a, b)
    )
    places = [] if torch.equal(first["gene_means"], second["gene_means"]) else ["gene_means"]
    for part in ("state_dict", "current_model_state"):
        assert len(first[part]) > 5
        places += [name for name, value in first[part].items() if not torch.equal(value, second[part][name])]
    return places


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 9, 18])
def test_a_resumed_run_equals_the_unbroken_one(manifest, unbroken, tmp_path, monkeypatch, step, num_workers):
    """From inside a fetch, from inside an epoch, and from the second epoch."""
    steps = []
    monkeypatch.setattr(PRiMeFlow, "on_train_batch_start", lambda self, *_: steps.append(self.global_step))
    run(manifest, tmp_path, ckpt_path=unbroken[0] / f"checkpoints/step{step}.ckpt", num_workers=num_workers)
    assert steps == list(range(step, STEPS))
    assert differing(unbroken[0], tmp_path) == []


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(manifest, unbroken, tmp_path):
    arguments = [sys.executable, __file__, str(manifest), str(tmp_path), "+callbacks.kill._target_=__main__.Kill"]
    killed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "checkpoints/step12.ckpt").exists()
    run(manifest, tmp_path, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert differing(unbroken[0], tmp_path) == []


def test_other_seeds_give_other_weights(manifest, unbroken, tmp_path):
    """The comparison above can see a difference."""
    run(manifest, tmp_path, "seed=1")
    assert len(differing(unbroken[0], tmp_path)) > 5


def test_a_model_without_training_has_no_gaps_to_fill(unbroken):
    path = unbroken[0] / f"checkpoints/step{STEPS}.ckpt"
    model = PRiMeFlow.load_from_checkpoint(path, evaluation=None, map_location="cpu", weights_only=False)
    assert torch.equal(model.gene_means, unbroken[1]["model"].gene_means)
    conditions = [{"condition": "control", "cell_type": "context0", "method": "CRISPRi", "dataset": "study0"}]
    cells = model.sample(conditions, n=5)
    assert cells.shape == (5, 60)
    assert np.isfinite(cells.X.toarray()).all()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
