"""The mixed model as a model: control cells with the predicted marginals, without training."""

import torch
from builders import build_model, fit
from torch import nn

from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.still import Still
from primeflow_perturbench.perturbench.backend import load

Batch = load("data.types.Batch")
GENES, PERTURBATIONS, LINES = [f"g{i}" for i in range(6)], ["A", "B"], ["x", "y"]


def batch():
    names = [(label, line) for label in ("", "A", "B") for line in LINES if (label, line) != ("A", "y")]
    labels, lines = zip(*[name for name in names for _ in range(40)], strict=True)
    hot = torch.tensor([[float(name == label) for name in PERTURBATIONS] for label in labels])
    line = nn.functional.one_hot(torch.tensor([LINES.index(name) for name in lines]), 2)
    x = torch.rand(len(labels), len(GENES), generator=torch.Generator().manual_seed(0)) + 0.5 + hot @ torch.ones(2, 6)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0.0, x)
    return Batch(gene_expression=x, perturbations=hot, covariates={"line": line.float()}, gene_names=None)


def test_cells_of_an_unseen_condition_have_the_mean_that_the_mixed_model_predicts():
    context = {"perturbation_uniques": PERTURBATIONS, "covariate_uniques": {"line": LINES}}
    settings = {"source": "control", "source_noise": 0.01, "condition_dropout": 0.0, "detection_limit": "learned"}
    model = build_model(GENES, context, network=Still, calibrate="marginals", solver=ODESolver("euler", 1), **settings)
    fit(model, batch(), steps=3)
    assert not model.network.factor.any()
    hot, line = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    condition = model.encoder(hot, {"line": line})
    cells = model.generate(condition.expand(1000))
    aims = model.marginals.targets(condition, model.learned_detection_limit)
    torch.testing.assert_close(cells.mean(0), aims.mean[0], atol=2e-3, rtol=0)
    torch.testing.assert_close((cells > 0).float().mean(0), aims.rate[0], atol=2e-3, rtol=0)
    # A raises every gene in the other line, far more than the lines differ.
    assert (cells.mean(0) > model.marginals.targets(condition.as_control(), 0.0).mean[0] + 0.25).all()
