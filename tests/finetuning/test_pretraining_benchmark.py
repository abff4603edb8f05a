"""The benchmark of pretraining: which cells its rows may see, and what its table says."""

import json
import sys
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import pretraining  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """Overrides of the runs by folder; nothing is trained, and every table holds the number of its run."""
    made = {}

    def pretend(folder, overrides):
        made[f"{folder.parent.name}/{folder.name}"] = overrides
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"PRiMeFlow": len(made)} | ({"control": 0.5} if "references=[]" not in overrides else {})
        pd.DataFrame(columns, index=pretraining.METRICS).to_csv(folder / "table.csv")
        (folder / "environment.json").write_text('{"seconds": 1.0}')
        return folder / "checkpoints" / "last.ckpt"

    monkeypatch.setattr(pretraining, "run", pretend)
    return made


def test_rows_get_equal_steps_and_no_held_out_cell(calls, tmp_path, monkeypatch):
    given = ["x", "--runs", tmp_path, "--output", tmp_path, "--quick"]
    monkeypatch.setattr(pretraining, "SCREEN", pretraining.QUICK_SCREEN)
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    pretraining.main()
    runs = {name.split("/")[1]: overrides for name, overrides in calls.items()}
    steps = {name: next(int(o.split("=")[1]) for o in own if "max_steps" in o) for name, own in runs.items()}
    assert steps == {"context": 6, "narrowed": 6, "pretraining": 4, "pretrained": 1, "finetuned": 2}
    assert [name for name, own in runs.items() if "+finetune=true" in own] == ["pretrained", "finetuned"]
    assert "model.lr=0" in runs["pretrained"]

    folder = tmp_path / "simulated"
    obs = ad.read_h5ad(folder / "screen.h5ad").obs
    splits = {path.stem: pd.read_csv(path, header=None, index_col=0)[1] for path in folder.glob("splits/*.csv")}
    here = (obs.cell_type == "epsilon").to_numpy()
    tested = obs.condition.isin(["G0", "G2", "G4"]).to_numpy()
    assert splits["pretraining"][here].isna().all()
    assert not (splits["pretraining"][~here]).isna().any()
    for name in ("narrowed", "context"):
        assert set(splits[name][here & tested]) == {"test"}
    assert set(splits["narrowed"][~here & tested]) == {"train"}
    assert splits["context"][~here].isna().all()

    result = json.loads((tmp_path / "pretraining_simulated.json").read_text())
    assert result["rows"]["pretrained, then finetuned"]["0"] == dict.fromkeys(pretraining.METRICS, 5)
    assert "| control | 0.500 | 0.500 | 0.500 | 0.500 |" in (tmp_path / "pretraining_simulated.md").read_text()


def test_the_table_is_of_means_over_seeds():
    row = {str(seed): dict.fromkeys(pretraining.METRICS, value) for seed, value in enumerate([1.0, 2.0, 3.0])}
    assert "| a | 2.000 ± 1.000 |" in pretraining.as_markdown({"rows": {"a": row}})
