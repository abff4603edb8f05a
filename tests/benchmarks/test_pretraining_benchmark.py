"""The benchmark of pretraining: which cells its rows may see, and what its table says."""

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import pretraining  # noqa: E402

from primeflow_perturbench.data.atlas.cells import open_atlas  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """Overrides of the runs by folder; nothing is trained, and every table holds the number of its run."""
    made = {}

    def pretend(folder, overrides):
        made[folder.name] = overrides
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"PRiMeFlow": len(made)} | ({"control": 0.5} if "references=[]" not in overrides else {})
        pd.DataFrame(columns, index=pretraining.METRICS).to_csv(folder / "table.csv")
        (folder / "environment.json").write_text('{"seconds": 1.0}')
        return folder / "checkpoints" / "last.ckpt"

    monkeypatch.setattr(pretraining, "run", pretend)
    return made


def call(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, given)])
    pretraining.main()


def check_steps(calls):
    steps = {name: next(int(o.split("=")[1]) for o in own if "max_steps" in o) for name, own in calls.items()}
    expected = {"context": 6, "narrowed": 6, "pretraining": 4, "pretrained": 1, "finetuned_context": 2, "finetuned": 2}
    assert steps == expected
    goes_on = {name for name, own in calls.items() if "+finetune=true" in own}
    assert goes_on == {"pretrained", "finetuned_context", "finetuned"}
    assert [name for name, own in calls.items() if "model.lr=0" in own] == ["pretrained"]


def test_rows_of_a_file_get_equal_steps_and_no_held_out_cell(calls, tmp_path, monkeypatch, screen_path):
    obs = ad.read_h5ad(screen_path).obs
    line, tests = sorted(obs.cell_type.unique())[-1], ["G0", "G2"]
    where = ["--runs", tmp_path, "--output", tmp_path, "--quick"]
    call(monkeypatch, "--cells", screen_path, "--context", f"cell_type={line}", "--test", *tests, *where)
    check_steps(calls)
    splits = {path.stem: pd.read_csv(path, header=None, index_col=0)[1] for path in tmp_path.glob("cells/splits/*.csv")}
    for row, split in {"context": "context", "finetuned_context": "context", "finetuned": "narrowed"}.items():
        assert any(o.endswith(f"{split}.csv") for o in calls[row])
    here, tested = (obs.cell_type == line).to_numpy(), obs.condition.isin(tests).to_numpy()
    assert splits["pretraining"][here].isna().all()
    assert not (splits["pretraining"][~here]).isna().any()
    for name in ("narrowed", "context"):
        assert set(splits[name][here & tested]) == {"test"}
    assert set(splits["narrowed"][~here & tested]) == {"train"}
    assert splits["context"][~here].isna().all()

    result = json.loads((tmp_path / "pretraining_cells.json").read_text())
    assert result["rows"]["pretrained, then finetuned on the narrowed cells"]["0"] == dict.fromkeys(
        pretraining.METRICS, 6
    )
    assert "| control | 0.500 | 0.500 | 0.500 | 0.500 |" in (tmp_path / "pretraining_cells.md").read_text()


@pytest.fixture
def scored(monkeypatch):
    """What is scored, by name; every row predicts cells of zeros but those that are finetuned, which are perfect."""
    seen = {}

    def pretend(folder, conditions):
        table = pd.read_csv(conditions)
        heldout = ad.read_h5ad(folder.parents[3] / "atlas" / "heldout.h5ad")
        cells = heldout[heldout.obs.condition.isin(table.condition)].copy()
        if not folder.name.startswith("finetuned"):
            cells.X = cells.X * 0
        return cells

    true_scores = pretraining.score_models

    def keep(models, *arguments):
        seen.update(models)
        return true_scores(models, *arguments)

    monkeypatch.setattr(pretraining, "predict", pretend)
    monkeypatch.setattr(pretraining, "score_models", keep)
    return seen


def by_hand(folder: Path, gene: str, label: str) -> float:
    """Mean change of a gene over the files that have it and the label, from the files themselves."""
    changes = []
    for entry in yaml.safe_load((folder / "manifest.yaml").read_text())["files"]:
        cells = ad.read_h5ad(folder / entry["path"])
        x = pd.DataFrame(
            cells.X.toarray(), columns=cells.var[entry["gene_key"]] if "gene_key" in entry else cells.var_names
        )
        if entry["x"] == "counts":
            x = np.log1p(x.div(x.sum(axis=1), axis=0) * 1e4)
        labels = cells.obs[entry["perturbation_key"]].to_numpy()
        if gene in x and label in labels:
            changes.append(x.loc[labels == label, gene].mean() - x.loc[np.isin(labels, entry["control"]), gene].mean())
    assert changes
    return float(np.mean(changes))


def test_rows_of_an_atlas_get_equal_steps_and_no_held_out_cell(calls, scored, tmp_path, monkeypatch):
    folder = tmp_path / "atlas"
    call(monkeypatch, "--folder", folder, "--runs", tmp_path / "runs", "--output", tmp_path, "--quick")
    check_steps(calls)
    whole = tmp_path / "runs/atlas/whole.yaml"
    assert f"data.data.filename={folder / 'manifest.yaml'}" in calls["pretraining"]
    for name in ("finetuned", "narrowed"):
        assert f"data.data.filename={whole}" in calls[name]
        assert "data.narrowing={context:{cell_type:heldout},test:[G0,G4]}" in calls[name]
    split = pd.read_csv(tmp_path / "runs/atlas/context.csv", header=None, index_col=0)[1]
    obs = ad.read_h5ad(folder / "heldout.h5ad").obs
    assert set(split[obs.condition.isin(["G0", "G4"]).to_numpy()]) == {"test"}
    assert "test" not in set(split[~obs.condition.isin(["G0", "G4", "control"]).to_numpy()])
    assert open_atlas(whole).obs["cell_type"].value_counts()["heldout"] == len(obs)

    # Cells moved by at least 0 are not cut off at 0.
    moved, control = scored["additive"], scored["control"]
    shifts = {gene: by_hand(folder, gene, "G4") for gene in ("G4", "G1", "G2", "G3", "G7")}
    up = {gene: shift for gene, shift in shifts.items() if shift > 0}
    assert up
    for gene, shift in up.items():
        here = (control.obs.condition == "G4").to_numpy()
        found = moved[here, gene].X.toarray().mean() - control[here, gene].X.toarray().mean()
        assert found == pytest.approx(shift, abs=1e-5)

    rows = json.loads((tmp_path / "pretraining_atlas.json").read_text())["rows"]
    assert list(rows)[:4] == ["control", "training mean", "additive", "ceiling"]
    best = rows["pretrained, then finetuned on the narrowed cells"]["0"]
    assert best["cosine_logfc"] == pytest.approx(1)
    assert best["mmd_none"] < 1e-3 < rows["the context alone"]["0"]["mmd_none"]


def test_the_table_is_of_means_over_seeds():
    row = {str(seed): dict.fromkeys(pretraining.METRICS, value) for seed, value in enumerate([1.0, 2.0, 3.0])}
    assert "| a | 2.000 ± 1.000 |" in pretraining.as_markdown({"rows": {"a": row}})
