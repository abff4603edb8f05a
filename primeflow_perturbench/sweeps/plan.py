"""What a sweep is to run: Hydra's override grammar expanded into trials, each with what it shares with others."""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from primeflow_perturbench.errors import InputError

# Settings that act when cells are generated and scored: trials that differ in these alone share a training.
SAMPLING = (
    "test",
    "references",
    "check",
    "data.evaluation",
    "data.prediction",
    "model.guidance",
    "model.guidance_interval",
    "model.solver",
    "model.detection_limit",
    "model.calibrate",
    "model.calibration_cells",
    "model.cells_per_condition",
    "model.sample_batch_size",
)
# Settings that change nothing about a result.
NAMES = ("run_name", "task_name", "paths.output_dir", "sweep", "objective", "logger", "callbacks.progress_bar")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Parameters
    ----------
    sweep, label, seed
        What it is called.
    shown
        Swept settings and their values, without the seed.
    overrides
        Everything that Hydra needs to compose it.
    folder
        Where it runs.
    training, whole
        Digests of the settings that decide its training, and its result.
    shares
        Whether it trains and tests, so that its training can be shared.
    calibrate
        The model's setting of that name, for whose sake training learns more; "none" where it has none.
    """

    sweep: str
    label: str
    seed: int
    shown: Mapping[str, Any]
    overrides: tuple[str, ...]
    folder: Path
    training: str
    whole: str
    shares: bool
    calibrate: str


def expand(arguments: Sequence[str], output: Path) -> list[Trial]:
    """Trials that a command line asks for.

    Parameters
    ----------
    arguments
        Overrides in Hydra's grammar; several values sweep. Keys of ``hydra`` are none of a trial's and not allowed.
    output
        Folder of all sweeps.

    Raises
    ------
    InputError
        If the overrides do not parse or compose, or leave a setting open that must be given.
    """
    with _hydra(output) as expansion:
        trials = list(expansion.of_command(arguments))
    return list({trial.folder: trial for trial in trials}.values())


def command_choices(arguments: Sequence[str], hydra: Sequence[str]) -> tuple[str, str]:
    """Name of what a command line sweeps, and the sweeper of Hydra's that it or its experiment chooses.

    Raises
    ------
    InputError
        If the overrides do not parse or compose.
    """
    with _hydra() as expansion:
        axes = expansion.axes(arguments)
        cfg = expansion.compose([values[0] for values in axes.values()])
        sweeper = [override.partition("=")[2] for override in hydra if override.startswith("hydra/sweeper=")]
        choices = cfg.hydra.runtime.choices
        names = [value.partition("=")[2] for value in axes.get("experiment", [])] or [str(choices.model)]
        name = names[0] if len(names) == 1 else "+".join(name.replace("/", "-") for name in names)
        return name, [str(choices["hydra/sweeper"]), *sweeper][-1]


@contextmanager
def _hydra(output: Path = Path()) -> Iterator["_Expansion"]:
    """Expansion of commands, with Hydra's faults as sentences."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
            yield _Expansion(output)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error


