"""From a trained model to expression: sampling, detection limit and calibration."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from primeflow_perturbench.calibration.mapping import calibrated
from primeflow_perturbench.calibration.marginals import Targets
from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.expression.control_pool import ControlPool
from primeflow_perturbench.expression.detection_limit import decode_expression
from primeflow_perturbench.sampling.sampler import Block, Sampler
from primeflow_perturbench.sampling.settings import SamplingSettings

log = logging.getLogger(__name__)


@torch.no_grad()
def stream_cells(model: Any, condition: Condition, counts: Sequence[int], seed: int) -> Iterator[Block]:
    """Generate ``counts`` (N,) cells of conditions (N), block by block; see `Sampler.stream`.

    Parameters
    ----------
    model
        A `PRiMeFlow`.
    condition
        Conditions.
    counts
        Number of cells of each.
    seed
        Seed of the cells.

    Raises
    ------
    InputError
        If something that training learns is missing, a context has no control cells to start from, or the network
        generates values that are not finite.
    """
    settings, limit, condition = settled(model), detection_limit(model), condition.to(model.device)
    if settings.calibration == 0:
        raw = raw_cells(model, settings, condition, counts, seed)
        yield from ((row, first, decode_expression(values, limit)) for row, first, values in raw)
        return
    known = condition.is_known.cpu().numpy()
    made = np.where(known, np.maximum(counts, settings.calibration_cells), counts)
    raw = raw_cells(model, settings, condition, made, seed)
    aims = lambda row: targets(model, condition[[row]])  # noqa: E731
    yield from calibrated(raw, counts, aims, limit, settings.calibration_cells, settings.calibration)


def settled(model: Any) -> SamplingSettings:
    """The sampling settings of a model, with what held-out conditions decided in place of "auto".

    Raises
    ------
    InputError
        If training is to decide and has not.
    """
    settings = model.sampler
    if not settings.open:
        return settings
    if model.choice is None:
        raise InputError(
            "calibrate=auto and control_start=auto are decided in training: train first, or set "
            "model.sampler.calibrate and model.sampler.control_start"
        )
    return replace(settings, **{name: getattr(model.choice, name) for name in settings.open})


def raw_cells(
    model: Any, settings: SamplingSettings, condition: Condition, counts: Sequence[int], seed: int
) -> Iterator[Block]:
    """Stream generated values before the detection limit and calibration; see `stream_cells`."""
    from_controls = model.objective.source == "control" or settings.control_start is not None
    if model.objective.source == "control":
        control_pool(model).to(model.device).context_rows(condition)
    sampler = Sampler(
        model.velocity,
        model.conditions,
        model.space.width,
        model.encoder.null,
        settings.solver,
        guidance=settings.guidance,
        seed=seed,
        batch_size=model._batch_size,
        source=(lambda *draw: start_at_controls(model, settings, *draw)) if from_controls else None,
        encode_from=settings.control_start,
    )
    yield from finite(sampler.stream(condition, counts, model.space.decode))


def targets(model: Any, condition: Condition) -> Targets | None:
    """What calibration aims for in one condition; ``None`` if training lacks a perturbation of it.

    One at a time: the bits of a matrix product may depend on the number of rows.
    """
    if model.marginals is None:
        raise InputError("calibration is learned in training: train first, or set model.sampler.calibrate=none")
    if not bool(condition.is_known):
        return None
    return model.marginals.targets(condition.without_external(), detection_limit(model) or 0.0)


def finite(blocks: Iterator[Block]) -> Iterator[Block]:
    """Pass blocks on; raise `InputError` at the first value that is not finite."""
    for row, first, cells in blocks:
        if not torch.isfinite(cells).all():
            raise InputError(
                "the generated cells contain NaN or infinite values: training diverged; lower lr and train again"
            )
        yield row, first, cells


def detection_limit(model: Any) -> float | None:
    """The detection limit of a model's settings, in log1p units.

    Raises
    ------
    InputError
        If training is to learn it and has not.
    """
    if model.sampler.detection_limit != "learned":
        return model.sampler.detection_limit
    if model.learned_detection_limit is None:
        raise InputError("the detection limit is learned in training: train first, or set detection_limit=none")
    return model.learned_detection_limit


def control_pool(model: Any) -> ControlPool:
    """The control cells that training kept; `InputError` if it kept none."""
    if model.controls is None:
        raise InputError(
            "objective.source=control and sampler.control_start need control cells that training keeps: train with "
            "this setting first"
        )
    return model.controls


def start_at_controls(
    model: Any, settings: SamplingSettings, condition: Condition, n: int, generator: torch.Generator
) -> tuple[Tensor, Condition]:
    """Control cells (n, W) of the context of a condition (1), with noise, and the control condition that they have."""
    pool = control_pool(model).to(torch.device("cpu"))
    pick, noise = torch.rand(n, generator=generator), torch.randn(n, model.space.width, generator=generator)
    time = settings.control_start
    if time is None:
        cells = pool.draw(pool.context_rows(condition).expand(n), pick)
        return cells + model.objective.source_noise * noise, condition.as_control()
    row = pool.nearest_rows(condition)
    cells, origin = pool.draw(row.expand(n), pick), condition.as_control().moved(pool.contexts[row])
    return time * cells + (1 - time) * noise, origin


def generate_table(model: Any, batch: Any, obs: pd.DataFrame) -> ad.AnnData:
    """Generated cells of a batch, ``cells_per_condition`` of each condition or one of each row.

    Parameters
    ----------
    model
        A `PRiMeFlow`.
    batch
        PerturBench's batch of N rows.
    obs
        Covariates and perturbations of the rows.
    """
    rows, context = np.arange(len(obs)), model.training_record["train_context"]
    if (per_condition := model.sampler.cells_per_condition) is not None:
        columns = [*(context["covariate_keys"] or ()), context["perturbation_key"]]
        rows = np.repeat(np.flatnonzero(~obs[columns].duplicated().to_numpy()), per_condition)
    condition, obs = model.encoder(batch.perturbations, batch.covariates)[rows], obs.iloc[rows].copy()
    warn_uncalibrated(model, condition, obs[context["perturbation_key"]])
    cells = model.generate(condition)
    obs.index = [f"cell{index}" for index in range(len(obs))]
    if "_condition_idx" in obs:
        position = obs.groupby("_condition_idx", observed=True).cumcount()
        obs.index = [f"{c}_{i}" for c, i in zip(obs["_condition_idx"], position, strict=True)]
    names = model.gene_names or batch.gene_names
    return ad.AnnData(cells.numpy(), obs=obs, var=pd.DataFrame(index=pd.Index(names, dtype=str)))


def warn_uncalibrated(model: Any, condition: Condition, labels: Sequence[str]) -> None:
    """Warn once about each label (N,) whose condition (N) calibration does not cover."""
    if settled(model).calibration == 0:
        return
    known = condition.is_known.tolist()
    new = {str(label) for label, is_known in zip(labels, known, strict=True) if not is_known}
    new -= model.uncalibrated_labels
    if new:
        model.uncalibrated_labels |= new
        log.warning(
            "%d labels have perturbations that training lacks; their cells are generated without calibration: %s",
            len(new),
            quoted(sorted(new)),
        )
