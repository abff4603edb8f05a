"""Decide on held-out conditions what no training loss shows: how far to calibrate, and where cells start.

`SamplingSettings.calibrate` and `control_start` may be "auto". A run then generates conditions that it has not trained
on in every way that is open, and takes the way with the smallest mean energy distance. These conditions are those that
only the validation split has. Where it has none, a short pilot training leaves some training conditions out. With too
few conditions for that, calibration goes half of the way: the average of two predictions whose errors differ is hard to
beat (Bates and Granger 1969).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from primeflow_perturbench.calibration.mapping import MarginalMap
from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.conditions.condition import Condition, joined
from primeflow_perturbench.expression.detection_limit import decode_expression
from primeflow_perturbench.expression.statistics import MarginalStatistics, TrainingStatistics
from primeflow_perturbench.sampling.generate import detection_limit, raw_cells, targets
from primeflow_perturbench.sampling.settings import SamplingSettings

# Time at which control cells enter, if they are to enter, and shares of the way that calibration may go.
CONTROL_START = 0.5
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Most held-out conditions that are generated, and cells of each.
MOST_CONDITIONS, CELLS = 12, 128
# Fewest perturbed conditions for a pilot training, share of them that it leaves out, maximum number of its steps, cells
# of a step, and maximum number of training cells that it sees.
FEWEST, LEFT_OUT, STEPS, BATCH, MOST_CELLS = 10, 0.2, 400, 128, 20_000
# Share of the way that calibration goes if nothing can decide.
HALF = 0.5
SEED = 0

Way = tuple[float, float | None]
HeldOut = list[tuple[Condition, Tensor]]


@dataclass(frozen=True)
class Choice:
    """What held-out conditions decided.

    Attributes
    ----------
    calibrate, control_start
        The settings with the smallest energy distance.
    energy
        Mean energy distance in gene space over the held-out conditions, by description of the settings.
    held_out_by
        What held the conditions out.
    conditions
        Number of held-out conditions.
    """

    calibrate: float
    control_start: float | None
    energy: Mapping[str, float]
    held_out_by: str
    conditions: int

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Choice | None":
        """What a checkpoint holds; ``None`` if nothing was open in its training."""
        found = checkpoint.get("primeflow", {}).get("choice")
        return None if found is None else cls(**found)

    @classmethod
    def best(cls, scores: Mapping[Way, Sequence[float]], held_out_by: str) -> "Choice":
        """The way with the smallest mean among the energy distances of the same conditions; the first of equals."""
        means = {way: sum(values) / len(values) for way, values in scores.items()}
        best = min(means, key=lambda way: means[way])
        energy = {described(*way): round(mean, 6) for way, mean in means.items()}
        return cls(*best, energy, held_out_by, len(scores[best]))

    def sentence(self) -> str:
        """What was chosen, and why."""
        chosen = described(self.calibrate, self.control_start)
        if not self.energy:
            return f"Cells are generated {chosen}; no condition could be held out to compare."
        best, plain = min(self.energy.values()), self.energy.get(described(0, None))
        basis = f"{self.conditions} conditions held out by {self.held_out_by} have the energy distance {best:.3g}"
        return f"Cells are generated {chosen}: {basis}" + (
            f", against {plain:.3g} of the flow alone." if plain else "."
        )


def described(calibrate: float, control_start: float | None) -> str:
    """A way of sampling in words."""
    start = "from noise" if control_start is None else "from control cells"
    return start if calibrate == 0 else f"{start}, calibrated by {calibrate:.0%}"


def ways(settings: SamplingSettings, has_controls: bool) -> list[Way]:
    """The ways of sampling that settings leave open, the simplest first.

    ``has_controls`` says whether cells can start from control cells.
    """
    starts = [settings.control_start]
    if settings.control_start == "auto":
        starts = [None, CONTROL_START] if has_controls else [None]
    shares = SHARES if settings.calibrate == "auto" else [settings.calibration]
    return [(share, start) for start in starts for share in shares]


def can_start(model: Any) -> bool:
    """Whether a model has control cells and a flow from noise that can encode them."""
    return model.controls is not None and model.objective.source == "gaussian"


def energy_distance(x: Tensor, y: Tensor) -> float:
    """E|u - v| - E|u - u'| / 2 - E|v - v'| / 2 of cells (n, G) and (m, G), Szekely and Rizzo (2013)."""
    between, within_x, within_y = (torch.cdist(a, b).double().mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(between - within_x / 2 - within_y / 2)


def prepare(model: Any, statistics: TrainingStatistics) -> None:
    """Find what validation holds out, as ``model.held_out``, or decide by pilot trainings if that is nothing.

    Parameters
    ----------
    model
        A `PRiMeFlow` with a trainer, before its first step.
    statistics
        Statistics of its training cells, with at least `MOST_CELLS` of them.
    """
    # Data loaders and pilot trainings draw random numbers, which must not change those of the training.
    with torch.random.fork_rng(devices=[]):
        seen = statistics.marginals.expression.keys if statistics.marginals else set()
        validation = validation_cells(model)
        model.held_out = [] if validation is None else held_out(*validation, seen)
        if model.held_out or model.choice is not None:
            return
        condition, cells = statistics.first(MOST_CELLS)
        model.choice = pilot_choice(model, condition, cells) if model.global_rank == 0 else None
    model.choice = model.trainer.strategy.broadcast(model.choice)


def validation_cells(model: Any) -> tuple[Condition, Tensor] | None:
    """Conditions and expression (n, G) of the first `MOST_CELLS` validation cells of this process, if there are any."""
    if not is_overridden("val_dataloader", model.trainer.datamodule):
        return None
    conditions, cells = [], []
    for batch in model.trainer.datamodule.val_dataloader():
        conditions.append(model.encoder(batch.perturbations, batch.covariates).to("cpu"))
        cells.append(batch.gene_expression.cpu())
        if sum(map(len, cells)) >= MOST_CELLS:
            break
    return (joined(conditions), torch.cat(cells)) if cells else None


def decide(model: Any) -> None:
    """Decide anew on the conditions that validation holds out."""
    found = Choice.best(energies(model, model.held_out), "validation") if model.global_rank == 0 else None
    model.choice = model.trainer.strategy.broadcast(found)


def ensure(model: Any) -> None:
    """Decide on the conditions that validation holds out if no validation has done so yet."""
    if model.held_out and model.choice is None:
        decide(model)


@torch.no_grad()
def energies(model: Any, held: HeldOut) -> dict[Way, list[float]]:
    """Energy distance of generated cells to each held-out condition, by way of sampling.

    Parameters
    ----------
    model
        A `PRiMeFlow` that has not trained on the conditions.
    held
        Conditions (1) and measured cells (n, G) of each.
    """
    condition = joined([one for one, _ in held]).to(model.device)
    limit, scores = detection_limit(model), {}
    for start, of_start in groupby(ways(model.sampler, can_start(model)), key=itemgetter(1)):
        shares = [share for share, _ in of_start]
        settings = replace(model.sampler, control_start=start)
        blocks = raw_cells(model, settings, condition, [CELLS] * len(condition), SEED)
        for row, of_row in groupby(blocks, key=itemgetter(0)):
            values = torch.cat([values for _, _, values in of_row])
            for share in shares:
                aims = targets(model, condition[[row]]) if share else None
                if aims is None:
                    cells = decode_expression(values, limit)
                else:
                    cells = MarginalMap.toward(values, aims, share, limit)(values)
                scores.setdefault((share, start), []).append(energy_distance(cells, held[row][1]))
    return scores


def held_out(condition: Condition, cells: Tensor, seen: Collection[bytes]) -> HeldOut:
    """The perturbed conditions among those of cells (n, G) that are not among ``seen``, with cells of each.

    Conditions with a perturbation that training lacks do not count. At most `MOST_CONDITIONS`, those with most cells.
    """
    rows = rows_by_condition(condition)
    counted = ~condition.is_control & condition.is_known
    new = [found for key, found in rows.items() if key not in seen and counted[found[0]]]
    largest = sorted(new, key=len, reverse=True)[:MOST_CONDITIONS]
    return [(condition[found[:1]], cells[found[:CELLS]]) for found in largest]


def rows_by_condition(condition: Condition) -> dict[bytes, list[int]]:
    """Positions of each distinct condition, by its key without external embeddings."""
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(condition.without_external().row_keys()):
        rows.setdefault(key, []).append(row)
    return rows


def pilot_choice(model: Any, condition: Condition, cells: Tensor) -> Choice:
    """Decide by a short training that leaves some of the training conditions out, or without one if they are few.

    Parameters
    ----------
    model
        A `PRiMeFlow` before its first step.
    condition, cells
        Training cells (n, G) and their conditions (n).
    """
    if not (out := left_out(condition)):
        share, start = ways(model.sampler, can_start(model))[-1]
        return Choice(HALF if model.sampler.calibrate == "auto" else share, start, {}, "nothing", 0)
    stays = torch.tensor([key not in out for key in condition.without_external().row_keys()])
    pilot = train_pilot(model, condition[stays], cells[stays])
    seen = set(rows_by_condition(condition[stays]))
    return Choice.best(energies(pilot, held_out(condition, cells, seen)), "a pilot training")


def left_out(condition: Condition) -> set[bytes]:
    """Keys of the conditions that a pilot training leaves out, those with most cells first; none if they are few.

    The other conditions still have each of their perturbations.
    """
    rows = rows_by_condition(condition)
    perturbed = [key for key, found in rows.items() if not condition.is_control[found[0]]]
    if len(perturbed) < FEWEST:
        return set()
    own = {key: condition.perturbations[rows[key][0]] != 0 for key in perturbed}
    left, out = sum(own.values(), torch.zeros_like(condition.perturbations[0])), set()
    for key in sorted(perturbed, key=lambda key: len(rows[key]), reverse=True):
        if len(out) < min(MOST_CONDITIONS, LEFT_OUT * len(perturbed)) and (left[own[key]] > 1).all():
            left, out = left - own[key].float(), out | {key}
    return out


def train_pilot(model: Any, condition: Condition, cells: Tensor) -> Any:
    """A copy of a model before its first step, trained no longer than the model on cells (n, G) of conditions (n)."""
    most = model.trainer.max_steps
    steps = min(STEPS, most) if most > 0 else STEPS
    with torch.random.fork_rng(devices=[]):
        pilot = type(model)(**model.hparams).to(model.device)
    pilot.load_state_dict(model.state_dict())
    pilot.sampler, pilot.controls = model.sampler, model.controls
    pilot.learned_detection_limit = model.learned_detection_limit
    statistics = MarginalStatistics()
    statistics.add(condition.without_external(), cells)
    pilot.marginals = Marginals.fit(pilot.encoder, statistics)
    optimizer = torch.optim.Adam([weight for weight in pilot.parameters() if weight.requires_grad], lr=model.hparams.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.hparams.lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        rows = torch.randint(len(cells), (BATCH,), generator=generator)
        loss = pilot.loss(condition[rows].to(pilot.device), cells[rows].to(pilot.device), None, 0, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pilot.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return pilot.eval()
