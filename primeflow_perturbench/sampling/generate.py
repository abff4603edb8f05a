"""From a trained model to expression: sampling, detection limit and calibration."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primeflow_perturbench.calibration.mapping import calibrated
from primeflow_perturbench.calibration.marginals import Targets
from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool
from primeflow_perturbench.expression.detection_limit import decode_expression
from primeflow_perturbench.sampling.sampler import Block, Sampler


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
    settings, limit, condition = model.sampler, detection_limit(model), condition.to(model.device)
    from_controls = model.objective.source == "control"
    if from_controls:
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
        source=(lambda *draw: start_at_controls(model, *draw)) if from_controls else None,
    )
    if settings.calibrate == "none":
        decode = lambda z: decode_expression(model.space.decode(z), limit)  # noqa: E731
        yield from finite(sampler.stream(condition, counts, decode))
        return
    if model.marginals is None:
        raise InputError("calibration is learned in training: train first, or set model.sampler.calibrate=none")
    known = condition.is_known.cpu().numpy()
    made = np.where(known, np.maximum(counts, settings.calibration_cells), counts)

    def targets(row: int) -> Targets | None:
        # One row at a time: the bits of a matrix product may depend on the number of rows.
        return model.marginals.targets(condition[[row]].without_external(), limit or 0.0) if known[row] else None

    raw = finite(sampler.stream(condition, made, model.space.decode))
    yield from calibrated(raw, counts, targets, limit, settings.calibration_cells)


def finite(blocks: Iterator[Block]) -> Iterator[Block]:
    """Pass blocks on; raise `InputError` at the first value that is not finite."""
    for row, first, cells in blocks:
        if not torch.isfinite(cells).all():
            raise InputError("the generated cells contain NaN or infinite values: training diverged; lower lr and train again")
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
        raise InputError("source=control starts at control cells that training keeps: train first")
    return model.controls


def start_at_controls(model: Any, condition: Condition, n: int, generator: torch.Generator) -> Tensor:
    """Control cells (n, W) of the context of a condition (1), with noise."""
    pool = control_pool(model).to(torch.device("cpu"))
    pick, noise = torch.rand(n, generator=generator), torch.randn(n, model.space.width, generator=generator)
    return pool.draw(pool.context_rows(condition).expand(n), pick) + model.objective.source_noise * noise
