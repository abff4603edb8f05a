"""``primeflow data`` as a person meets it: tables, one sentence for bad input, and statuses."""

import gzip
import sys

import anndata as ad
import numpy as np
import pytest

from primeflow_perturbench.cli import main

COLUMNS = ["--covariate-keys", "cell_type"]


def call(monkeypatch, *arguments) -> int:
    """Status of ``primeflow data`` run in this process."""
    monkeypatch.setattr(sys, "argv", ["primeflow", "data", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def rows(text: str) -> dict[str, str]:
    """Lines of a table by their first word."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.split()}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_check_tells_the_numbers_of_a_good_file(screen_path, screen, monkeypatch, capsys):
    assert call(monkeypatch, "check", screen_path, *COLUMNS) == 0
    text = capsys.readouterr().out
    obs, said = screen.obs, rows(text)
    labels = set(obs.condition.astype(str)) - {"control"}
    pairs = {label for label in labels if "+" in label}
    parts = {part for label in labels for part in label.split("+")}
    controls = (obs.condition == "control").sum()
    assert said["cells"] == f"{screen.n_obs:,} ok"
    assert said["genes"] == f"{screen.n_vars} ok"
    assert said["condition"] == (
        f"{len(parts)} perturbations, {len(labels - pairs)} alone, {len(pairs)} combinations; {controls} controls ok"
    )
    sizes = obs.cell_type.value_counts()
    each = obs[obs.condition == "control"].cell_type.value_counts().unique().item()
    assert said["cell_type"] == f"3 groups of {sizes.min()} to {sizes.max()} cells, {each} of them controls ok"
    assert "expression" in said
    assert text.strip().endswith(f"{screen_path} will train")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_check_samples_the_expression(screen, tmp_path, monkeypatch, capsys, layout):
    # Few enough cells and genes that the sample is everything.
    cells = screen[::4].copy()
    values = cells.X.toarray()
    cells.X = values if layout == "dense" else getattr(cells.X, f"to{layout}")()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert call(monkeypatch, "check", tmp_path / "cells.h5ad", *COLUMNS) == 0
    n = f"{screen.n_vars} genes" if layout == "csc" else f"{len(cells)} cells"
    said = rows(capsys.readouterr().out)["expression"]
    assert said == f"{np.mean(values == 0):.0%} zeros, largest {values.max():.4g} in a sample of {n} ok"


def test_check_says_where_a_file_is_wrong_and_ends_with_status_1(screen, tmp_path, monkeypatch, capsys):
    beta = screen.obs.cell_type.unique()[1]
    cells = screen[~((screen.obs.condition == "control") & (screen.obs.cell_type == beta))].copy()
    cells.X = cells.X.toarray()
    cells.X[0, 5] = -1
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    assert call(monkeypatch, "check", path, *COLUMNS, "donor") == 1
    text = capsys.readouterr().out
    said = rows(text)
    assert said["cells"].endswith(" ok")
    assert said["genes"].endswith(" ok")
    assert said["condition"].endswith(" error")
    assert said["cell_type"].endswith("0 to 120 of them controls ok")
    assert said["donor"] == "no such column error"
    assert said["expression"].endswith(" error")
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 3
    assert sentences[0].startswith(f"error: {path}, obs column 'donor': found only the columns ")
    assert f"in 1 covariate group, 'cell_type={beta}'" in sentences[1]
    assert sentences[2].startswith(f"error: {path}, X, gene {cells.var_names[5]!r}: found negative values")
    assert text.strip().endswith(f"{path} will not train: 3 errors")


def test_check_warns_and_lets_pass(screen, tmp_path, monkeypatch, capsys):
    condition = screen.obs.condition[screen.obs.condition != "control"].iloc[0]
    lone = screen.obs.index[screen.obs.condition == condition][1:]
    cells = screen[~screen.obs.index.isin(lone)].copy()
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    assert call(monkeypatch, "check", path) == 0
    text = capsys.readouterr().out
    assert rows(text)["condition"].endswith(" warning")
    assert f"found a single cell in 1 condition, '{condition}'" in text
    assert text.strip().endswith(f"{path} will train, with 1 warning")


def test_check_takes_other_names(screen, tmp_path, monkeypatch, capsys):
    cells = screen.copy()
    labels = cells.obs.condition.astype(str).replace("control", "NT").str.replace("+", "|")
    cells.obs["guide"], cells.obs["dose"] = labels, np.linspace(0.5, 4, len(cells))
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    names = ["--perturbation-key", "guide", "--control", "NT", "--delimiter", "|", "--covariate-keys", "dose"]
    assert call(monkeypatch, "check", path, *names) == 0
    said = rows(capsys.readouterr().out)
    assert said["guide"].startswith("8 perturbations, 8 alone, 6 combinations; 360 controls")
    assert said["dose"] == "continuous, 0.5 to 4 ok"
    assert call(monkeypatch, "check", path, *names[:4], "--delimiter", "") == 0
    assert rows(capsys.readouterr().out)["guide"].startswith("14 perturbations, 14 alone, 0 combinations;")


def test_check_answers_for_empty_cells_and_missing_columns(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.h5ad"
    ad.AnnData(np.zeros((0, 3), dtype=np.float32)).write_h5ad(path)
    assert call(monkeypatch, "check", path, *COLUMNS) == 1
    text = capsys.readouterr().out
    assert rows(text)["cells"] == "0 error"
    assert f"error: {path}: found 0 cells and 3 genes" in text
    assert text.strip().endswith("will not train: 1 error")


def test_a_file_that_is_none_is_bad_usage(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "check", tmp_path / "none.h5ad") == 2
    assert "found no such file" in capsys.readouterr().err
    assert call(monkeypatch, "check") == 2
    assert call(monkeypatch, "measure") == 2


def test_download_fetches_and_says_so(hub, tmp_path, monkeypatch, capsys):
    hub.files["norman19_processed.h5ad.gz"] = gzip.compress(b"cells")
    monkeypatch.setenv("PRIMEFLOW_DATA", str(tmp_path))
    assert call(monkeypatch, "download", "norman19", "--keep") == 0
    path = tmp_path / "norman19_processed.h5ad"
    assert path.read_bytes() == b"cells"
    assert gzip.decompress((tmp_path / "norman19_processed.h5ad.gz").read_bytes()) == b"cells"
    assert capsys.readouterr().out == f"{path} is there (5 bytes)\n"
    path.write_bytes(b"mine")
    assert call(monkeypatch, "download", "norman19") == 2
    assert "does not record in this form" in capsys.readouterr().err
    assert call(monkeypatch, "download", "norman19", "--force") == 0
    assert path.read_bytes() == b"cells"
    assert call(monkeypatch, "download", "norman19", "--folder", tmp_path / "more", "--revision", "nowhere") == 2
    assert "found no revision 'nowhere'" in capsys.readouterr().err


def test_download_refuses_no_name_and_wrong_names(hub, monkeypatch, capsys):
    assert call(monkeypatch, "download") == 2
    assert "found no name, expected data sets or all; --list shows them" in capsys.readouterr().err
    assert call(monkeypatch, "download", "sciplex") == 2
    assert "did you mean 'sciplex3'?" in capsys.readouterr().err
    assert hub.requests == []


def test_an_interrupted_download_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("primeflow_perturbench.data.download.download", interrupted)
    assert call(monkeypatch, "download", "norman19") == 130
    assert capsys.readouterr().out == "Interrupted. The same command downloads the files that are missing.\n"


def test_list_tells_sizes_and_what_is_here(hub, tmp_path, monkeypatch, capsys):
    hub.files.update(
        {
            "norman19_processed.h5ad.gz": gzip.compress(b"cells"),
            "frangieh21_split.csv": b"x" * 1_500_000,
            "frangieh21_processed.h5ad.gz": gzip.compress(b"cells") + bytes(2_000_000),
            "sciplex3_processed.h5ad.gz": b"x" * 8_000,
        }
    )
    folder = ["--folder", tmp_path]
    assert call(monkeypatch, "download", "norman19", *folder) == 0
    assert call(monkeypatch, "download", "frangieh21", *folder) == 0
    (tmp_path / "frangieh21_split.csv").unlink()
    capsys.readouterr()
    assert call(monkeypatch, "download", "--list", *folder) == 0
    said = rows(capsys.readouterr().out)
    assert said["norman19"] == "CRISPRa with pairs, K562 unseen pairs norman19_processed.h5ad 25 bytes yes"
    assert said["frangieh21"].endswith("frangieh21_split.csv 3.5 MB in part")
    assert said["sciplex3"].endswith("sciplex3_processed.h5ad 8.0 kB no")
    assert set(said) > {"jiang24", "op3", "mcfaline23"}


def test_list_without_a_hub_has_no_sizes_and_says_why(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert call(monkeypatch, "download", "--list", "--folder", tmp_path / "none") == 0
    said = rows(capsys.readouterr().out)
    assert said["norman19"].endswith("norman19_processed.h5ad ? no")
    assert said["No"].startswith("sizes: altoslabs/perturbench cannot be downloaded from http://127.0.0.1:9 (")
    assert not (tmp_path / "none").exists()


def test_preprocess_hands_its_options_over(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "primeflow_perturbench.data.preprocess.preprocess", lambda *names, **settings: calls.append((names, settings))
    )
    defaults = {
        "perturbation_key": "condition",
        "covariate_keys": [],
        "control": "control",
        "delimiter": "+",
        "counts_layer": None,
        "n_top_genes": 4000,
        "n_de_genes": 50,
        "target_sum": 1e4,
    }
    others = {
        "perturbation_key": "guide",
        "covariate_keys": ["line", "dose"],
        "control": "NT",
        "delimiter": "|",
        "counts_layer": "raw",
        "n_top_genes": 300,
        "n_de_genes": 7,
        "target_sum": 1e6,
    }
    assert call(monkeypatch, "preprocess", "raw.h5ad", "out.h5ad") == 0
    options = []
    for name, value in others.items():
        options += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    assert call(monkeypatch, "preprocess", "raw.h5ad", "out.h5ad", *options) == 0
    for (names, settings), expected in zip(calls, (defaults, others), strict=True):
        assert names == ("raw.h5ad", "out.h5ad")
        assert settings.pop("console") is not None
        assert settings == expected


def test_check_marks_the_row_of_a_lone_gene(screen, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.h5ad"
    screen[:, 40:41].copy().write_h5ad(path)
    assert call(monkeypatch, "check", path) == 1
    said = rows(capsys.readouterr().out)
    assert said["cells"].endswith(" ok")
    assert said["genes"] == "1 error"
