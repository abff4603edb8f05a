from functools import partial

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import GeneSpace, PCASpace, check_gene_settings
from primeflow_perturbench.expression.statistics import ExpressionStatistics
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.unet import UNet

G = 12


def expression(n=300, seed=0):
    """Log1p cells with zeros, gene programs, and a last gene that is never expressed."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 3)) @ random.normal(size=(3, G)) + 0.1 * random.normal(size=(n, G)) + 0.5
    x[:, -1] = 0
    return torch.from_numpy(np.maximum(x, 0)).float()


def fitted(space, cells=None):
    cells = expression() if cells is None else cells
    statistics = ExpressionStatistics()
    statistics.add(cells)
    space.fit(cells)
    return space, statistics


# --- genes


def test_the_gene_space_changes_no_bit():
    space, statistics = fitted(GeneSpace(G))
    x = expression(seed=1)
    assert space.width == G
    assert torch.equal(space.decode(space.encode(x)), x)
    assert torch.equal(space.encode(x), x)
    assert space.state_dict() == {}
    assert all(map(torch.equal, space.statistics(statistics, None), (statistics.mean, statistics.std)))


# --- principal components


def test_components_equal_those_of_scikit_learn():
    cells, others = expression(), expression(50, seed=1)
    space, statistics = fitted(PCASpace(G, n_components=4), cells)
    reference = PCA(4, svd_solver="full").fit(cells.double().numpy())
    signs = np.sign((reference.components_ * space.components.numpy()).sum(1))
    np.testing.assert_allclose(space.components, reference.components_ * signs[:, None], atol=1e-5)
    # One scale for all: the deviation of the first component.
    first = np.sqrt(reference.explained_variance_[0] * (len(cells) - 1) / len(cells))
    expected = reference.transform(others.double().numpy()) * signs / first
    np.testing.assert_allclose(space.encode(others), expected, atol=1e-4)
    restored = reference.inverse_transform(reference.transform(others.double().numpy()))
    np.testing.assert_allclose(space.decode(space.encode(others)), restored, atol=1e-4)
    mean, std = space.statistics(statistics, cells)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(
        std, np.sqrt(reference.explained_variance_ / reference.explained_variance_[0]), rtol=1e-3
    )


def test_all_components_together_preserve_cells_and_distances():
    space, _ = fitted(PCASpace(G, n_components=G))
    x = expression(40, seed=1)
    z = space.encode(x)
    torch.testing.assert_close(space.decode(z), x, rtol=0, atol=1e-5)
    distances = torch.cdist(x.double(), x.double())
    torch.testing.assert_close(torch.cdist(z.double(), z.double()) * space.scale, distances, rtol=0, atol=1e-4)


def test_signs_do_not_depend_on_the_order_of_the_cells():
    one, other = (fitted(PCASpace(G, n_components=11), cells)[0] for cells in (expression(), expression().flip(0)))
    torch.testing.assert_close(one.components, other.components, rtol=0, atol=1e-4)
    largest = one.components.gather(1, one.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_a_checkpoint_holds_the_components():
    space, _ = fitted(PCASpace(G, n_components=3))
    again = PCASpace(G, n_components=3)
    again.load_state_dict(space.state_dict())
    x = expression(5, seed=1)
    assert torch.equal(again.encode(x), space.encode(x))
    assert torch.equal(again.decode(space.encode(x)), space.decode(space.encode(x)))


def test_autocast_does_not_lower_the_precision_of_components():
    space, _ = fitted(PCASpace(G, n_components=3))
    x = expression(5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = space.encode(x)
        assert torch.equal(space.decode(inside), space.decode(space.encode(x)))
        assert (x @ space.components.T).dtype == torch.bfloat16
    assert torch.equal(inside, space.encode(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_components": 0}, "n_components from 1 to the number of genes, 12, got 0"),
        ({"n_components": 13}, "n_components from 1 to the number of genes, 12, got 13"),
        ({"n_components": 5, "fit_cells": 5}, "more fit_cells than its 5 components, got 5"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        PCASpace(G, **settings)


def test_too_few_cells_and_equal_cells_are_an_error():
    with pytest.raises(InputError, match="more training cells than its 3 components, got 3; lower n_components"):
        fitted(PCASpace(G, n_components=3), expression(3))
    with pytest.raises(InputError, match="all training cells are equal"):
        fitted(PCASpace(G, n_components=3), torch.ones(9, G))


@pytest.mark.parametrize("genes", [partial(GenePatches, patch=4), GeneTokens])
def test_initial_gene_vectors_are_an_error_for_components(genes):
    settings = {"channels": 8, "multipliers": (1,)}
    network = UNet(G, 3, genes=partial(genes, initial_vectors="esm2.parquet"), **settings)
    with pytest.raises(InputError, match=r"initial_vectors describes genes, but with model/space=pca"):
        check_gene_settings(network)
    check_gene_settings(UNet(G, 3, genes=genes, **settings))
