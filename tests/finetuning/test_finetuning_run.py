"""Runs that finetune a checkpoint on other cells: what they report, freeze and resume."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config

from primeflow_perturbench.console import PlainConsole
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.finetuning.vocabulary_match import ReportFinetuning, report_lines
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.perturbench.embedded.errors import DataError
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.training.parameter_groups import check_finetuning, parameters_by_group
from primeflow_perturbench.training.schedule import warmup_cosine

SETTINGS = [
    "data=h5ad",
    "data/splitter=saved",
    "data.splitter.save=false",
    "data.loader.batch_size=64",
    "model=primeflow_small",
    "model/network=unet_patches_small",
    "model.network.channels=8",
    "model.network.multipliers=[1]",
    "model.sampler.calibrate=none",
    "model.lr=1e-2",
    "model.lr_scheduler.conf.warmup_steps=2",
    "trainer.val_check_interval=2",
    "+trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "~logger",
    "~callbacks.lr_monitor",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
    "callbacks.ema.decay=0.5",
    "callbacks.model_checkpoint.save_top_k=-1",
    "test=false",
]


def run(folder: Path, cells: Path, *overrides: str, callbacks=()) -> dict:
    cfg = compose_config(
        [
            *SETTINGS,
            f"data.data.filename={cells}",
            f"data.splitter.split_path={cells.with_suffix('.csv')}",
            f"paths.output_dir={folder}",
            *overrides,
        ]
    )
    return train(cfg, callbacks)


@pytest.fixture(scope="module")
def cells(screen_path, tmp_path_factory) -> dict[str, Path]:
    """Two cell lines for pretraining, and a third with other genes and one more perturbation."""
    folder, screen = tmp_path_factory.mktemp("cells"), ad.read_h5ad(screen_path)
    labels, lines = screen.obs["condition"].astype(str), screen.obs["cell_type"].astype(str)
    third = sorted(lines.unique())[-1]
    singles = ~labels.str.contains("+", regex=False)
    parts = {
        "atlas": screen[(lines != third) & singles & (labels != "G3"), :100],
        "context": screen[(lines == third) & singles, 30:],
    }
    paths = {}
    for name, part in parts.items():
        paths[name] = folder / f"{name}.h5ad"
        part.copy().write_h5ad(paths[name])
        split = pd.Series(np.arange(part.n_obs) % 5, index=part.obs_names).map({0: "val", 1: "test"}).fillna("train")
        split.to_csv(folder / f"{name}.csv", header=False)
    return paths


@pytest.fixture(scope="module")
def pretrained(cells, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run(folder, cells["atlas"], "trainer.max_steps=4")
    return folder / "checkpoints/last.ckpt"


def finetune(pretrained, *overrides):
    return [f"ckpt_path={pretrained}", "finetune=true", *overrides]


def genes_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("genes"))


@pytest.fixture(scope="module")
def finetuned(cells, pretrained, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finetuned")
    console = PlainConsole(file=(folder / "report.txt").open("w"), width=200)
    report = ReportFinetuning(folder, console)
    done = run(folder, cells["context"], *finetune(pretrained, "trainer.max_steps=6"), callbacks=[report])
    console.file.close()
    return folder, done


def test_a_run_prints_and_saves_what_it_takes_over(finetuned, cells):
    folder, _ = finetuned
    report = json.loads((folder / "finetune.json").read_text())
    old, new = (ad.read_h5ad(cells[name]).var_names.tolist() for name in ("atlas", "context"))
    assert report["genes"] == {"known": 70, "new": new[70:], "dropped": old[:30]}
    assert report["perturbations"]["new"] == ["G3"]
    assert report["covariates"]["cell_type"]["known"] == 0
    printed = (folder / "report.txt").read_text()
    assert f"genes: 70 known to the checkpoint; 28 new ({', '.join(new[70:80])}, ...); 30 dropped" in printed
    assert new[80] not in printed
    assert all(sentence in printed for sentence in report_lines(report))


def test_known_genes_keep_their_places(finetuned):
    assert genes_of(finetuned[1]["model"]).place_of_gene[:70].tolist() == list(range(30, 100))


def test_an_interrupted_finetuning_resumes_from_its_own_checkpoint(finetuned, cells, tmp_path):
    folder, _ = finetuned
    half = folder / "checkpoints/step4.ckpt"
    resumed = run(tmp_path, cells["context"], f"ckpt_path={half}", "trainer.max_steps=6")["model"]
    assert resumed.taken_over is None
    expected = torch.load(folder / "checkpoints/step6.ckpt", weights_only=False)
    found = torch.load(tmp_path / "checkpoints/step6.ckpt", weights_only=False)
    for part in ("state_dict", "current_model_state"):
        assert set(found[part]) == set(expected[part])
        assert all(torch.equal(found[part][name], value) for name, value in expected[part].items())
    assert not torch.equal(
        expected["state_dict"][name := "network.network.genes.read_in"],
        torch.load(half, weights_only=False)["state_dict"][name],
    )


def test_a_finetuned_model_with_free_places_is_loaded_and_shared(finetuned, tmp_path):
    folder, _ = finetuned
    model = PRiMeFlow.load_from_checkpoint(
        folder / "checkpoints/last.ckpt", evaluation=None, map_location="cpu", weights_only=False
    ).eval()
    assert genes_of(model).places > model.n_genes
    model.save_pretrained(tmp_path / "shared")
    shared = PRiMeFlow.from_pretrained(tmp_path / "shared")
    condition = model.encoder.null.expand(3)
    assert torch.equal(shared.generate(condition), model.generate(condition))


def test_frozen_groups_stay_fixed_and_others_train_at_their_rates(cells, pretrained, tmp_path):
    groups = ["finetuning={freeze: [genes], lr_factor: {trunk: 0.1}}"]
    before = run(tmp_path / "a", cells["context"], *finetune(pretrained, *groups, "train=true", "trainer.max_steps=2"))
    model, (optimizer,) = before["model"], before["trainer"].optimizers
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-2, 1e-3])
    expected = parameters_by_group(model)
    assert [group["params"] for group in optimizer.param_groups] == [expected["conditions"], expected["trunk"]]
    fresh = run(tmp_path / "b", cells["context"], *finetune(pretrained, "model.lr=0", "trainer.max_steps=1"))["model"]
    moved = {
        name: [not torch.equal(a, b) for a, b in zip(expected[name], parameters_by_group(fresh)[name], strict=True)]
        for name in expected
    }
    assert not any(moved["genes"])
    assert any(moved["conditions"])
    assert any(moved["trunk"])


def test_the_schedule_scales_the_rate_of_each_group():
    """Torch's cosine has one floor for all groups, to which the rate of a slower group would rise."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.05)]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_cosine(optimizer, 10, 100, final_fraction=0.1)
    alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = warmup_cosine(alone, 10, 100, final_fraction=0.1)
    for _ in range(100):
        for given, step in ((optimizer, schedule), (alone, expected)):
            given.step()
            step.step()
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(alone.param_groups[0]["lr"])
        assert second == pytest.approx(0.05 * first)
    assert first == pytest.approx(0.1)


def test_each_parameter_belongs_to_one_group(finetuned):
    groups = parameters_by_group(finetuned[1]["model"])
    every = [parameter for own in groups.values() for parameter in own]
    assert sorted(map(id, every)) == sorted(map(id, finetuned[1]["model"].parameters()))
    assert all(groups.values())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"freeze": ["gene"]}, "names the group 'gene', but the groups are genes, conditions, trunk"),
        ({"lr_factor": {"trunk": -1}}, "lr_factor.trunk must be at least 0, got -1"),
        ({"freeze": ["genes", "trunk"], "lr_factor": {"conditions": 0}}, "nothing is left to train"),
        ({"rates": {}}, "no setting 'rates'; it has freeze and lr_factor"),
    ],
)
def test_invalid_groups_are_rejected(given, sentence):
    with pytest.raises(InputError, match=sentence):
        check_finetuning(given)


def test_finetuning_needs_a_checkpoint(cells, tmp_path):
    with pytest.raises(DataError, match="finetune=true starts from a trained model: give ckpt_path=PATH"):
        run(tmp_path, cells["context"], "finetune=true")
