"""The settings ``challenge`` of a prediction: which steps are taken, and the measured controls that they need."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from primeflow_perturbench.conditions.table import split_parts
from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.data.counts import Counts
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.evaluation.challenge.cells import ChallengeSteps, strange_targets, target_columns
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.sampling.sampler import Block

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChallengeOutput:
    """The steps, and what they need to know of each condition of a table.

    Attributes
    ----------
    steps
        What is done to the cells.
    controls
        Whether each condition is a control, length N.
    targets
        Columns of the genes that each condition's perturbation is named after, length N.
    """

    steps: ChallengeSteps
    controls: list[bool]
    targets: list[list[int]]

    @classmethod
    def of(cls, settings: Mapping[str, Any], context: Mapping[str, Any], labels: Sequence[str], model: PRiMeFlow):
        """The output that `challenge_settings` ask for, of conditions with these perturbations, length N."""
        steps = challenge_steps(settings, context, model.seed)
        if steps.control_guidance not in (None, 1) and model.condition_dropout == 0:
            raise InputError(
                f"challenge.control_guidance={steps.control_guidance} needs a null condition: train with "
                "condition_dropout above 0"
            )
        targets, strange = target_columns(labels, model.gene_names, context)
        if steps.knock_down and strange:
            log.warning(strange_targets(strange))
        return cls(steps, [not split_parts(str(label), context) for label in labels], targets)

    def stream(
        self, model: PRiMeFlow, condition: Tensor, counts: np.ndarray, rows: Sequence[int] | None = None
    ) -> Iterator[Block]:
        """Blocks ``(place, first, cells)`` of some rows of the table, all if ``None``."""
        rows = range(len(self.controls)) if rows is None else rows

        def stream(condition: Tensor, counts: np.ndarray, guidance: float | None) -> Iterator[Block]:
            with guided(model, guidance):
                yield from model.stream(condition, counts)

        controls, targets = [self.controls[row] for row in rows], [self.targets[row] for row in rows]
        return self.steps.stream(stream, condition, counts, controls, targets)


@contextmanager
def guided(model: PRiMeFlow, guidance: float | None) -> Iterator[None]:
    """A model that samples at another strength of guidance; ``None`` leaves its own."""
    usual = model.guidance
    model.guidance = usual if guidance is None else guidance
    try:
        yield
    finally:
        model.guidance = usual


def challenge_settings(cfg: DictConfig, run: DictConfig) -> dict[str, Any]:
    """The prediction's settings ``challenge``, where they are null those of the model's run, where off ``None``."""
    given = OmegaConf.to_container(cfg.challenge, resolve=True)
    trained = OmegaConf.select(run, "challenge")
    trained = {} if trained is None else OmegaConf.to_container(trained, resolve=True)
    unknown = [name for name in trained if name not in given]
    if unknown:
        raise InputError(f"the run's config.yaml sets challenge.{unknown[0]}; known are {', '.join(given)}")
    chosen = {name: trained.get(name) if value is None else value for name, value in given.items()}
    return {name: None if value is False or value == "none" else value for name, value in chosen.items()}


def challenge_steps(settings: Mapping[str, Any], context: Mapping[str, Any], seed: int) -> ChallengeSteps:
    """The steps that the settings ask for.

    Parameters
    ----------
    settings
        From `challenge_settings`.
    context
        Training context of the model, for the columns of the file of measured controls.
    seed
        Seed of raw counts.

    Raises
    ------
    InputError
        If a setting is out of range, or a step needs measured controls and their file is not named or not fit.
    """
    round_to, counts = settings["round_to"], bool(settings["counts"])
    if round_to is not None and round_to != "controls" and not isinstance(round_to, int | float):
        raise InputError(f"challenge.round_to must be a number of counts, 'controls' or false, got {round_to!r}")
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
    """Counts of each control cell of the file ``challenge.controls_path``, shape (N,), float64.

    Raises
    ------
    InputError
        If there is no such file, layer, column or control, or a value is no count.
    """
    path, layer = settings["controls_path"], settings["counts_layer"]
    if path is None:
        raise InputError(
            "challenge.counts and challenge.round_to=controls need measured control cells; give "
            "challenge.controls_path=PATH of their h5ad, and challenge.counts_layer=NAME where X are not their counts"
        )
    key, control = context["perturbation_key"], context["perturbation_control_value"]
    adata = read_h5ad(path, backed=True)
    obs, cells, genes = adata.obs, adata.obs_names, adata.var_names
    adata.file.close()
    if key not in obs:
        raise InputError(
            f"{path} has no obs column {key!r}; its columns are {quoted(obs.columns)}, name one of them {key!r}"
        )
    controls = (obs[key].astype(str) == str(control)).to_numpy()
    if not controls.any():
        raise InputError(f"{path}, obs column {key!r} has no cell labelled {control!r}; give a file with control cells")
    with h5py.File(Path(path), "r") as file:
        layers = list(file.get("layers", ()))
        if layer is not None and layer not in layers:
            has = quoted(layers) or "none"
            raise InputError(f"{path} has no layer {layer!r}, its layers are {has}; set challenge.counts_layer")
        stored = file["X"] if layer is None else file["layers"][layer]
        place = f"{path}, X" if layer is None else f"{path}, layer {layer!r}"
        blocks = Counts(stored, place, cells, genes, target_sum=1.0).blocks()
        totals = np.concatenate([np.asarray(b.counts.sum(axis=1, dtype=np.float64)).ravel() for b in blocks])
    return torch.from_numpy(totals[controls])
