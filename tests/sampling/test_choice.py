"""Held-out conditions decide on calibration and on where cells start."""

from types import SimpleNamespace

import pytest
import torch

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.sampling import choice
from primeflow_perturbench.sampling.choice import Choice, energy_distance, held_out, left_out, ways
from primeflow_perturbench.sampling.generate import settled
from primeflow_perturbench.sampling.settings import SamplingSettings


def conditions(*rows):
    """Conditions from rows of perturbations "AB" and a context 0 or 1, such as "A0", "AB1" or "0" for controls."""
    hot = torch.tensor([[float(name in row[:-1]) for name in "ABC"] for row in rows])
    context = torch.eye(2)[[int(row[-1]) for row in rows]]
    no = torch.zeros(len(rows), dtype=torch.bool)
    return Condition(hot, context, no, hot[:, :0], ~no)


def test_the_way_with_the_smallest_mean_distance_wins_and_the_first_of_equals():
    scores = {(0.0, None): [1.0, 3.0], (0.5, None): [2.5, 1.0], (0.0, 0.5): [1.75, 1.75]}
    found = Choice.best(scores, "validation")
    assert (found.calibrate, found.control_start, found.conditions) == (0.5, None, 2)
    assert list(found.energy.values()) == [2.0, 1.75, 1.75]


def test_the_energy_distance_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator) + 1
    mean = lambda a, b: sum(float((u - v).norm()) for u in a for v in b) / len(a) / len(b)  # noqa: E731
    assert energy_distance(x, y) == pytest.approx(mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2, rel=1e-5)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "has_controls", "expected"),
    [
        ({}, True, [(0.0, None)]),
        ({"calibrate": "auto"}, True, [(share, None) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]),
        ({"control_start": "auto"}, False, [(0.0, None)]),
        ({"control_start": "auto", "calibrate": "marginals"}, True, [(1.0, None), (1.0, 0.5)]),
        ({"control_start": 0.3, "calibrate": 0.75}, True, [(0.75, 0.3)]),
    ],
)
def test_only_what_is_open_is_compared(settings, has_controls, expected):
    assert ways(SamplingSettings(**settings), has_controls) == expected


def test_held_out_conditions_are_perturbed_known_and_not_of_the_training():
    validation = conditions("A0", "A0", "B1", "B1", "B1", "C0", "0")
    unknown = torch.tensor([True] * 5 + [False, True])
    validation = Condition(**{**vars(validation), "is_known": unknown})
    seen = set(conditions("A0", "1").row_keys())
    found = held_out(validation, torch.arange(7.0)[:, None], seen)
    assert [cells.flatten().tolist() for _, cells in found] == [[2.0, 3.0, 4.0]]
    assert found[0][0].row_keys() == conditions("B1").row_keys()


def test_pilots_leave_out_conditions_whose_perturbations_remain_those_with_most_cells_first(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST", 5)
    monkeypatch.setattr(choice, "MOST_CONDITIONS", 12)
    rows = ["A0"] * 5 + ["A1"] * 4 + ["AB1"] * 3 + ["B0"] * 2 + ["C0"] * 9 + ["0", "1"]
    keys = {name: conditions(name).row_keys()[0] for name in ("A0", "A1", "B0")}
    # C occurs in one condition only, so that it stays; a fifth of five conditions is one.
    assert left_out(conditions(*rows)) == {keys["A0"]}
    monkeypatch.setattr(choice, "LEFT_OUT", 0.4)
    assert left_out(conditions(*rows)) == {keys["A0"], keys["A1"]}
    monkeypatch.setattr(choice, "LEFT_OUT", 1.0)
    # AB1 is the last condition with A and with B then.
    assert left_out(conditions(*rows)) == set(keys.values())
    assert left_out(conditions("A0", "A1", "B0", "B1")) == set()


@pytest.mark.parametrize(("controls", "start"), [(None, None), (object(), 0.5)])
def test_with_few_conditions_calibration_goes_half_of_the_way(controls, start):
    sampler = SamplingSettings(calibrate="auto", control_start="auto")
    model = SimpleNamespace(sampler=sampler, controls=controls, objective=Objective())
    found = choice.pilot_choice(model, conditions("A0", "B1", "0"), torch.zeros(3, 4))
    assert (found.calibrate, found.control_start, found.conditions) == (0.5, start, 0)


@pytest.mark.parametrize(("right", "share"), [("flow", 0.0), ("between", 0.5), ("mixed model", 1.0)])
def test_the_choice_follows_the_held_out_cells(monkeypatch, right, share):
    """A flow at 1 and targets at 3: the share of the way at which the measured cells are is chosen."""
    n_genes, measured = 4, 1 + 2 * share
    sampler = SamplingSettings(calibrate="auto", control_start="auto")
    model = SimpleNamespace(
        sampler=sampler, controls=None, device="cpu", learned_detection_limit=None, objective=None, choice=None
    )
    noise = lambda n, seed: 0.1 * torch.randn(n, n_genes, generator=torch.Generator().manual_seed(seed))  # noqa: E731

    def blocks(model, settings, condition, counts, seed):
        yield from ((row, 0, 1 + noise(n, row)) for row, n in enumerate(counts))

    full = lambda value: torch.full((1, n_genes), value)  # noqa: E731
    monkeypatch.setattr(choice, "raw_cells", blocks)
    monkeypatch.setattr(choice, "targets", lambda model, condition: (full(3.0), full(1.0), full(0.1)))
    held = [(conditions(name), measured + noise(50, 9)) for name in ("A0", "B1")]
    model.choice = Choice.best(choice.energies(model, held), "validation")
    assert settled(model).calibration == share
    assert settled(model).control_start is None


def test_what_training_has_not_decided_is_an_error():
    model = SimpleNamespace(sampler=SamplingSettings(calibrate="auto"), choice=None)
    with pytest.raises(InputError, match="train first"):
        settled(model)
