"""How the sampling settings of a model act."""

from functools import partial
from types import SimpleNamespace

import torch
from builders import build_model

from primeflow_perturbench.networks.mlp import MLP

GENES, PERTURBATIONS = ["g0", "g1", "g2"], ["p0", "p1"]


def build(**settings):
    """A small model with the same parameters each time and a velocity that is not zero."""
    context = {"perturbation_uniques": PERTURBATIONS, "covariate_uniques": {}}
    return build_model(GENES, context, network=partial(MLP, width=8, depth=1, embedding_width=4), **settings)


def cells(**settings):
    model = build(**settings)
    return model.generate(model.encoder(torch.eye(2)[[0] * 5], None))


def test_the_batch_size_learned_by_one_call_is_kept_for_the_next(monkeypatch):
    seen = []
    model = build(sample_batch_size=320)

    def stream(self, *_):
        seen.append(self.batch_size.tiles)
        yield 0, 0, torch.zeros(1, len(GENES))

    monkeypatch.setattr("primeflow_perturbench.sampling.sampler.Sampler.stream", stream)
    condition = model.encoder(torch.eye(2)[[0]], None)
    model.generate(condition)
    model._batch_size.halve(10)
    model.generate(condition)
    assert seen == [10, 5]


def test_compiling_changes_neither_cells_nor_parameter_names(monkeypatch):
    calls = []

    def compile_(function):
        def compiled(*arguments):
            calls.append(arguments)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    assert torch.equal(cells(), cells(compile=True))
    assert len(calls) == 6
    assert build().state_dict().keys() == build(compile=True).state_dict().keys()


def test_training_is_compiled_as_well():
    model, seen = build(compile=True), []

    def evaluate(network, x, t, condition):
        seen.append(network)
        return network(x, t, condition)

    model._evaluation = evaluate
    batch = SimpleNamespace(gene_expression=torch.rand(4, len(GENES)), perturbations=torch.rand(4, 2), covariates=None)
    model.training_step(batch, 0)
    assert seen == [model.network]
