"""Tables hold means over conditions and seeds, and every format shows the same numbers and bold."""

import io

import numpy as np
import pandas as pd
import pytest
from fake_runs import METRICS, REFERENCES, scores, write_run
from rich.console import Console

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.leaderboard.collect import collect
from primeflow_perturbench.leaderboard.regimes import covariate_groups
from primeflow_perturbench.leaderboard.tables import (
    PublishedRow,
    as_csv,
    as_latex,
    as_markdown,
    published_rows,
    reference_scores,
    result_table,
    rich_table,
    run_scores,
    write_tables,
)

OFFSETS = {"low": (-0.1, -0.11, -0.12), "high": (0.2, 0.21, 0.22)}


@pytest.fixture
def runs(tmp_path):
    """Two labels of three seeds; "low" has lower scores by far more than its seeds differ."""
    for label, offsets in OFFSETS.items():
        for seed, offset in enumerate(offsets):
            write_run(tmp_path / f"{label}{seed}", label, seed, scores("M", offset))
    return collect([tmp_path]).runs


def table_of(runs, **options):
    return result_table(run_scores(runs), reference_scores(runs), METRICS, **options)


def row(table, label):
    return table.keys.index[table.keys["label"] == label][0]


def test_mean_and_deviation_over_seeds_of_means_over_conditions(runs):
    table = table_of(runs)
    for label, offsets in OFFSETS.items():
        place = row(table, label)
        # Conditions have the values 0, 0.1 ... 1.7.
        np.testing.assert_allclose(table.mean["mmd_none"][place], 0.85 + np.mean(offsets))
        np.testing.assert_allclose(table.deviation["mmd_none"][place], np.std(offsets, ddof=1))
        assert table.keys["seeds"][place] == 3


def test_references_have_no_deviation(runs):
    table = table_of(runs)
    assert table.keys["label"].tolist() == ["low", "high", *REFERENCES]
    place = row(table, "training_mean")
    np.testing.assert_allclose(table.mean.loc[place], 0.85 + 2)
    assert table.deviation.loc[place].isna().all()
    assert table.keys["kind"][place] == "reference"


def test_models_are_ordered_by_mean_rank(runs):
    # "low" is first on two of three metrics.
    assert table_of(runs).best_label == "low"


def test_bold_follows_direction_of_metric(runs):
    table = result_table(run_scores(runs), reference_scores(runs).iloc[:0], METRICS)
    bold = {metric: table.keys["label"][table.best(metric)].tolist() for metric in METRICS}
    assert bold == {"mmd_none": ["low"], "cosine_logfc": ["high"], "rmse_average": ["low"]}


def test_a_model_that_a_reference_beats_is_not_bold(runs):
    """The references have higher scores than all models, so they are ahead in cosine alone."""
    table = table_of(runs)
    bold = {metric: table.keys["label"][table.best(metric)].tolist() for metric in METRICS}
    assert bold == {"mmd_none": ["low"], "cosine_logfc": [], "rmse_average": ["low"]}


def test_references_and_published_rows_are_never_bold(runs):
    ahead = PublishedRow("theirs", "a paper", {"mmd_none": -9.0}, {"mmd_none": 0.5})
    table = table_of(runs, published=[ahead])
    place = row(table, "theirs")
    assert table.texts("mmd_none")[place] == "-9.000 ± 0.500"
    assert table.texts("rmse_average")[place] == "–"
    assert table.names[place] == "theirs (published: a paper)"
    assert np.flatnonzero(table.best("mmd_none")).tolist() == [row(table, "low")]


def test_published_row_without_these_metrics_is_left_out(runs):
    table = table_of(runs, published=[PublishedRow("theirs", "x", {"other": 1.0}, {})])
    assert "theirs" not in set(table.keys["label"])


@pytest.mark.parametrize("offset", [0.0, 0.001])
def test_gains_within_seed_noise_are_not_bold(tmp_path, offset):
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path / f"a{seed}", "one", seed, scores("M", noise))
        write_run(tmp_path / f"b{seed}", "two", seed, scores("M", noise + offset))
    table = table_of(collect([tmp_path]).runs)
    assert not any(any(table.best(metric)) for metric in METRICS)
    assert "**" not in as_markdown(table)


def test_table_by_covariate_group_has_means_of_each_group(runs):
    table = table_of(runs, parts=covariate_groups(runs[0]))
    place = (table.keys["label"] == "low") & (table.keys["part"] == "beta")
    # The second nine of the eighteen conditions: 0.9 ... 1.7.
    np.testing.assert_allclose(table.mean.loc[place, "mmd_none"], 1.3 - 0.11)
    assert not any(table.best("mmd_none"))
    assert as_csv(table)["part"].unique().tolist() == ["alpha", "beta"]


def test_csv_has_full_precision(runs, tmp_path):
    table = table_of(runs)
    write_tables(tmp_path / "out" / "runs", table)
    again = pd.read_csv(tmp_path / "out" / "runs.csv")
    np.testing.assert_allclose(again["mmd_none"], table.mean["mmd_none"], rtol=1e-15)
    np.testing.assert_allclose(again["mmd_none_sd"], table.deviation["mmd_none"], rtol=1e-12)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs.csv", "runs.md", "runs.tex"]


def test_markdown_has_one_line_per_row_and_escapes_bars(tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), "a|b", seed, scores("M", 0.1 * seed))
    lines = as_markdown(table_of(collect([tmp_path]).runs)).splitlines()
    assert lines[0] == "| model | seeds | E genes↓ | cosine↑ | RMSE↓ |"
    assert lines[2] == r"| a\|b | 2 | 0.900 ± 0.071 | 0.900 ± 0.071 | 0.900 ± 0.071 |"
    assert len(lines) == 2 + 1 + len(REFERENCES)


def test_latex_uses_booktabs_and_escapes_text(tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), r"50% a_b & ~\x{y}", seed, scores("M"))
    text = as_latex(table_of(collect([tmp_path]).runs))
    assert r"50\% a\_b \& \textasciitilde{}\textbackslash{}x\{y\} & 2 & 0.850 $\pm$ 0.000" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"E genes $\downarrow$" in text


def test_formats_show_bold_of_table(runs):
    table = table_of(runs)
    assert "**0.740 ± 0.010**" in as_markdown(table)
    assert r"\textbf{0.740 $\pm$ 0.010}" in as_latex(table)
    assert as_markdown(table).count("**") == 2 * 2
    assert as_latex(table).count("textbf") == 2


def test_terminal_shows_names_literally(tmp_path):
    write_run(tmp_path / "a", "w=[1,2] [bold]")
    console = Console(file=io.StringIO(), width=120)
    console.print(rich_table(table_of(collect([tmp_path]).runs), "title"))
    assert "w=[1,2] [bold]" in console.file.getvalue()


def test_missing_references_leave_out_their_rows(tmp_path):
    runs = collect([write_run(tmp_path / "a", references=())]).runs
    assert table_of(runs).keys["label"].tolist() == ["model"]


def test_published_rows_by_name_or_data_file():
    (first, *_) = published_rows(["norman19"])
    assert (first.means["mmd_none"], first.deviations["mmd_none"]) == (0.61, 0.03)
    assert published_rows([], "norman19_processed.h5ad") == published_rows(["norman19"])
    assert published_rows([], "devel.h5ad") == []
    with pytest.raises(InputError, match="--published norman: .* choose from norman19, sciplex3"):
        published_rows(["norman"])
