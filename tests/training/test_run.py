import hashlib

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from primeflow_perturbench.training.run import costs, what_is_run


def composed(screen_path, *overrides, with_hydra=True):
    """A run's settings; Hydra itself is set up as under its command where asked for."""
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
def test_a_run_records_its_name_seed_data_metrics_and_cost(screen_path):
    overrides = ["model=primeflow_fast", "seed=7", "model.solver.method=midpoint", "model.solver.steps=5"]
    record = what_is_run(composed(screen_path, *overrides, "model.guidance=2"))
    assert (record["label"], record["seed"], record["evaluations"]) == ("primeflow_fast", 7, 20)
    digest = hashlib.sha256(screen_path.read_bytes()).hexdigest()
    assert record["data"] == {"file": "screen.h5ad", "sha256": digest, "cells": 2820, "genes": 128}
    other = what_is_run(composed(screen_path, "model=decoder_only", "data/evaluation=default"))
    assert (other["label"], other["evaluations"]) == ("decoder_only", None)
    assert other["metrics"] == record["metrics"]
    ranks = composed(screen_path, "data.evaluation.evaluation_pipelines=[{aggregation: none, metric: mmd}]")
    assert what_is_run(ranks)["metrics"]["pipelines"] != record["metrics"]["pipelines"]


@pytest.mark.usefixtures("_no_hydra_left")
def test_a_label_of_the_settings_goes_before_the_choice_of_the_model(screen_path):
    assert what_is_run(composed(screen_path, "+label=mine"))["label"] == "mine"
    HydraConfig.instance().cfg = None
    assert what_is_run(composed(screen_path, with_hydra=False))["label"] == "PRiMeFlow"


def test_the_costs_of_a_run_are_said_with_the_gpus_where_there_is_one():
    record = {"steps": 20_000, "seconds": 1234.5, "peak_memory": {"host_gib": 1.25}}
    assert costs(record) == "The run took 1,234 s (20,000 steps) and at most 1.2 GiB of memory."
    record["peak_memory"]["device_gib"] = 30.06
    assert costs(record).endswith("at most 1.2 GiB of memory and 30.1 GiB on the GPU.")
