"""Checkpoints are written whole or not at all, hold no code, and are read without executing any."""

import os
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from builders import compose_config
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from primeflow_perturbench import cli
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.perturbench.embedded.errors import DataError
from primeflow_perturbench.perturbench.embedded.modelcore import checkpoints
from primeflow_perturbench.perturbench.embedded.modelcore.checkpoints import CheckpointIO, load_checkpoint
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.training.run import alone_in, train_run

SCREEN = Path(__file__).parents[1] / "files" / "screen"
SETTINGS = [
    "data/splitter=saved",
    f"data.data.filename={SCREEN / 'screen.h5ad'}",
    f"data.splitter.split_path={SCREEN / 'split.csv'}",
    "data.splitter.save=false",
    "run_name=run",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "+trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
    "test=false",
]
SMALL = ["model=primeflow_small", "model.network.width=8", "model.network.depth=1"]
MODELS = {
    "primeflow": [*SMALL, "data=h5ad"],
    "linear": ["model=linear_additive", "data=h5ad_controls"],
    "latent": ["model=latent_additive", "data=h5ad_controls"],
    "decoder": ["model=decoder_only", "data=h5ad_controls"],
}


def config(folder: Path, *overrides: str) -> DictConfig:
    cfg = deepcopy(compose_config([*SETTINGS, *overrides]))
    cfg.paths.output_dir = str(folder)
    return cfg


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a short training of PRiMeFlow."""
    folder = tmp_path_factory.mktemp("run")
    train(config(folder, *MODELS["primeflow"]))
    return folder


# --- no code in checkpoints


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def with_attack(checkpoint: Path, path: Path, place: str) -> Path:
    """A copy of a checkpoint that creates ``path`` plus ``.ran`` where it is unpickled without limits."""
    content = inner = torch.load(checkpoint, weights_only=True)
    *outer, key = place.split(".", 1)
    for name in outer:
        inner = inner[name]
    inner[key] = Attack(path.with_suffix(".ran"))
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_hold_plain_values_and_tensors_only(name, tmp_path):
    model = train(config(tmp_path, *MODELS[name]))["model"]
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    loaded = type(model).load_from_checkpoint(last(tmp_path), weights_only=True)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key])


def test_a_checkpoint_restores_the_settings_of_the_model(run, tmp_path):
    overrides = ["model.sampler.guidance=1.5", "model.objective.condition_dropout=0.4", "model.sampler.solver.steps=3"]
    model = train(config(tmp_path, *MODELS["primeflow"], *overrides))["model"]
    loaded = PRiMeFlow.load_from_checkpoint(last(tmp_path))
    assert (loaded.sampler, loaded.objective, loaded.seed) == (model.sampler, model.objective, model.seed)
    assert loaded.sampler.guidance == 1.5
    assert loaded.objective.condition_dropout == 0.4
    assert str(loaded.network) == str(model.network)
    assert str(loaded.conditions) == str(model.conditions)
    assert loaded.training_record["train_context"] == model.training_record["train_context"]


@pytest.mark.parametrize(
    "place", ["attack", "hyper_parameters.network", "training_record.transform", "state_dict.network.x", "loops"]
)
def test_nothing_in_a_checkpoint_is_executed(run, tmp_path, place):
    path = with_attack(last(run), tmp_path / "evil.ckpt", place)
    with pytest.raises(DataError, match="could execute code; set trust_checkpoint=true"):
        load_checkpoint(path)
    assert not path.with_suffix(".ran").exists()
    load_checkpoint(path, trust=True)
    assert path.with_suffix(".ran").exists(), "the attack does nothing"


@pytest.mark.parametrize(
    "command",
    [
        "predict",
        "share",
        "train",
        "train train=false test=true data.splitter.save=true",
        "train finetune=true",
        "train model=linear_additive data=h5ad_controls",
    ],
)
def test_every_command_refuses_code_in_a_checkpoint(run, tmp_path, monkeypatch, capsys, command):
    path, (name, *rest) = with_attack(last(run), tmp_path / "evil.ckpt", "attack"), command.split()
    given = [f"ckpt_path={path}", f"hydra.run.dir={tmp_path / 'out'}"]
    arguments = {
        "predict": [*given, "prediction_dataframe_path=no.csv"],
        "share": [str(path), "--output", str(tmp_path / "out")],
        "train": [*SETTINGS, *MODELS["primeflow" if "data=h5ad_controls" not in rest else "linear"], *given],
    }[name]
    monkeypatch.setattr(sys, "argv", ["primeflow", name, *arguments, *rest])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "could execute code" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*.ran"))


def outside(n_coordinates: int, condition_width: int) -> nn.Module:
    """Builds a network that this package does not know."""
    from primeflow_perturbench.networks.mlp import MLP

    return MLP(n_coordinates, condition_width, width=8, depth=1, embedding_width=8)


def test_a_network_of_another_package_needs_trust(tmp_path):
    cfg = config(tmp_path, "model=primeflow_small", "data=h5ad")
    cfg.model.network = {"_target_": f"{__name__}.outside", "_partial_": True}
    train(cfg)
    with pytest.raises(DataError, match="trust_checkpoint"):
        load_checkpoint(last(tmp_path))
    assert load_checkpoint(last(tmp_path), trust=True)["global_step"] == 2


# --- finite weights


def test_weights_that_are_not_finite_are_neither_written_nor_read(run, tmp_path):
    for part in checkpoints.WEIGHTS:
        content = torch.load(last(run), weights_only=True)
        name = next(name for name, value in content[part].items() if value.is_floating_point())
        content[part][name].view(-1)[0] = float("nan")
        path = tmp_path / f"{part}.ckpt"
        path.write_bytes(b"before")
        with pytest.raises(DataError, match="NaN or infinite"):
            CheckpointIO().save_checkpoint(content, path)
        assert path.read_bytes() == b"before"
        torch.save(content, path)
        with pytest.raises(DataError, match="NaN or infinite"):
            load_checkpoint(path)


# --- whole files


def test_a_failed_write_keeps_the_checkpoint_before_it(run, tmp_path, monkeypatch):
    content, path = torch.load(last(run), weights_only=True), tmp_path / "last.ckpt"
    CheckpointIO().save_checkpoint(content, path)
    before = path.read_bytes()

    def half(content, file):
        Path(file).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(DataError, match="No space left"):
        CheckpointIO().save_checkpoint(content, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_written_beside_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    CheckpointIO().save_checkpoint(torch.load(last(run), weights_only=True), tmp_path / "last.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_a_cut_or_foreign_file_is_no_checkpoint(run, tmp_path, size):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(last(run).read_bytes()[:size])
    with pytest.raises(DataError, match="is not a checkpoint of a perturbation model, or is cut short"):
        load_checkpoint(path)


# --- going on


def test_a_training_with_other_groups_of_parameters_does_not_go_on(run, tmp_path):
    cfg = config(tmp_path, *MODELS["primeflow"], "finetuning.freeze=[genes]", f"ckpt_path={last(run)}")
    cfg.trainer.max_steps = 4
    with pytest.raises(DataError, match="other groups of parameters"):
        train(cfg)


def test_a_resumed_run_does_not_trust_the_path_in_its_checkpoint(run, tmp_path):
    """All steps are done, so the test loads what the checkpoint calls the best one."""
    content = torch.load(last(run), weights_only=True)
    evil = with_attack(last(run), tmp_path / "evil.ckpt", "attack")
    for state in content["callbacks"].values():
        state |= {"best_model_path": str(evil)} if "best_model_path" in state else {}
    torch.save(content, tmp_path / "plain.ckpt")
    cfg = config(tmp_path / "run", *MODELS["primeflow"], f"ckpt_path={tmp_path / 'plain.ckpt'}", "test=true")
    with pytest.raises(DataError, match="could execute code"):
        train(cfg)
    assert not evil.with_suffix(".ran").exists()


# --- the folder of a run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path) -> tuple[list[str], Path]:
    """Settings and folder of a run with all its files."""
    settings = [*SETTINGS, *MODELS["primeflow"], "data/splitter=transfer", "data.splitter.save=true"]
    settings = [item for item in settings if "split_path" not in item and item != "data/splitter=saved"]
    cfg = compose_config(settings)
    cfg.paths.output_dir = str(tmp_path / "run")
    train_run(cfg, Console(quiet=True))
    return settings, tmp_path / "run"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.splitter.splitter_seed=3"], "another split"),
        (["model.network.width=16"], "is not of the PRiMeFlow of these settings"),
        (["ckpt_path=no.ckpt"], "there is no checkpoint"),
        (["trainer.max_steps=1"], "has trained for 2 steps, more than trainer.max_steps=1"),
    ],
)
def test_a_refused_run_changes_nothing_in_its_folder(finished, overrides, message):
    settings, folder = finished
    before = content(folder)
    assert {"config.yaml", "environment.json", "train_test_split.csv"} <= {Path(name).name for name in before}
    cfg = compose_config([*settings, f"ckpt_path={last(folder)}", "trainer.max_steps=4", *overrides])
    cfg.paths.output_dir = str(folder)
    with pytest.raises(ValueError, match=message):
        train_run(cfg, Console(quiet=True))
    assert content(folder) == before


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(finished):
    settings, folder = finished
    before = content(folder)
    cfg = compose_config([*settings, "trainer.max_steps=3"])
    cfg.paths.output_dir = str(folder)
    with alone_in(folder), pytest.raises(InputError, match="another run is at work"):
        train_run(cfg, Console(quiet=True))
    assert content(folder) == before
    train_run(cfg, Console(quiet=True))
    assert load_checkpoint(last(folder))["global_step"] == 3
