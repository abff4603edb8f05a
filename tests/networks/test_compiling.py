import copy
import logging

import pytest
import torch
from torch import nn

from primeflow_perturbench.networks import compiling
from primeflow_perturbench.networks.compiling import CompiledEvaluation, evaluate
from primeflow_perturbench.networks.mlp import MLP

N_GENES, WIDTH = 5, 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MLP(N_GENES, WIDTH, width=8, depth=1, embedding_width=4)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(*shape, generator=generator) for shape in ((4, N_GENES), (4,), (4, WIDTH)))


def test_the_velocity_of_a_compiled_network_is_the_networks(monkeypatch, network, inputs):
    """Traced, but handed to no compiler, which would cost half a minute."""
    torch._dynamo.reset()
    compile_, traced = torch.compile, []

    def backend(graph, examples):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    compiled = CompiledEvaluation()
    torch.testing.assert_close(compiled(network, *inputs), network(*inputs))
    compiled(network, *inputs)
    assert len(traced) == 1
    compiled(network, *inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    twice = copy.deepcopy((network, compiled))
    with torch.no_grad():
        twice[0].layers[-1].bias.add_(1.0)
    torch.testing.assert_close(twice[1](twice[0], *inputs), network(*inputs) + 1)


@pytest.mark.parametrize("when", ["at once", "when called"])
def test_a_network_that_cannot_be_compiled_is_evaluated_as_it_is(monkeypatch, caplog, network, inputs, when):
    tries = []

    def compile_(function):
        def fails(*arguments):
            tries.append(arguments)
            raise RuntimeError("no compiler found\nand much more")

        return fails() if when == "at once" else fails

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = CompiledEvaluation()
    with caplog.at_level(logging.WARNING):
        velocities = [compiled(network, *inputs) for _ in range(3)]
    assert all(torch.equal(velocity, network(*inputs)) for velocity in velocities)
    assert len(tries) == 1
    messages = [record.getMessage() for record in caplog.records if record.name == compiling.__name__]
    assert messages == ["The network is not compiled, since that failed: RuntimeError: no compiler found"]


def test_too_little_memory_is_no_failure_of_the_compiler(monkeypatch, network, inputs):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledEvaluation()(network, *inputs)


def test_an_error_of_the_network_is_its_own(monkeypatch, inputs):
    class Broken(nn.Module):
        def forward(self, x, t, condition):
            raise ValueError("shapes do not fit")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(ValueError, match="shapes do not fit"):
        CompiledEvaluation()(Broken(), *inputs)


def test_an_evaluation_is_a_call_of_the_network(network, inputs):
    assert torch.equal(evaluate(network, *inputs), network(*inputs))
