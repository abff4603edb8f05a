"""Finished runs are not repeated, and runs that differ in sampling alone share a training."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from builders import compose_config
from filelock import FileLock
from omegaconf import OmegaConf
from rich.console import Console

from primeflow_perturbench.files import write_json
from primeflow_perturbench.training import reuse
from primeflow_perturbench.training.reuse import (
    is_finished,
    run_digest,
    shares_training,
    training_digest,
    with_shared_training,
)
from primeflow_perturbench.training.run import train_run

GUIDED = "model.sampler.guidance=2"
SMALL = [
    "model=primeflow_small",
    "model.network.width=4",
    "model.network.depth=1",
    "model.sampler.solver.steps=1",
    "model.sampler.cells_per_condition=4",
    "model.sampler.calibration_cells=8",
    "data/splitter=transfer",
    "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: false}]",
    "references=[control]",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.accelerator=cpu",
    "check=false",
]


def settings(folder: Path, *overrides: str, filename: object = "cells.h5ad"):
    given = [f"data.data.filename={filename}", "run_name=x", f"paths.output_dir={folder}", *overrides]
    return compose_config(given)


def test_settings_of_sampling_and_scoring_do_not_change_the_digest_of_a_training(tmp_path):
    plain = settings(tmp_path)
    for override in (GUIDED, "data.evaluation.chunk_size=3", "references=[]"):
        other = settings(tmp_path, override)
        assert training_digest(other) == training_digest(plain)
        assert run_digest(other) != run_digest(plain)
    for override in ("model.lr=0.5", "seed=1", "trainer.max_steps=7", "data/splitter=combine"):
        assert training_digest(settings(tmp_path, override)) != training_digest(plain)


def test_names_and_folders_do_not_change_the_digest_of_a_run(tmp_path):
    assert run_digest(settings(tmp_path / "a")) == run_digest(settings(tmp_path / "b", "~callbacks.progress_bar"))
    assert run_digest(settings(tmp_path, "model.lr=1")) == run_digest(settings(tmp_path, "model.lr=1.0"))


def test_a_run_shares_its_training_only_if_it_trains_and_tests_in_one_process(tmp_path, monkeypatch):
    shared = f"paths.trainings_dir={tmp_path}"
    assert shares_training(settings(tmp_path, shared))
    assert not shares_training(settings(tmp_path))
    assert not shares_training(settings(tmp_path, shared, "test=false"))
    assert not shares_training(settings(tmp_path, shared, "ckpt_path=x.ckpt"))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert not shares_training(settings(tmp_path, shared))


@pytest.mark.slow
def test_two_runs_that_differ_in_guidance_train_once_and_finish_once(tmp_path, screen_path, monkeypatch):
    shared = f"paths.trainings_dir={tmp_path / 'trainings'}"
    plain = settings(tmp_path / "plain", *SMALL, shared, "model.sampler.calibrate=none", filename=screen_path)
    guided = settings(tmp_path / "guided", *SMALL, shared, GUIDED, filename=screen_path)
    console = Console(quiet=True)
    first = train_run(plain, console)
    train_run(guided, console)
    (training,) = (tmp_path / "trainings").iterdir()
    assert (training / "checkpoints" / "last.ckpt").is_file()
    record = reuse._read_record(tmp_path / "guided")
    assert record["steps"] == 2
    assert record["seconds"] > reuse._read_record(training)["seconds"]
    assert not (tmp_path / "guided" / "checkpoints").exists()

    def trained_again(*args, **kwargs):
        raise AssertionError("trains again")

    monkeypatch.setattr("primeflow_perturbench.training.run.train", trained_again)
    again = train_run(plain, console)
    assert again.iloc[0, 0] == pytest.approx(first.iloc[0, 0])
    (tmp_path / "plain" / "table.csv").unlink()
    for unfinished in (plain, OmegaConf.merge(guided, {"model": {"sampler": {"guidance": 5}}})):
        with pytest.raises(AssertionError, match="trains again"):
            train_run(unfinished, console)


def train_slowly(cfg) -> None:
    """Stands in for a training: takes a moment, then leaves the record of a finished run."""
    folder = Path(cfg.paths.output_dir)
    with (folder / "begun.txt").open("a") as begun:
        begun.write("x")
    time.sleep(0.3)
    (folder / "last.ckpt").touch()
    record = {"settings": run_digest(cfg), "backend": reuse.backend(), "checkpoint": "last.ckpt"}
    write_json(folder / "environment.json", record)


def hold_lock_and_die(folder: Path) -> None:
    FileLock(folder / ".lock").acquire()
    os._exit(1)


def test_runs_that_need_one_training_at_the_same_time_wait_for_it(tmp_path):
    cfg = settings(tmp_path / "run", f"paths.trainings_dir={tmp_path}")
    folder = tmp_path / training_digest(cfg)
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    crashed = context.Process(target=hold_lock_and_die, args=(folder,))
    crashed.start()
    crashed.join()
    processes = [context.Process(target=with_shared_training, args=(cfg, train_slowly)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (folder / "begun.txt").read_text() == "x"
    assert with_shared_training(cfg, pytest.fail).ckpt_path == str(folder / "last.ckpt")


def test_a_training_whose_checkpoint_was_removed_is_not_finished(tmp_path):
    cfg = settings(tmp_path, "test=false")
    train_slowly(cfg)
    assert is_finished(cfg)
    (tmp_path / "last.ckpt").unlink()
    assert not is_finished(cfg)
