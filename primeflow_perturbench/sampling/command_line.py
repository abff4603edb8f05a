"""Sampling settings of PerturBench's own commands, which ignore the model's settings once a checkpoint is given."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.backend import INSTALLED, backend
from primeflow_perturbench.sampling.settings import SamplingSettings

SAMPLER, SEEDS = "model.sampler.", ("model.seed", "seed")
# What PerturBench itself gives to a model that it loads.
TAKEN = ("model.lr", "model.lr_scheduler", "model/lr_scheduler")


def of_command_line(sampler: SamplingSettings, seed: int | None) -> tuple[SamplingSettings, int | None]:
    """The settings of a checkpoint with those that the command line of PerturBench's ``train`` or ``predict`` changes.

    Raises
    ------
    InputError
        If ``predict`` is given another setting of the model, which would have no effect.
    """
    changes = OmegaConf.create()
    for override in loading_overrides():
        key = override.key_or_group
        if key.startswith(SAMPLER):
            OmegaConf.update(changes, key.removeprefix(SAMPLER), override.value())
        elif key in SEEDS:
            seed = override.value()
        elif key.startswith(("model.", "model/")) and not key.startswith(TAKEN):
            raise InputError(
                f"{override.input_line} has no effect, because the settings of the model come from the checkpoint; "
                f"remove it, or change the settings of {SAMPLER.rstrip('.')}"
            )
    return sampler.change(OmegaConf.to_container(changes)), seed


def loading_overrides() -> list:
    """Overrides of the running command, if it is PerturBench's and loads a checkpoint; otherwise none."""
    if backend() != INSTALLED or not HydraConfig.initialized():
        return []
    config = HydraConfig.get()
    main = next((source.path for source in config.runtime.config_sources if source.provider == "main"), "")
    root = Path(find_spec(INSTALLED).submodule_search_locations[0])
    if main != f"{INSTALLED}.configs" and Path(main).resolve() != (root / "configs").resolve():
        return []
    overrides = OverridesParser.create().parse_overrides(list(config.overrides.task))
    if not any(override.key_or_group == "ckpt_path" and override.value() for override in overrides):
        return []
    # A command that trains on or tests repeats the settings of its run.
    predicts = Path(config.job.config_name).stem == "predict"
    return [override for override in overrides if predicts or override.key_or_group.startswith((SAMPLER, *SEEDS))]
