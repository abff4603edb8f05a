"""The benchmark of streaming: what its figures are made of."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import atlas


def test_steps_that_warm_up_or_stand_beside_a_checkpoint_are_not_timed():
    """Steps take a second, those at a checkpoint's end or after it, and the first ones, a hundred."""
    clock, now = atlas.Clock(), 0.0
    for step in range(30):
        now += 1.0 if step >= atlas.WARM_UP and step % 10 not in (9, 0) else 100.0
        clock.ends.append(now)
    assert clock.seconds(every=10) == 1.0


def test_the_same_batches_come_as_often_as_the_loader_has_batches():
    repeated = atlas.Repeated(range(20))
    assert len(repeated) == 20
    assert list(repeated) == [number % atlas.REPEATED for number in range(20)]
    assert list(repeated) == list(repeated)


def test_the_loader_alone_is_counted_by_the_cell():
    batches = [SimpleNamespace(gene_expression=torch.zeros(10, 2))] * 4
    module = SimpleNamespace(train_dataloader=lambda: batches)
    calls = []
    speed = atlas.loader_speed(SimpleNamespace(train_dataloader=lambda: calls.append(1) or batches), 0.05)
    assert speed > 1000
    assert len(calls) > 1, "as many epochs as the time takes"
    assert atlas.loader_speed(module, 0.0) == 0


@pytest.mark.parametrize("changed", [False, True])
def test_checkpoints_are_compared_to_the_bit(tmp_path, changed):
    weights = {"w": torch.ones(3)}
    for name, value in (("a", 1.0), ("b", 1.0 + 1e-6 * changed)):
        parts = {"state_dict": weights, "current_model_state": {"w": torch.full((3,), value)}}
        torch.save(parts, tmp_path / name)
    assert atlas.same_weights(tmp_path / "a", tmp_path / "b") is not changed


def test_the_figures_come_from_the_runs(tmp_path, monkeypatch):
    (tmp_path / "manifest.yaml").touch()
    asked = []

    def in_child(manifest, folder, quick, *flags):
        asked.append(flags[:1])
        figures = {"peak_gib": 2.0, "step_seconds": 0.5, "loader_cells_per_second": 12_800.0}
        return figures | ({"step_seconds": 0.45} if "--repeated" in flags else {})

    monkeypatch.setattr(atlas, "in_child", in_child)
    monkeypatch.setattr(atlas, "same_weights", lambda a, b: (a.parts[-3], b.parts[-3]) == ("unbroken", "killed"))
    found = atlas.measure(tmp_path, atlas.FULL, quick=False)
    assert asked == [(), ("--kill",), ("--resume",), ("--repeated",)]
    assert found["resumed_equal"]
    # 128 cells take 0.01 s to load, of 0.5 s.
    assert found["loading_share"] == pytest.approx(0.02)
    assert found["slowdown"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("flags", "code", "fine"),
    [((), 0, True), ((), 1, False), (("--kill",), -signal.SIGKILL, True), (("--kill",), 0, False)],
)
def test_a_run_that_ends_otherwise_than_it_should_is_an_error(tmp_path, monkeypatch, flags, code, fine):
    (tmp_path / "run.json").write_text(json.dumps({"peak_gib": 1.0}))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code, stderr="why"))
    if fine:
        assert atlas.in_child(tmp_path, tmp_path, True, *flags) == ({} if flags else {"peak_gib": 1.0})
    else:
        with pytest.raises(RuntimeError, match="why"):
            atlas.in_child(tmp_path, tmp_path, True, *flags)
