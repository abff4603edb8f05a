"""Weights of a checkpoint are matched by the names of genes, perturbations and covariates."""

from functools import partial

import pytest
import torch
from torch import nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import PCASpace
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.condition_embedding import External, Mixture
from primeflow_perturbench.networks.gene_layout import FREE
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.residual_mlp import ResidualMLP
from primeflow_perturbench.networks.unet import UNet

GENES = [f"gene{i}" for i in range(11)]
PERTURBATIONS = ["G0", "G1", "G2"]
LINES = {"line": ["alpha", "beta"]}
UNET = partial(UNet, channels=8, multipliers=(1, 2), blocks=1)
NETWORKS = {
    "mlp": partial(MLP, width=16, depth=2, embedding_width=8),
    "residual_mlp": partial(ResidualMLP, width=16, depth=1, embedding_width=8, functions=0, direct=False),
    "own_values": partial(ResidualMLP, width=16, depth=1, embedding_width=8, functions=3, direct=True),
    "tokens": partial(UNET, genes=GeneTokens),
    "patches": partial(UNET, genes=partial(GenePatches, patch=4, functions=3, direct=True)),
}

OTHER = {
    "narrow_mlp": partial(MLP, width=8, depth=2, embedding_width=8),
    "long_patches": partial(UNET, genes=partial(GenePatches, patch=8, functions=3, direct=True)),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(genes=GENES, perturbations=PERTURBATIONS, covariates=LINES, network="patches", **settings):
    context = {
        "perturbation_uniques": list(perturbations),
        "covariate_uniques": covariates,
        "perturbation_key": "condition",
        "covariate_keys": list(covariates),
        "perturbation_combination_delimiter": "+",
        "perturbation_control_value": "control",
    }
    given = {
        "n_genes": len(genes),
        "n_perts": len(perturbations),
        "transform": None,
        "context": context,
        "evaluation": None,
        "gene_names": list(genes),
        "network": (NETWORKS | OTHER)[network],
    }
    return PRiMeFlow(**given | settings)


def trained(**settings):
    """A model whose parameters differ from those of every fresh one."""
    model = build(**settings)
    for i, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(100 + i))
    return model


def checkpoint_of(model):
    return {
        "state_dict": model.state_dict(),
        "training_record": model.training_record,
        "hyper_parameters": dict(model.hparams),
    }


def finetuned(old, **settings):
    model = build(**settings)
    model.take_over(checkpoint_of(old))
    return model


def condition(model, labels, lines=None):
    """Conditions of labels with alternating lines, in the model's vocabulary."""
    context = model.training_record["train_context"]
    perturbations = torch.tensor(
        [[float(name in label.split("+")) for name in context["perturbation_uniques"]] for label in labels]
    )
    lines = lines or ["alpha", "beta"] * len(labels)
    covariates = {
        key: torch.tensor([[float(line == value) for value in values] for line, _ in zip(lines, labels, strict=False)])
        for key, values in context["covariate_uniques"].items()
        if key == "line"
    }
    return model.encoder(perturbations, covariates)


LABELS = ["G0", "G1", "G0+G2", "control"]
TIMES = torch.tensor([0.0, 0.3, 0.6, 0.9])


