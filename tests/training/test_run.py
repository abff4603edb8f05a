import hashlib

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.training import run
from primeflow_perturbench.training.run import costs, describe_run, train_run


def composed(screen_path, *overrides, with_hydra=True):
    """Settings of a run; ``with_hydra`` sets up Hydra as its command does."""
    given = [f"data.data.filename={screen_path}", "run_name=x", "paths.output_dir=x", *overrides]
    with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        if with_hydra:
            HydraConfig.instance().set_config(compose("train", [*given], return_hydra_config=True))
        return compose("train", given)


@pytest.fixture
def _no_hydra_left():
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.usefixtures("_no_hydra_left")
def test_a_run_records_its_label_seed_data_metrics_and_network_evaluations(screen_path):
    overrides = [
        "model=primeflow_fast",
        "seed=7",
        "model.sampler.solver.method=midpoint",
        "model.sampler.solver.steps=5",
    ]
    record = describe_run(composed(screen_path, *overrides, "model.sampler.guidance=2"), (2820, 128))
    assert (record["label"], record["seed"], record["evaluations"]) == ("primeflow_fast", 7, 20)
    digest = hashlib.sha256(screen_path.read_bytes()).hexdigest()
    assert record["data"] == {"file": "screen.h5ad", "sha256": digest, "cells": 2820, "genes": 128}
    other = describe_run(composed(screen_path, "model=decoder_only"), (2820, 128))
    assert (other["label"], other["evaluations"]) == ("decoder_only", None)
    assert other["metrics"] == record["metrics"]
    ranks = composed(screen_path, "data.evaluation.evaluation_pipelines=[{aggregation: none, metric: mmd}]")
    assert describe_run(ranks, (2820, 128))["metrics"]["pipelines"] != record["metrics"]["pipelines"]


@pytest.mark.usefixtures("_no_hydra_left")
def test_the_label_names_a_run_and_else_the_choice_of_the_model_group(screen_path):
    assert describe_run(composed(screen_path, "label=mine"), (2820, 128))["label"] == "mine"
    HydraConfig.instance().cfg = None
    assert describe_run(composed(screen_path, with_hydra=False), (2820, 128))["label"] == "PRiMeFlow"


def test_costs_report_seconds_steps_and_memory_also_of_a_gpu():
    record = {"steps": 20_000, "seconds": 1234.5, "peak_memory": {"host_gib": 1.25}}
    assert costs(record) == "The run took 1,234 s (20,000 steps) and at most 1.2 GiB of memory."
    record["peak_memory"]["device_gib"] = 30.06
    assert costs(record).endswith("at most 1.2 GiB of memory and 30.1 GiB on the GPU.")


@pytest.mark.parametrize(("overrides", "expected"), [(["threads=3"], 3), (["experiment=quickstart"], 1), ([], 2)])
def test_a_run_uses_the_threads_of_its_settings_and_leaves_those_of_its_caller(
    screen_path, tmp_path, monkeypatch, overrides, expected
):
    monkeypatch.setattr(run, "new_run", lambda *_: torch.get_num_threads())
    torch.set_num_threads(2)
    try:
        cfg = composed(screen_path, *overrides, f"paths.output_dir={tmp_path}", with_hydra=False)
        assert train_run(cfg, None) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_run_without_threads_is_refused(screen_path):
    with pytest.raises(InputError, match="threads=0: expected 1 or more"):
        train_run(composed(screen_path, "threads=0", with_hydra=False), None)
