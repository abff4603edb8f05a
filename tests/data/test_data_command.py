"""``primeflow data``: tables, messages for invalid input, and exit statuses."""

import gzip
import sys

import anndata as ad
import numpy as np
import pytest

from primeflow_perturbench.cli import main

COLUMNS = ["--covariate-keys", "cell_type"]


def call(monkeypatch, *arguments) -> int:
    """Run ``primeflow data`` in this process and return its exit status."""
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


def test_check_reports_the_numbers_of_a_valid_file(screen_path, screen, monkeypatch, capsys):
    assert call(monkeypatch, "check", screen_path, *COLUMNS) == 0
    text = capsys.readouterr().out
    obs, shown = screen.obs, rows(text)
    labels = set(obs.condition.astype(str)) - {"control"}
    pairs = {label for label in labels if "+" in label}
    parts = {part for label in labels for part in label.split("+")}
    controls = (obs.condition == "control").sum()
    assert shown["cells"] == f"{screen.n_obs:,} ok"
    assert shown["genes"] == f"{screen.n_vars} ok"
    assert shown["condition"] == (
        f"{len(parts)} perturbations, {len(labels - pairs)} alone, {len(pairs)} combinations; {controls} controls ok"
    )
    sizes = obs.cell_type.value_counts()
    each = obs[obs.condition == "control"].cell_type.value_counts().unique().item()
    assert shown["cell_type"] == f"3 groups of {sizes.min()} to {sizes.max()} cells, {each} of them controls ok"
    assert "expression" in shown
    assert text.strip().endswith(f"{screen_path} will train")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_check_samples_the_expression(screen, tmp_path, monkeypatch, capsys, layout):
    # So few cells and genes that the sample is the whole matrix.
    cells = screen[::4].copy()
    values = cells.X.toarray()
    cells.X = values if layout == "dense" else getattr(cells.X, f"to{layout}")()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert call(monkeypatch, "check", tmp_path / "cells.h5ad", *COLUMNS) == 0
    n = f"{screen.n_vars} genes" if layout == "csc" else f"{len(cells)} cells"
    shown = rows(capsys.readouterr().out)["expression"]
    assert shown == f"{np.mean(values == 0):.0%} zeros, largest {values.max():.4g} in a sample of {n} ok"


def test_check_reports_every_error_and_exits_with_status_1(screen, tmp_path, monkeypatch, capsys):
    beta = screen.obs.cell_type.unique()[1]
    cells = screen[~((screen.obs.condition == "control") & (screen.obs.cell_type == beta))].copy()
    cells.X = cells.X.toarray()
    cells.X[0, 5] = -1
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    assert call(monkeypatch, "check", path, *COLUMNS, "donor") == 1
    text = capsys.readouterr().out
    shown = rows(text)
    assert shown["cells"].endswith(" ok")
    assert shown["genes"].endswith(" ok")
    assert shown["condition"].endswith(" error")
    assert shown["cell_type"].endswith("0 to 120 of them controls ok")
    assert shown["donor"] == "no such column error"
    assert shown["expression"].endswith(" error")
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 3
    assert sentences[0].startswith(f"error: {path}, obs column 'donor': found only the columns ")
    assert f"in 1 covariate group, 'cell_type={beta}'" in sentences[1]
    assert sentences[2].startswith(f"error: {path}, X, gene {cells.var_names[5]!r}: found negative values")
    assert text.strip().endswith(f"{path} will not train: 3 errors")


def test_check_passes_with_warnings(screen, tmp_path, monkeypatch, capsys):
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


def test_check_accepts_other_columns_and_labels(screen, tmp_path, monkeypatch, capsys):
    cells = screen.copy()
    labels = cells.obs.condition.astype(str).replace("control", "NT").str.replace("+", "|")
    cells.obs["guide"], cells.obs["dose"] = labels, np.linspace(0.5, 4, len(cells))
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    names = ["--perturbation-key", "guide", "--control", "NT", "--delimiter", "|", "--covariate-keys", "dose"]
    assert call(monkeypatch, "check", path, *names) == 0
    shown = rows(capsys.readouterr().out)
    assert shown["guide"].startswith("8 perturbations, 8 alone, 6 combinations; 360 controls")
    assert shown["dose"] == "continuous, 0.5 to 4 ok"
    assert call(monkeypatch, "check", path, *names[:4], "--delimiter", "") == 0
    assert rows(capsys.readouterr().out)["guide"].startswith("14 perturbations, 14 alone, 0 combinations;")


def test_check_reports_a_file_without_cells(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.h5ad"
    ad.AnnData(np.zeros((0, 3), dtype=np.float32)).write_h5ad(path)
    assert call(monkeypatch, "check", path, *COLUMNS) == 1
    text = capsys.readouterr().out
    assert rows(text)["cells"] == "0 error"
    assert f"error: {path}: found 0 cells and 3 genes" in text
    assert text.strip().endswith("will not train: 1 error")


def test_a_missing_file_or_argument_exits_with_status_2(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "check", tmp_path / "none.h5ad") == 2
    assert "found no such file" in capsys.readouterr().err
    assert call(monkeypatch, "check") == 2
    assert call(monkeypatch, "measure") == 2


def test_download_writes_the_file_and_reports_it(hub, tmp_path, monkeypatch, capsys):
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


def test_download_without_a_valid_name_is_an_error(hub, monkeypatch, capsys):
    assert call(monkeypatch, "download") == 2
    assert "found no names, expected data sets or all; --list shows them" in capsys.readouterr().err
    assert call(monkeypatch, "download", "sciplex") == 2
    assert "did you mean 'sciplex3'?" in capsys.readouterr().err
    assert hub.requests == []


def test_an_interrupted_download_explains_how_to_continue(monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("primeflow_perturbench.data.download.download", interrupted)
    assert call(monkeypatch, "download", "norman19") == 130
    assert capsys.readouterr().out == "Interrupted. The same command downloads the files that are missing.\n"


def test_list_shows_sizes_and_local_files(hub, tmp_path, monkeypatch, capsys):
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
    shown = rows(capsys.readouterr().out)
    assert shown["norman19"] == "CRISPRa with pairs, K562 unseen pairs norman19_processed.h5ad 25 bytes yes"
    assert shown["frangieh21"].endswith("frangieh21_split.csv 3.5 MB in part")
    assert shown["sciplex3"].endswith("sciplex3_processed.h5ad 8.0 kB no")
    assert set(shown) > {"jiang24", "op3", "mcfaline23"}


def test_list_without_a_hub_explains_missing_sizes(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert call(monkeypatch, "download", "--list", "--folder", tmp_path / "none") == 0
    shown = rows(capsys.readouterr().out)
    assert shown["norman19"].endswith("norman19_processed.h5ad ? no")
    assert shown["No"].startswith("sizes: altoslabs/perturbench cannot be downloaded from http://127.0.0.1:9 (")
    assert not (tmp_path / "none").exists()


def test_preprocess_passes_its_options_on(monkeypatch):
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
        "library_size_key": None,
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
        "library_size_key": "total",
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


def test_check_marks_a_single_gene_as_an_error(screen, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.h5ad"
    screen[:, 40:41].copy().write_h5ad(path)
    assert call(monkeypatch, "check", path) == 1
    shown = rows(capsys.readouterr().out)
    assert shown["cells"].endswith(" ok")
    assert shown["genes"] == "1 error"