def velocity(model, x, labels=LABELS):
    with torch.no_grad():
        return model.velocity(x, TIMES, model.conditions(condition(model, labels)))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_data_keep_every_weight(network):
    old = trained(network=network)
    new = finetuned(old, network=network)
    state = new.state_dict()
    assert set(state) == set(old.state_dict())
    assert all(torch.equal(state[name], value) for name, value in old.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
def test_genes_in_another_order_keep_their_velocity(network):
    old, shuffle = trained(network=network), torch.randperm(11, generator=torch.Generator().manual_seed(5))
    new = finetuned(old, network=network, genes=[GENES[i] for i in shuffle])
    x = random(4, 11)
    torch.testing.assert_close(velocity(new, x[:, shuffle]), velocity(old, x)[:, shuffle])
    assert not torch.allclose(velocity(new, x), velocity(old, x), atol=1e-2)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_finetuned_model_can_be_finetuned_again(network):
    """Its layout has an order and a free place, which the next model takes over."""
    first = trained(network=network)
    second = finetuned(first, network=network, genes=[GENES[i] for i in (10, 2, 3, 7, 0, 5)])
    third = finetuned(second, network=network, genes=[GENES[i] for i in (3, 5, 0, 10, 2)])
    x = torch.zeros(4, 11)
    kept = [3, 5, 0, 10, 2]
    x[:, kept] = random(4, 5)
    torch.testing.assert_close(velocity(third, x[:, kept]), velocity(first, x)[:, kept])
    again = finetuned(third, network=network, genes=[GENES[i] for i in kept])
    assert torch.equal(velocity(again, x[:, kept]), velocity(third, x[:, kept]))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_missing_gene_equals_a_gene_with_value_zero(network):
    old, kept = trained(network=network), [10, 2, 3, 7, 0]
    new = finetuned(old, network=network, genes=[GENES[i] for i in kept])
    x = torch.zeros(4, 11)
    x[:, kept] = random(4, 5)
    torch.testing.assert_close(velocity(new, x[:, kept]), velocity(old, x)[:, kept])
    assert new.taken_over["genes"] == {"known": 5, "new": [], "dropped": [f"gene{i}" for i in (1, 4, 5, 6, 8, 9)]}


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "tokens"])
def test_a_new_gene_on_a_free_place_does_not_affect_known_genes(network):
    """A new gene with value 0 has no effect, except as a token, which has an embedding."""
    old, genes = trained(network=network), ["new", *GENES[2:], "other"]
    new = finetuned(old, network=network, genes=genes)
    x = torch.zeros(4, 11)
    x[:, 2:] = random(4, 9)
    full = torch.cat([torch.zeros(4, 1), x[:, 2:], torch.zeros(4, 1)], dim=1)
    found = velocity(new, full)
    torch.testing.assert_close(found[:, 1:-1], velocity(old, x)[:, 2:])
    if network != "mlp":
        assert (found[:, [0, -1]] == 0).all(), "the read-out of a new gene starts at zero"
    changed = full.clone()
    changed[:, 0] = 1
    assert not torch.equal(velocity(new, changed)[:, 1:-1], found[:, 1:-1]), "the new gene is read"


@pytest.mark.parametrize(("network", "places"), [("patches", 16), ("tokens", 14)])
def test_new_genes_fill_free_places_and_then_the_end(network, places):
    added = [f"new{i}" for i in range(5)]
    old = trained(network=network)
    new = finetuned(old, network=network, genes=[*added, *GENES[2:]])
    genes = new.network.genes
    # Places 0 and 1 are free, and in patches 11, which pads the last.
    order = [0, 1, *range(5, 14), *range(2, 5)]
    expected = [*order, FREE, FREE][:places]
    assert genes.order.tolist()[: len(order)] == expected[: len(order)]
    assert set(genes.order.tolist()[len(order) :]) <= {FREE}
    assert genes.place_of_gene.tolist() == [0, 1, 11, 12, 13, *range(2, 11)]
    if network == "patches":
        flat = genes.read_in.flatten(0, 1)
        assert torch.equal(flat[2:11], old.network.genes.read_in.flatten(0, 1)[2:11])
        assert not torch.isclose(flat[[0, 1]], old.network.genes.read_in.flatten(0, 1)[[0, 1]]).any()
        assert torch.equal(genes.bias[2:11], old.network.genes.bias[2:11])
        assert (genes.bias[[0, 1, 11, 12, 13]] == 0).all()
    else:
        assert torch.equal(genes.embedding[:, 2:11], old.network.genes.embedding[:, 2:11])
    assert velocity(new, random(4, 14)).shape == (4, 14)


def test_new_weights_depend_on_the_seed_alone():
    old, genes = trained(), [*GENES, *(f"new{i}" for i in range(9))]
    one = finetuned(old, genes=genes)
    torch.randn(7)
    two, other = finetuned(old, genes=genes), finetuned(old, genes=genes, seed=1)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.network.genes.read_in, other.network.genes.read_in)


def first_layer(model):
    return model.network.embed.condition[0]


def test_conditions_are_matched_by_name_and_new_ones_start_at_the_mean():
    old = trained()
    new = finetuned(old, perturbations=["N", "G2", "G0"], covariates={"line": ["gamma", "beta"]})
    was, now = first_layer(old).weight, first_layer(new).weight
    expected = [was[:, :3].mean(1), was[:, 2], was[:, 0], was[:, 3:5].mean(1), was[:, 4], was[:, 5]]
    torch.testing.assert_close(now, torch.stack(expected, dim=1))
    assert torch.equal(first_layer(new).bias, first_layer(old).bias)
    assert new.taken_over["perturbations"] == {"known": 2, "new": ["N"], "dropped": ["G1"]}
    assert new.taken_over["covariates"] == {"line": {"known": 1, "new": ["gamma"], "dropped": ["alpha"]}}


