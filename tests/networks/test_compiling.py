import copy

import pytest
import torch

from primeflow_perturbench.networks.compiling import compiled_evaluation, evaluate
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


def test_a_compiled_network_has_the_same_velocity(monkeypatch, network, inputs):
    """The network is traced but not compiled, which would take half a minute."""
    torch._dynamo.reset()
    compile_, traced = torch.compile, []

    def backend(graph, examples):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    compiled = compiled_evaluation()
    torch.testing.assert_close(compiled(network, *inputs), network(*inputs))
    compiled(network, *inputs)
    assert len(traced) == 1
    compiled(network, *inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.layers[-1].bias.add_(1.0)
    torch.testing.assert_close(compiled(other, *inputs), network(*inputs) + 1)


def test_an_error_of_the_compiler_is_raised(monkeypatch, network, inputs):
    def fails(*arguments):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    with pytest.raises(RuntimeError, match="no compiler found"):
        compiled_evaluation()(network, *inputs)


def test_evaluate_calls_the_network(network, inputs):
    assert torch.equal(evaluate(network, *inputs), network(*inputs))
