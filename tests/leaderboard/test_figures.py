"""The text of a figure states the numbers that it draws, or why there is nothing to draw."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection, PolyCollection

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.leaderboard import figures
from primeflow_perturbench.leaderboard.collect import ConditionCells

GENES = [f"G{i}" for i in range(12)]
NASTY = "$<&_^{ 🧬"


def cells(n, shift=0.0, seed=0, width=12):
    """Log1p-like cells; the first two genes are shifted where they are expressed."""
    rng = np.random.default_rng(seed)
    x = np.log1p(rng.poisson(1.0, (n, width)) * 2.0)
    x[:, :2] += shift * (x[:, :2] > 0)
    return x


CONTROL, OBSERVED, PREDICTED = cells(60), cells(50, 4, 1), cells(40, 3, 2)


def draw(kind, predicted=PREDICTED, observed=OBSERVED, control=CONTROL):
    genes = GENES if observed.shape[1] == len(GENES) else [NASTY] * observed.shape[1]
    return figures.draw_cells(kind, ConditionCells(control, observed, predicted, genes))


def texts(picture):
    return [text.get_text() for text in picture.figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def guidance():
    rows = [(w, 0.1 * w + 0.01 * seed, 0.5 + 0.1 * w, seed) for w in (1, 2) for seed in (0, 1)]
    return pd.DataFrame(rows, columns=["w", "mmd_none", "top_k_recall_scores", "seed"])


@pytest.mark.parametrize("kind", [kind for kind in figures.CELL_FIGURES if kind != "UMAP"])
def test_figures_of_cells_are_valid_and_reproducible_svg(kind):
    picture = draw(kind)
    svg = figures.as_svg(picture.figure)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == figures.as_svg(draw(kind).figure)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", figures.CELL_FIGURES)
@pytest.mark.parametrize(
    ("predicted", "observed", "control"),
    [
        (np.zeros((1, 12)), np.zeros((1, 12)), np.zeros((1, 12))),
        (np.zeros((20, 12)), np.zeros((20, 12)), np.zeros((20, 12))),
        (np.empty((0, 12)), cells(9), cells(9)),
        (cells(9), np.empty((0, 12)), cells(9)),
        (cells(9), cells(9), np.empty((0, 12))),
        (cells(1), cells(1), cells(1)),
        (cells(9, width=1), cells(9, width=1, seed=1), cells(9, width=1)),
    ],
    ids=["one of zeros", "zeros", "no predicted", "no observed", "no control", "one", "one gene"],
)
def test_cells_that_cannot_be_drawn_give_a_message(kind, predicted, observed, control):
    picture = draw(kind, predicted, observed, control)
    assert re.fullmatch(r"\S.*\.", picture.alt)
    assert "nan" not in picture.alt
    figures.as_svg(picture.figure)


def test_map_reports_too_few_cells_or_genes():
    few, one_gene = cells(1), cells(9, width=1)
    assert (
        draw("reference PCA", few, few, few).alt
        == "Too few cells to draw: 1 control, 1 observed and 1 predicted cells."
    )
    assert draw("UMAP", one_gene, one_gene, one_gene).alt.startswith("Fewer than two genes vary")


def test_expression_that_is_not_finite_raises():
    broken = OBSERVED.copy()
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="observed cells: found NaN"):
        draw("zeros", observed=broken)


def test_names_are_drawn_literally():
    cells = ConditionCells(CONTROL, OBSERVED, PREDICTED, [NASTY] * len(GENES))
    picture = figures.draw_cells("top genes", cells)
    assert NASTY in texts(picture)
    figures.as_svg(picture.figure)


def test_components_are_fitted_on_observed_and_control_cells_alone():
    picture = draw("reference PCA", PREDICTED + 100)
    reference = np.concatenate([OBSERVED, CONTROL])
    _, _, axes = np.linalg.svd(reference - reference.mean(0), full_matrices=False)
    apart = np.linalg.norm((PREDICTED.mean(0) + 100 - OBSERVED.mean(0)) @ axes[:2].T)
    between = np.linalg.norm((CONTROL.mean(0) - OBSERVED.mean(0)) @ axes[:2].T)
    assert f"{apart:.2f} from the predicted and {between:.2f} from the control mean" in picture.alt
    drawn = [c.get_offsets() for c in picture.figure.axes[0].collections if isinstance(c, PathCollection)]
    assert [len(points) for points in drawn] == [60, 50, 40]
    np.testing.assert_allclose(np.abs(drawn[1]), np.abs((OBSERVED - reference.mean(0)) @ axes[:2].T), atol=1e-8)


def test_at_most_500_cells_of_each_kind_are_drawn():
    picture = draw("reference PCA", cells(1200), cells(501, seed=1), cells(500, seed=2))
    assert picture.alt.startswith("Scatter of 500 control, 500 observed and 500 predicted cells.")


@pytest.mark.slow
def test_text_of_umap_distinguishes_mixed_from_separate_cells():
    mixed = draw("UMAP", cells(200, 1.5, 3), cells(200, 1.5, 4), cells(200, 0, 5))
    apart = draw("UMAP", cells(200, 1.5, 3) + 5, cells(200, 1.5, 4), cells(200, 0, 5))
    again = draw("UMAP", cells(200, 1.5, 3), cells(200, 1.5, 4), cells(200, 0, 5))
    share = [int(re.search(r"predicted cells (\d+) %", picture.alt)[1]) for picture in (mixed, apart)]
    assert 35 <= share[0] <= 65
    assert share[1] == 0
    assert "50 % would" in mixed.alt
    for one, other in zip(mixed.figure.axes[0].collections, again.figure.axes[0].collections, strict=True):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())


def test_top_genes_are_the_shifted_ones():
    assert set(figures.top_genes(OBSERVED, CONTROL, 2)) == {0, 1}
    # A gene that differs without variance comes first, one that is zero everywhere last.
    x, y = OBSERVED.copy(), CONTROL.copy()
    x[:, 7], y[:, 7], x[:, 3], y[:, 3] = 2, 1, 0, 0
    order = figures.top_genes(x, y, 12)
    assert (order[0], order[-1]) == (7, 3)


def test_violins_report_means_of_the_three_kinds():
    picture = draw("top genes")
    for gene in (0, 1):
        c, o, p = (x[:, gene].mean() for x in (CONTROL, OBSERVED, PREDICTED))
        assert f"G{gene} {c:.2f}, {o:.2f} and {p:.2f}" in picture.alt
    assert len(picture.figure.findobj(PolyCollection)) == 3 * figures.TOP_GENES


def test_quantiles_pool_all_values():
    x, y = np.arange(1000.0).reshape(100, 10), 2 * np.arange(1000.0).reshape(100, 10)
    alt = draw("quantiles", y, x, x).alt
    assert "50 % 499.50 and 999.00; 90 % 899.10 and 1798.20" in alt


def test_shares_of_zeros_are_counted_gene_by_gene():
    observed, predicted = np.array([[0.0, 1], [0, 0]]), np.array([[1.0, 1], [0, 1]])
    alt = draw("zeros", predicted, observed, observed).alt
    assert "0.750 in observed and 0.250 in predicted" in alt
    assert alt.endswith("differ by 0.500 on average.")


def test_fold_changes_are_those_of_perturbench_with_pearson_correlation():
    level = {name: np.log2(x.mean(0) + 0.1) for name, x in zip("poc", (PREDICTED, OBSERVED, CONTROL), strict=True)}
    x, y = level["o"] - level["c"], level["p"] - level["c"]
    picture = draw("log fold changes")
    largest = np.abs(x).argmax()
    r = np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())
    assert picture.alt.startswith(
        f"Log2 fold changes of 12 genes, Pearson's r {r:.2f}. Largest, observed and predicted: "
        f"G{largest} {x[largest]:+.2f} and {y[largest]:+.2f};"
    )
    assert f"r = {r:.2f}" in texts(picture)


def test_no_predicted_change_has_no_correlation():
    assert "r undefined" in draw("log fold changes", CONTROL).alt


def test_ranks_are_ordered_by_mean_and_missing_ones_are_dashes():
    ranks = pd.DataFrame({"mmd_none": [3, 1, 2], "cosine_logfc": [2, 1, np.nan]}, index=["c", NASTY, "b"], dtype=float)
    picture = figures.rank_heat_map(ranks)
    assert [label.get_text() for label in picture.figure.axes[0].get_yticklabels()] == [NASTY, "b", "c"]
    assert picture.alt == f"Ranks of 3 models by 2 metrics. Best mean ranks: {NASTY} 1.00; b 2.00; c 2.50."
    assert sum(text == "–" for text in texts(picture)) == 1
    figures.as_svg(picture.figure)


def test_only_best_of_many_models_are_drawn():
    ranks = pd.DataFrame({"mmd_none": np.arange(300, 0, -1)}, index=[f"m{i}" for i in range(300)])
    picture = figures.rank_heat_map(ranks)
    labels = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert labels == [f"m{i}" for i in range(299, 299 - figures.MODELS_SHOWN, -1)]
    assert "300 models by 1 metrics, of which the best 40 are drawn" in picture.alt


def test_guidance_curve_has_means_and_deviations_over_seeds():
    picture = figures.guidance_curve(guidance())
    deviation = 0.01 / np.sqrt(2)
    assert f"w = 1: 0.105 ± {deviation:.3f} and 0.600 ± 0.000; w = 2: 0.205 ± {deviation:.3f}" in picture.alt
    assert "2 runs per point" in picture.alt
    (line, *_) = picture.figure.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[0.105, 0.6], [0.205, 0.7]])


def test_one_seed_has_no_deviation_and_reports_it():
    alt = figures.guidance_curve(guidance().query("seed == 0")).alt
    assert "one run per point" in alt
    assert "±" not in alt


def test_quality_against_cost_has_one_line_per_label():
    rows = [("euler", 4, 0.4, 0), ("euler", 4, 0.6, 1), ("euler", 8, 0.2, 0), (NASTY, 8, 0.1, 0)]
    scores = pd.DataFrame(rows, columns=["label", "evaluations", "mmd_none", "seed"])
    picture = figures.evaluations_curve(scores, "mmd_none")
    expected = f"euler 4 evaluations 0.500 ± {0.2 / np.sqrt(2):.3f}; euler 8 evaluations 0.200; {NASTY} 8 evaluations"
    assert expected in picture.alt
    assert "1 to 2 runs per point" in picture.alt
    assert NASTY in texts(picture)
    figures.as_svg(picture.figure)


def test_many_labels_are_drawn_without_legend():
    scores = pd.DataFrame({"label": [f"l{i}" for i in range(40)], "evaluations": 8, "mmd_none": 0.5, "seed": 0})
    picture = figures.evaluations_curve(scores, "mmd_none")
    assert picture.alt.endswith("28 more points.")
    assert not picture.figure.legends
    figures.as_svg(picture.figure)
