"""Settings ``challenge`` of a prediction: the steps that they ask for, applied to the cells of a model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import h5py
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.data.counts import Counts
from primeflow_perturbench.errors import InputError, counted, quoted
from primeflow_perturbench.evaluation.challenge.steps import ChallengeSteps
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.sampling.sampler import Block

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChallengeOutput:
    """Steps, and what they need to know of each condition of a table.

    Attributes
    ----------
    steps
        Steps from generated cells to the output.
    controls
        Whether each condition is the control, length N.
    targets
        Columns of the genes that each condition's perturbation is named after, length N.
    """

    steps: ChallengeSteps
    controls: list[bool]
    targets: list[list[int]]

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], context: Mapping[str, Any], labels: Sequence[str], model: Any
    ) -> "ChallengeOutput":
        """Output for conditions with these perturbations.

        Parameters
        ----------
        settings
            Settings of `challenge_settings`.
        context
            Training context of the model: names of columns and labels.
        labels
            Perturbation of each condition, length N.
        model
            A `PRiMeFlow`; its seed, genes and condition dropout are read.

        Raises
        ------
        InputError
            If a setting is out of range or cannot be met by the model or the file of measured controls.
        """
        steps = challenge_steps(settings, context, model.seed)
        if steps.control_guidance not in (None, 1) and model.objective.condition_dropout == 0:
            raise InputError(
                f"challenge.control_guidance={steps.control_guidance} needs a null condition: train with "
                "condition_dropout above 0"
            )
        delimiter, control = context["perturbation_combination_delimiter"], context["perturbation_control_value"]
        parts = [split_label(str(label), delimiter, control) for label in labels]
        targets, unknown = target_columns(parts, model.gene_names)
        if steps.knock_down and unknown:
            log.warning(
                f"knock-down leaves {counted(unknown, 'perturbation')} unchanged, because the model has no gene of "
                f"this name: {quoted(unknown)}"
            )
        return cls(steps, [not names for names in parts], targets)

    def stream(
        self, model: Any, condition: Condition, counts: np.ndarray, rows: Sequence[int] | None = None
    ) -> Iterator[Block]:
        """Blocks ``(place, first, cells)`` of a `PRiMeFlow`'s ``stream``, with every step taken.

        Parameters
        ----------
        model
            Model that generates the cells.
        condition
            Conditions (n).
        counts
            Number of cells of each, shape (n,).
        rows
            Their rows in the table, length n; ``None`` for the whole table.
        """
        rows = range(len(self.controls)) if rows is None else rows
        apart = self.steps.control_guidance is not None
        # Neighbors with equal guidance stay together, so that they share network evaluations.
        for is_control, run in groupby(range(len(counts)), key=lambda place: apart and self.controls[rows[place]]):
            places = list(run)
            with _guidance(model, self.steps.control_guidance if is_control else None):
                for block, first, cells in model.stream(condition[places], counts[places]):
                    place = places[block]
                    yield place, first, self.steps(cells, first, condition[[place]], self.targets[rows[place]])


@contextmanager
def _guidance(model: Any, guidance: float | None) -> Iterator[None]:
    """Let a model sample with another guidance strength; ``None`` keeps its own."""
    own = model.sampler
    model.sampler = own if guidance is None else replace(own, guidance=guidance)
    try:
        yield
    finally:
        model.sampler = own


def target_columns(parts: Sequence[Sequence[str]], gene_names: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Columns of the genes that each label's perturbations (N) are named after, and the names that no gene (G) has."""
    column = {str(gene): position for position, gene in enumerate(gene_names)}
    unknown = dict.fromkeys(name for names in parts for name in names if name not in column)
    return [[column[name] for name in names if name in column] for names in parts], list(unknown)


def challenge_settings(cfg: DictConfig, run: DictConfig) -> dict[str, Any]:
    """Settings ``challenge`` of a prediction: null takes that of the model's run, false and "none" become ``None``."""
    trained = OmegaConf.select(run, "challenge")
    trained = {} if trained is None else OmegaConf.to_container(trained, resolve=True)
    given = dict.fromkeys(trained) if cfg.challenge is None else OmegaConf.to_container(cfg.challenge, resolve=True)
    if unknown := [name for name in trained if name not in given]:
        raise InputError(f"the run's config.yaml sets the unknown challenge.{unknown[0]}; known are {', '.join(given)}")
    chosen = {name: trained.get(name) if value is None else value for name, value in given.items()}
    return {name: None if value is False or value == "none" else value for name, value in chosen.items()}


def challenge_steps(settings: Mapping[str, Any], context: Mapping[str, Any], seed: int) -> ChallengeSteps:
    """Steps for the settings of `challenge_settings`.

    Raises
    ------
    InputError
        If a setting is out of range, or a step needs measured controls whose file is missing or unsuitable.
    """
    round_to, counts = settings["round_to"], bool(settings["counts"])
    if round_to is not None and round_to != "controls" and not isinstance(round_to, int | float):
        raise InputError(f"challenge.round_to must be a library size, 'controls' or false, got {round_to!r}")
    sizes = library_sizes(settings, context) if counts or round_to == "controls" else None
    return ChallengeSteps(
        control_guidance=settings["control_guidance"],
        round_to=float(np.median(sizes)) if round_to == "controls" else round_to,
        target_sum=settings["target_sum"] or ChallengeSteps.target_sum,
        knock_down=bool(settings["knock_down"]),
        library_sizes=sizes if counts else None,
        seed=seed,
    )


def library_sizes(settings: Mapping[str, Any], context: Mapping[str, Any]) -> Tensor:
    """Library size of each control cell in the file ``challenge.controls_path``, shape (N,) float64.

    Raises
    ------
    InputError
        If the file, its layer, its column or its control cells are missing, or a value is not a count.
    """
    path, layer = settings["controls_path"], settings["counts_layer"]
    if path is None:
        raise InputError(
            "challenge.counts and challenge.round_to=controls need measured control cells; set "
            "challenge.controls_path=PATH to their h5ad, and challenge.counts_layer=NAME unless X holds their counts"
        )
    key, control = context["perturbation_key"], context["perturbation_control_value"]
    adata = read_h5ad(path, backed=True)
    obs, cells, genes = adata.obs, adata.obs_names, adata.var_names
    adata.file.close()
    if key not in obs:
        raise InputError(f"{path} has no obs column {key!r}; its columns are {quoted(obs.columns)}")
    controls = (obs[key].astype(str) == str(control)).to_numpy()
    if not controls.any():
        raise InputError(f"{path}: found no cell with {key} = {control!r}; give a file with control cells")
    with h5py.File(path, "r") as file:
        layers = list(file.get("layers", ()))
        if layer is not None and layer not in layers:
            raise InputError(
                f"{path} has no layer {layer!r}, its layers are {quoted(layers) or 'none'}; set challenge.counts_layer"
            )
        stored, place = (file["X"], "X") if layer is None else (file["layers"][layer], f"layer {layer!r}")
        blocks = Counts(stored, f"{path}, {place}", cells, genes, target_sum=1.0).blocks()
        totals = np.concatenate([np.asarray(b.counts.sum(axis=1, dtype=np.float64)).ravel() for b in blocks])
    return torch.from_numpy(totals[controls])
