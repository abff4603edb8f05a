"""Every configuration composes, and every model in them takes a step."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import primeflow_perturbench.configs
from primeflow_perturbench.benchmark.embedded.modelcore.train import train

CONFIGS = Path(primeflow_perturbench.configs.__file__).parent


def names(group: str) -> list[str]:
    """Names of the configurations of a group, by glob."""
    found = [str(path.relative_to(CONFIGS / group).with_suffix("")) for path in (CONFIGS / group).rglob("*.yaml")]
    assert found, f"no configuration found in {group}"
    return sorted(found)


def compose(*overrides: str, folder: Path):
    """Composed train configuration that writes to a folder."""
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return hydra.compose("train", overrides=[*overrides, f"paths.output_dir={folder}", "run_name=test"])


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_without_a_gap(experiment, tmp_path, screen_path):
    given = [f"data.data.filename={screen_path}"]
    if "heldout" in experiment:
        given.append("data.splitter.split_path=split.csv")
    cfg = compose(f"experiment={experiment}", *given, folder=tmp_path)
    assert not OmegaConf.missing_keys(cfg)
    assert cfg.model._target_.startswith("primeflow_perturbench.")


@pytest.mark.parametrize("model", [name for name in names("model") if "/" not in name])
def test_every_model_takes_a_step_and_is_tested(model, tmp_path, screen_path):
    baseline = model in ("linear_additive", "latent_additive", "decoder_only")
    overrides = [
        f"data={'h5ad_controls' if baseline else 'h5ad'}",
        f"model={model}",
        f"data.data.filename={screen_path}",
        "data.loader.batch_size=4",
        "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=2",
        "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: false}]",
        "trainer.max_steps=1",
        "+trainer.limit_val_batches=1",
        "+trainer.enable_progress_bar=false",
        "~callbacks.progress_bar",
    ]
    if not baseline:
        overrides += ["model.solver.steps=1"]
    cfg = compose(*overrides, folder=tmp_path)
    done = train(cfg)
    assert done["trainer"].global_step == 1
    assert done["model"].summary_metrics.notna().all().all()


@pytest.mark.parametrize("network", names("model/network"))
def test_every_network_fits_the_model(network, tmp_path, screen_path):
    given = ["data=h5ad", f"data.data.filename={screen_path}", f"model/network={network}"]
    cfg = compose(*given, folder=tmp_path)
    built = hydra.utils.instantiate(cfg.model.network)(16, 5)
    assert sum(parameter.numel() for parameter in built.parameters()) > 0


@pytest.mark.parametrize("group", ["callbacks", "logger", "trainer", "data/splitter", "data/evaluation"])
def test_every_other_group_composes(group, tmp_path, screen_path):
    for name in names(group):
        where = group if "/" not in group else f"{group}"
        split = ["data.splitter.split_path=s.csv"] if name == "saved" else []
        given = ["data=h5ad", f"data.data.filename={screen_path}", *split]
        cfg = compose(*given, f"{where}={name}", folder=tmp_path)
        assert not OmegaConf.missing_keys(cfg)