def test_a_missing_covariate_leaves_its_mean_except_in_the_null_condition():
    covariates = LINES | {"dataset": ["x", "y"]}
    old = trained(covariates=covariates)
    new = finetuned(old)
    was, now = first_layer(old), first_layer(new)
    mean = was.weight[:, 5:7].mean(1)
    torch.testing.assert_close(now.bias, was.bias + mean)
    torch.testing.assert_close(now.weight[:, :5], was.weight[:, :5])
    torch.testing.assert_close(now.weight[:, -1] + now.bias, was.weight[:, -1] + was.bias)
    assert new.taken_over["covariates"]["dataset"] == {"known": 0, "new": [], "dropped": ["x", "y"]}


def test_a_new_covariate_starts_at_zero():
    old, covariates = trained(), {"dose": None, **LINES, "dataset": ["x", "y"]}
    new = finetuned(old, covariates=covariates)
    now, was = first_layer(new).weight, first_layer(old).weight
    assert (now[:, [3, 6, 7]] == 0).all()
    assert torch.equal(now[:, [0, 1, 2, 4, 5, 8]], was)


def test_learned_embeddings_of_perturbations_are_matched_by_name():
    settings = {"conditions": partial(Mixture, width=5, embeddings=[table()])}
    old = trained(**settings)
    new = finetuned(old, perturbations=["G2", "N"], **settings)
    torch.testing.assert_close(new.conditions.learned[0], old.conditions.learned[2])
    torch.testing.assert_close(new.conditions.learned[1], old.conditions.learned.mean(0))
    assert torch.equal(first_layer(new).weight, first_layer(old).weight)


def table():
    import pandas as pd

    return pd.DataFrame(random(4, 2, seed=9).numpy() + 3, index=["G0", "G1", "G2", "N"], columns=["a", "b"])


def test_external_embeddings_are_converted_to_the_units_of_the_checkpoint():
    settings = {"conditions": partial(External, width=5, embeddings=[table()])}
    old = trained(**settings)
    new = finetuned(old, perturbations=["N", "G2"], **settings)
    torch.testing.assert_close(new.conditions.table[1], old.conditions.table[2])
    expected = (torch.tensor(table().loc["N"].to_numpy()) - old.conditions.mean) / old.conditions.std
    torch.testing.assert_close(new.conditions.table[0], torch.cat([expected, torch.ones(1)]))
    assert torch.equal(new.conditions.project.weight, old.conditions.project.weight)


def test_statistics_of_cells_are_not_taken_from_the_checkpoint():
    old = trained(objective=Objective(precondition=True))
    old.network.mean.fill_(7.0)
    new = finetuned(old, genes=GENES[3:], objective=Objective(precondition=True))
    assert (new.network.mean == 0).all()
    assert new.learned_detection_limit is None


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ({"network": "mlp"}, {}, "another kind of model: it lacks '.*', which the model has"),
        ({"objective": Objective(precondition=True)}, {}, "another kind of model: it lacks"),
        (
            {"network": "mlp"},
            {"network": "narrow_mlp"},
            r"shape \(16, .*needs \(8,",
        ),
        ({}, {"network": "long_patches"}, r"read_in' have shape \(4, 8\).*\(8, 8"),
        ({"genes": ["ENSG1", "ENSG2"]}, {}, r"genes \(gene0, ...\) and the checkpoint's \(ENSG1, ...\) have no name"),
        ({"gene_names": None}, {}, "the checkpoint names none"),
        ({"space": partial(PCASpace, n_components=4)}, {"space": partial(PCASpace, n_components=4)}, None),
        (
            {"space": partial(PCASpace, n_components=4), "network": "mlp"},
            {"space": partial(PCASpace, n_components=4), "network": "mlp", "genes": GENES[1:]},
            "principal components, which belong to its genes",
        ),
    ],
)
def test_settings_that_cannot_be_matched_by_name_must_agree(old, new, sentence):
    old = trained(**old)
    if sentence is None:
        finetuned(old, **new)
        return
    with pytest.raises(InputError, match=sentence):
        finetuned(old, **new)
