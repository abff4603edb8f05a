"""Settings of the model that say how it is sampled and compiled."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.compiling import CompiledEvaluation
from primeflow_perturbench.networks.mlp import MLP

GENES, PERTURBATIONS = ["g0", "g1", "g2"], ["p0", "p1"]


def build(**settings):
    """A small model whose parameters are the same each time and not silent."""
    given = {
        "n_genes": len(GENES),
        "n_perts": len(PERTURBATIONS),
        "transform": None,
        "context": {"perturbation_uniques": PERTURBATIONS, "covariate_uniques": {}},
        "evaluation": None,
        "network": partial(MLP, width=8, depth=1, embedding_width=4),
        "solver": ODESolver("midpoint", steps=4),
        "detection_limit": None,
    }
    return PRiMeFlow(**{**given, **settings})


def cells(**settings):
    model = build(**settings)
    return model.generate(torch.eye(model.encoder.width)[[0] * 5])


def test_the_interval_of_guidance_reaches_the_solver():
    plain, guided = cells(), cells(guidance=4.0)
    assert not torch.equal(plain, guided)
    assert torch.equal(cells(guidance=4.0, guidance_interval=[0.0, 1.0]), guided)
    assert torch.equal(cells(guidance=4.0, guidance_interval=[0.5, 0.5]), plain)
    half = cells(guidance=4.0, guidance_interval=[0.0, 0.5])
    assert not torch.equal(half, plain)
    assert not torch.equal(half, guided)


def test_what_is_no_interval_is_refused():
    with pytest.raises(InputError, match=r"guidance_interval must be \[lo, hi\] with 0 <= lo <= hi <= 1, got \[0.8, 0"):
        build(guidance_interval=[0.8, 0.2])


@pytest.mark.parametrize("size", [0, "all"])
def test_what_is_no_batch_size_is_refused(size):
    with pytest.raises(InputError, match="sample_batch_size must be at least 1, or 'auto', got"):
        build(sample_batch_size=size)


def test_a_batch_size_is_kept_from_one_call_to_the_next():
    """What a call has learnt of the device's memory, the next one knows."""
    model = build(sample_batch_size=320)
    assert model._cell_generator().batch_size.tiles == 10
    model._cell_generator().batch_size.halve(10)
    assert model._cell_generator().batch_size.tiles == 5


def test_compiling_changes_neither_cells_nor_the_names_of_parameters(monkeypatch):
    calls = []

    def compile_(function):
        def compiled(*arguments):
            calls.append(arguments)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    assert torch.equal(cells(), cells(compile=True))
    assert len(calls) == 8
    assert build().state_dict().keys() == build(compile=True).state_dict().keys()


def test_a_network_that_cannot_be_compiled_gives_the_same_cells(monkeypatch, caplog):
    def fails(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    assert torch.equal(cells(), cells(compile=True))
    assert sum("The network is not compiled" in message for message in caplog.messages) == 1


def test_training_is_compiled_too():
    model, seen = build(compile=True), []

    class Watched(CompiledEvaluation):
        def __call__(self, network, x, t, condition):
            seen.append(network)
            return network(x, t, condition)

    model._evaluation = Watched()
    batch = SimpleNamespace(gene_expression=torch.rand(4, len(GENES)), perturbations=torch.rand(4, 2), covariates=None)
    model.training_step(batch, 0)
    assert seen == [model.network]