class _Expansion:
    """Expands commands, with Hydra initialised; composes no configuration twice."""

    def __init__(self, output: Path):
        self.output = output
        self.parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def of_command(self, arguments: Sequence[str], weak: Collection[str] = ()) -> Iterator[Trial]:
        """Trials of a command, of each of its experiments in turn; ``weak`` keys give way to what one sweeps."""
        axes = self.axes(arguments)
        for experiment in axes.pop("experiment", [None]):
            chosen = {} if experiment is None else {"experiment": [experiment]}
            cfg = self.compose([values[0] for values in {**chosen, **axes}.values()])
            parts = (cfg.get("sweep") or {}).get("experiments")
            if not parts:
                yield from self.of_experiment({**chosen, **axes}, axes, cfg, weak)
                continue
            common = cfg.sweep.get("overrides") or []
            for name, own in parts.items():
                given = {**self.axes([*common, *(own or [])]), **axes}
                flat = [f"experiment={name}", *self.written(given)]
                yield from self.of_command(flat, set(self.axes(common)) - set(self.axes(own or [])) - set(axes))

    def of_experiment(
        self, given: dict[str, list[str]], command: dict[str, list[str]], cfg: DictConfig, weak: Collection[str]
    ) -> Iterator[Trial]:
        """Trials of one experiment: its swept parameters and variants, under what the command line says."""
        params = cfg.hydra.sweeper.get("params") or {}
        swept = self.axes([f"{key}={value}" for key, value in params.items()])
        given = {key: values for key, values in given.items() if not (key in weak and key in swept)}
        variants = OmegaConf.to_container(cfg.sweep, resolve=True).get("variants") if cfg.get("sweep") else None
        found, parsed = False, [self.axes(variant) for variant in variants or [[]]]
        for own in parsed:
            # A command line narrows the choice of a variant, and replaces any other.
            narrowed = {key: [value for value in own[key] if value in command[key]] for key in own if key in command}
            if not all(narrowed.values()):
                continue
            found = True
            axes = {**swept, **given, **own, **narrowed}
            told = [key for key in own if len({tuple(each[key]) for each in parsed if key in each}) > 1]
            varied = [key for key, values in axes.items() if key in told or key in swept or len(values) > 1]
            for combination in itertools.product(*axes.values()):
                yield self.trial(dict(zip(axes, combination, strict=True)), varied)
        if not found:
            raise InputError(f"no trial of this experiment has {' '.join(self.written(command))}; drop one of them")

    def trial(self, overrides: dict[str, str], varied: Sequence[str]) -> Trial:
        """The trial of some overrides by key, called by the varied ones."""
        cfg = self.compose([text for key, text in overrides.items() if key != "seed"])
        seed = int(self.value(overrides["seed"])) if "seed" in overrides else int(cfg.seed)
        settings = plain(cfg)
        for key in missing(settings):
            raise InputError(f"{key} must be given: add {key}=VALUE")
        shown = {key.lstrip("+"): self.value(overrides[key]) for key in varied if key != "seed"}
        label = ", ".join(
            str(value) if key == "model" else f"{re.split('[./]', key)[-1]}={value}" for key, value in shown.items()
        )
        choices = cfg.hydra.runtime.choices
        sweep = str(choices.get("experiment") or choices.model)
        texts = tuple(overrides.values())
        return Trial(
            sweep=sweep,
            label=label or str(choices.model),
            seed=seed,
            shown=shown,
            overrides=texts,
            folder=self.output / sweep / folder_name({**shown, "seed": seed}, texts),
            training=digest([without(settings, SAMPLING), seed]),
            whole=digest([settings, seed]),
            shares=bool(cfg.train and cfg.test and cfg.ckpt_path is None),
            calibrate=str((settings.get("model") or {}).get("calibrate", "none")),
        )

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Configuration of some overrides, Hydra's own node with it."""
        key = tuple(overrides)
        if key not in self.composed:
            self.composed[key] = compose("train", list(overrides), return_hydra_config=True)
        return self.composed[key]

    def axes(self, arguments: Iterable[str]) -> dict[str, list[str]]:
        """Overrides by key, the values of each as overrides of their own; of equal keys the last counts."""
        found: dict[str, list[str]] = {}
        for override in self.parser.parse_overrides(list(arguments)):
            key = override.get_key_element()
            found.pop(key, None)
            found[key] = self.choices(key, override)
        return found

    @staticmethod
    def choices(key: str, override: Override) -> list[str]:
        """An override for each value that an override sweeps over."""
        if not override.is_sweep_override():
            return [override.input_line]
        if not override.is_discrete_sweep():
            raise InputError(f"{override.input_line} is an interval, which only a search takes: list values instead")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]

    @staticmethod
    def written(axes: Mapping[str, Sequence[str]]) -> list[str]:
        """Overrides by key as arguments of a command line."""
        return [
            values[0] if len(values) == 1 else f"{key}=" + ",".join(value.partition("=")[2] for value in values)
            for key, values in axes.items()
        ]

    def value(self, override: str) -> Any:
        """Value of one override, as JSON knows it."""
        value = self.parser.parse_override(override).value()
        if isinstance(value, QuotedString):
            return value.text
        return value if isinstance(value, str | int | float | bool | None) else override.partition("=")[2]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Settings that decide a result, with interpolations as they are written and without the seed."""
    settings = OmegaConf.to_container(cfg, resolve=False)
    settings.pop("hydra")
    settings.pop("seed")
    return without(settings, NAMES)


def without(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of nested settings without some, named by dotted keys."""
    # 1 and 1.0 are one setting.
    copied = json.loads(json.dumps(settings), parse_int=float)
    for key in keys:
        *parents, last = key.split(".")
        node = copied
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    return copied


def missing(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of settings that are left for the command line to give."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def digest(content: Any) -> str:
    """Short hexadecimal digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(shown: Mapping[str, Any], overrides: Iterable[str]) -> str:
    """Readable and stable name: the swept settings, then a digest of all overrides in any order."""
    parts = [f"{re.split('[./]', key)[-1]}-{value}" for key, value in shown.items()]
    readable = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
    return f"{readable[:80]}_{digest(sorted(overrides))}"


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
