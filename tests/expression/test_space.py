from functools import partial

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.detection_limit import ExpressionSurvey, decode_expression
from primeflow_perturbench.expression.space import GeneSpace, PCASpace, refuse_gene_settings
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens
from primeflow_perturbench.networks.unet import UNet

G = 12


def expression(n=300, seed=0):
    """Log1p cells with zeros, programmes of genes, and a last gene that is never seen."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 3)) @ random.normal(size=(3, G)) + 0.1 * random.normal(size=(n, G)) + 0.5
    x[:, -1] = 0
    return torch.from_numpy(np.maximum(x, 0)).float()


def fitted(space, cells=None):
    cells = expression() if cells is None else cells
    survey = ExpressionSurvey()
    survey.add(cells)
    space.fit(survey, cells)
    return space, survey


# --- genes


def test_genes_as_they_are_come_back_to_the_bit():
    space, survey = fitted(GeneSpace(G))
    x = expression(seed=1)
    assert space.width == G
    assert torch.equal(space.decode(space.encode(x)), x)
    assert torch.equal(space.encode(x), x)
    assert space.state_dict() == {}
    assert all(map(torch.equal, space.statistics(survey, None), (survey.mean, survey.std)))


def test_scaled_genes_have_unit_deviation_and_a_gene_never_seen_stays_finite():
    space, survey = fitted(GeneSpace(G, scaling="std"))
    x = expression()
    z = space.encode(x)
    np.testing.assert_allclose(z[:, :-1].std(0, correction=0), 1, rtol=1e-4)
    assert space.scale[-1] == pytest.approx(0.02)
    torch.testing.assert_close(space.decode(z), x)
    mean, std = space.statistics(survey, None)
    torch.testing.assert_close(mean.float(), z.mean(0))
    torch.testing.assert_close(std.float(), z.std(0, correction=0))


@pytest.mark.parametrize("scaling", ["none", "std"])
def test_a_gap_parts_zeros_from_the_rest_and_decoding_restores_them(scaling):
    space, survey = fitted(GeneSpace(G, scaling=scaling, zero_gap=0.7))
    x = expression()
    z = space.encode(x)
    assert 0.1 < float((x == 0).float().mean()) < 0.9
    assert (z[x == 0] == -0.7).all()
    assert (z[x > 0] > 0).all()
    torch.testing.assert_close(decode_expression(space.decode(z), None), x)
    assert (decode_expression(space.decode(z), None)[x == 0] == 0).all()
    mean, std = space.statistics(survey, x)
    np.testing.assert_allclose(mean, z.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, z.numpy().std(0), rtol=1e-4, atol=1e-5)
    assert (mean[:-1] < survey.mean[:-1] / (1 if scaling == "none" else space.scale[:-1])).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "max"}, "scaling of the gene space must be 'none' or 'std', got 'max'"),
        ({"zero_gap": -1.0}, "zero_gap of the gene space must be at least 0, got -1.0"),
        ({"zero_gap": float("nan")}, "zero_gap of the gene space must be at least 0, got nan"),
    ],
)
def test_settings_of_genes_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        GeneSpace(G, **settings)


# --- principal components


def test_components_equal_those_of_scikit_learn():
    cells, others = expression(), expression(50, seed=1)
    space, survey = fitted(PCASpace(G, n_components=4), cells)
    reference = PCA(4, svd_solver="full").fit(cells.double().numpy())
    signs = np.sign((reference.components_ * space.components.numpy()).sum(1))
    np.testing.assert_allclose(space.components, reference.components_ * signs[:, None], atol=1e-5)
    # One scale for all: the deviation of the first component.
    first = np.sqrt(reference.explained_variance_[0] * (len(cells) - 1) / len(cells))
    expected = reference.transform(others.double().numpy()) * signs / first
    np.testing.assert_allclose(space.encode(others), expected, atol=1e-4)
    restored = reference.inverse_transform(reference.transform(others.double().numpy()))
    np.testing.assert_allclose(space.decode(space.encode(others)), restored, atol=1e-4)
    mean, std = space.statistics(survey, cells)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(
        std, np.sqrt(reference.explained_variance_ / reference.explained_variance_[0]), rtol=1e-3
    )


def test_all_components_keep_the_cells_and_their_distances():
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


def test_half_precision_around_it_changes_no_bit():
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
def test_settings_of_components_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        PCASpace(G, **settings)


def test_too_few_cells_and_cells_all_alike_are_refused():
    with pytest.raises(InputError, match="more training cells than its 3 components, got 3; lower n_components"):
        fitted(PCASpace(G, n_components=3), expression(3))
    with pytest.raises(InputError, match="do not vary"):
        fitted(PCASpace(G, n_components=3), torch.ones(9, G))


@pytest.mark.parametrize(
    ("genes", "setting"),
    [
        (partial(GenePatches, patch=4, order="correlation"), "order=correlation"),
        (partial(GenePatches, patch=4, initial_vectors="esm2.parquet"), "initial_vectors"),
        (partial(GeneTokens, initial_vectors="esm2.parquet"), "initial_vectors"),
    ],
)
def test_what_is_about_genes_is_refused_for_components(genes, setting):
    with pytest.raises(InputError, match=rf"genes\.{setting} is about genes, but with space=pca"):
        refuse_gene_settings(UNet(G, 3, channels=8, multipliers=(1,), genes=genes))
    refuse_gene_settings(UNet(G, 3, channels=8, multipliers=(1,), genes=partial(GenePatches, patch=4)))
