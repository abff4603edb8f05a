import math
import warnings
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.training.schedule import SetScheduleLength, build_schedule, warmup_cosine

PEAK = 0.02


def rates(steps, **schedule):
    """Learning rate at each of ``steps`` optimizer steps and after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = warmup_cosine(optimizer, **schedule)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def closed_form(step, warmup, total, final=0.0):
    if step < warmup:
        return PEAK * (1 + step * (warmup - 1) / warmup) / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return PEAK * (final + (1 - final) * cosine)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 100), (7, 73), (20, 200)])
def test_every_step_has_the_rate_of_the_formula(warmup, total, final):
    found = rates(total, warmup_steps=warmup, total_steps=total, final_fraction=final)
    expected = [closed_form(step, warmup, total, final) for step in range(total + 1)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_schedule_passes_its_landmarks():
    found = rates(100, warmup_steps=10, total_steps=100)
    assert found[0] == pytest.approx(PEAK / 10)
    assert found[10] == pytest.approx(PEAK)
    assert found[55] == pytest.approx(PEAK / 2)
    assert found[100] == pytest.approx(0, abs=1e-9)
    assert max(found) == pytest.approx(PEAK)
    assert all(a < b for a, b in pairwise(found[:11]))
    assert all(a > b for a, b in pairwise(found[10:]))


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (50, 5), (9, 1), (5, 1)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(total, warmup):
    found = rates(total, warmup_steps=500, total_steps=total)
    expected = [closed_form(step, warmup, total) for step in range(total + 1)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_trains_at_the_peak(warmup):
    assert rates(1, warmup_steps=warmup, total_steps=1)[0] == PEAK


def test_the_schedule_ends_at_the_final_fraction():
    assert rates(40, warmup_steps=4, total_steps=40, final_fraction=0.25)[-1] == pytest.approx(PEAK / 4)


@pytest.mark.parametrize("total", [0, -1])
def test_a_run_without_steps_is_an_error(total):
    with pytest.raises(ValueError, match=f"set trainer.max_steps, got {total}"):
        rates(1, warmup_steps=1, total_steps=total)


def test_a_restored_schedule_continues():
    schedule = {"warmup_steps": 4, "total_steps": 40}
    whole = rates(20, **schedule)

    def start():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
        return optimizer, warmup_cosine(optimizer, **schedule)

    optimizer, scheduler = start()
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    again, restored = start()
    again.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(scheduler.state_dict())
    for step in range(12, 20):
        assert again.param_groups[0]["lr"] == pytest.approx(whole[step])
        again.step()
        restored.step()


@pytest.mark.parametrize(("total", "peak"), [(40, PEAK), (26, PEAK), (40, 3 * PEAK)])
def test_a_restored_schedule_follows_the_length_and_the_rate_of_its_new_run(total, peak):
    """Twelve steps of a run of twenty, then a run of another length or rate: no step depends on the first run."""

    def start(length, rate):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, warmup_cosine(optimizer, warmup_steps=4, total_steps=length)

    optimizer, scheduler = start(20, PEAK)
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    again, restored = start(total, peak)
    again.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(scheduler.state_dict())
    warmup = total // 10
    for step in range(12, total + 1):
        expected = closed_form(step, warmup, total) * peak / PEAK
        assert again.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        assert restored.get_last_lr() == [again.param_groups[0]["lr"]]
        again.step()
        restored.step()


@pytest.mark.parametrize(
    "config", [{}, {"conf": None}, {"conf": warmup_cosine}, {"conf": warmup_cosine, "dependencies": {"a": "b"}}]
)
def test_an_incomplete_schedule_is_refused(config):
    with pytest.raises(InputError, match="needs conf"):
        build_schedule(config, torch.optim.SGD([torch.zeros(1)], lr=PEAK), SimpleNamespace())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"warmup_steps": -1}, "warmup_steps"), ({"warmup_steps": 1, "final_fraction": math.nan}, "final_fraction")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        rates(1, total_steps=10, **settings)


def test_the_schedule_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(30, warmup_steps=3, total_steps=30)


def entry(conf, steps=80, extras=None):
    """Lightning's entry of a schedule in a run of ``steps``."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    config = {"conf": conf, "dependencies": {"optimizer": "optimizer"}, "extras": extras}
    return build_schedule(config, optimizer, SimpleNamespace(estimated_stepping_batches=steps)), optimizer


def test_an_open_length_becomes_that_of_the_run():
    given, optimizer = entry(partial(warmup_cosine, warmup_steps=8, total_steps=None), extras={"interval": "step"})
    assert given["interval"] == "step"
    for step in range(80):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(closed_form(step, 8, 80))
        optimizer.step()
        given["scheduler"].step()


def test_a_given_length_is_kept():
    given, optimizer = entry(partial(warmup_cosine, warmup_steps=2, total_steps=20))
    for _ in range(20):
        optimizer.step()
        given["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_schedule_without_a_length_gets_none():
    given, _ = entry(partial(torch.optim.lr_scheduler.StepLR, step_size=3), steps=math.inf)
    assert isinstance(given["scheduler"], torch.optim.lr_scheduler.StepLR)


def test_a_run_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"set trainer.max_steps or trainer.max_epochs"):
        entry(partial(warmup_cosine, warmup_steps=8, total_steps=None), steps=math.inf)


class Line(L.LightningModule):
    """A model that builds its scheduler without the length of the run, as PerturBench's own models do."""

    def __init__(self, schedule):
        super().__init__()
        self.weight, self.schedule, self.rates = torch.nn.Parameter(torch.ones(1)), schedule, []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=PEAK)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return (self.weight * batch).sum()


def fit_line(schedule, folder, *callbacks, ckpt_path=None, **length):
    model, quiet = Line(schedule), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **length, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(10)), ckpt_path=ckpt_path, weights_only=False)
    trainer.save_checkpoint(folder / "line.ckpt")
    return model.rates


@pytest.mark.parametrize(("length", "total"), [({"max_steps": 14}, 14), ({"max_epochs": 2}, 20)])
def test_a_callback_tells_the_length_to_a_schedule_that_lacks_it(tmp_path, length, total):
    found = fit_line(partial(warmup_cosine, warmup_steps=2), tmp_path, SetScheduleLength(), **length)
    assert found == pytest.approx([closed_form(step, max(1, min(2, total // 10)), total) for step in range(total)])


def test_a_resumed_schedule_without_length_continues(tmp_path):
    schedule = partial(warmup_cosine, warmup_steps=2)
    fit_line(schedule, tmp_path, SetScheduleLength(), max_steps=10)
    found = fit_line(schedule, tmp_path, SetScheduleLength(), ckpt_path=tmp_path / "line.ckpt", max_steps=20)
    assert found == pytest.approx([closed_form(step, 2, 20) for step in range(10, 20)])


def test_a_length_that_is_given_stays(tmp_path):
    schedule = partial(warmup_cosine, warmup_steps=2, total_steps=40)
    found = fit_line(schedule, tmp_path, SetScheduleLength(), max_steps=3)
    assert found == pytest.approx([closed_form(step, 2, 40) for step in range(3)])


def test_a_schedule_that_nobody_tells_its_length_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"needs the length of the training: set model.lr_scheduler.conf.total_steps"):
        fit_line(partial(warmup_cosine, warmup_steps=2), tmp_path, max_steps=3)
