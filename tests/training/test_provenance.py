"""The record of a run decides which runs may stand in one table with it."""

import hashlib

import pytest

from primeflow_perturbench.flow.solver import FIXED_STEP_SOLVERS, ODESolver
from primeflow_perturbench.training.provenance import (
    data_record,
    metrics_record,
    network_evaluations,
    split_record,
)


def test_the_hash_of_the_data_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "cells.h5ad").write_bytes(content)
    record = data_record(tmp_path / "cells.h5ad", 7, 3)
    assert record == {
        "file": "cells.h5ad",
        "sha256": hashlib.sha256(content).hexdigest(),
        "cells": 7,
        "genes": 3,
    }


def write_split(tmp_path, lines):
    path = tmp_path / "split.csv"
    path.write_text("\n".join(lines) + "\n")
    return split_record(path)


SPLIT = ["c1,train", "c2,test", "c3,val", "c4,train"]


def test_a_split_is_its_cells_whatever_their_order(tmp_path):
    record = write_split(tmp_path, SPLIT)
    assert (record["train"], record["val"], record["test"]) == (2, 1, 1)
    assert record["sha256"] == hashlib.sha256("\n".join(sorted(SPLIT)).encode()).hexdigest()
    assert record["heldout"] == hashlib.sha256(b"c2,test").hexdigest()
    assert write_split(tmp_path, SPLIT[::-1]) == record
    assert write_split(tmp_path, [*SPLIT, "c5,"]) == record


def test_another_training_cell_changes_the_split_but_not_the_held_out_cells(tmp_path):
    record = write_split(tmp_path, SPLIT)
    fewer = write_split(tmp_path, SPLIT[:3])
    assert fewer["sha256"] != record["sha256"]
    assert fewer["heldout"] == record["heldout"]
    assert write_split(tmp_path, [*SPLIT, "c5,test"])["heldout"] != record["heldout"]


def test_the_metrics_are_the_pipelines_whatever_the_order_of_their_keys():
    pipelines = [{"aggregation": "none", "metric": "mmd", "rank": True}]
    record = metrics_record(pipelines)
    assert metrics_record([{"rank": True, "metric": "mmd", "aggregation": "none"}]) == record
    assert metrics_record([{**pipelines[0], "rank": False}])["pipelines"] != record["pipelines"]


def count_evaluations(solver, guided):
    """Rows of a network per cell, by calling the solver."""
    import torch

    calls = []

    def velocity(x, t):
        calls.append(2 if guided else 1)
        return x

    solver.integrate(velocity, torch.zeros(1, 1))
    return sum(calls)


@pytest.mark.parametrize("method", list(FIXED_STEP_SOLVERS))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_are_those_that_the_solver_makes(method, guidance):
    settings = {"solver": {"_target_": "x", "method": method, "steps": 5}, "guidance": guidance}
    assert network_evaluations({"sampler": settings}) == count_evaluations(ODESolver(method, 5), guidance != 1)


def test_counterfactual_sampling_adds_an_unguided_integration():
    settings = {"solver": {"method": "midpoint", "steps": 5}, "control_start": 0.5}
    assert network_evaluations({"sampler": settings}) == 20
    assert network_evaluations({"sampler": settings | {"guidance": 2}}) == 30


def test_evaluations_are_unknown_without_a_solver_of_fixed_steps():
    assert network_evaluations({"hidden": 3}) is None
    assert network_evaluations({"sampler": {"solver": {"method": "dopri5"}}}) is None
