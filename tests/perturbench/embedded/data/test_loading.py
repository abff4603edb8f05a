"""Loaders of whole batches: epochs, devices and restarts."""

from itertools import chain

import pytest
import torch

from primeflow_perturbench.perturbench.embedded.data.loading import BatchLoader, EpochBatches


def epoch_of(sampler: EpochBatches, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def sampler_of(n: int = 23, batch_size: int = 4, shuffle: bool = True, seed: int = 0) -> EpochBatches:
    return EpochBatches(n, batch_size, shuffle, seed)


class Squares(torch.utils.data.Dataset):
    """A data set that can be indexed with a list of positions."""

    def __getitem__(self, positions):
        return tuple(position**2 for position in positions)


@pytest.fixture
def as_device(monkeypatch):
    """Return a function that simulates one of several devices."""

    def believe(rank: int, world: int) -> None:
        monkeypatch.setattr(EpochBatches, "_devices", property(lambda self: (rank, world)))

    return believe


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_a_permutation_divided_into_batches(shuffle):
    sampler = sampler_of(shuffle=shuffle)
    batches = epoch_of(sampler, 3)
    assert [len(batch) for batch in batches] == [4] * 5 + [3]
    assert len(batches) == len(sampler) == 6
    assert sorted(chain(*batches)) == list(range(23))
    assert (list(chain(*batches)) == list(range(23))) != shuffle


def test_the_shuffle_depends_on_epoch_and_seed():
    epochs = [tuple(chain(*epoch_of(sampler_of(seed=seed), epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(epochs)) == 4
    assert tuple(chain(*epoch_of(sampler_of(seed=1), 1))) == epochs[-1]
    assert len({tuple(chain(*epoch_of(sampler_of(shuffle=False), epoch))) for epoch in (0, 1)}) == 1


def test_batch_size_does_not_change_the_order():
    orders = {tuple(chain(*epoch_of(sampler_of(batch_size=size), 0))) for size in (1, 4, 23, 100)}
    assert len(orders) == 1


@pytest.mark.parametrize("batch", [0, 2, 5])
def test_resume_gives_the_rest_of_the_epoch(batch):
    expected = [epoch_of(sampler_of(), epoch) for epoch in (4, 5)]
    sampler = sampler_of()
    sampler.resume(4, batch)
    assert list(sampler) == expected[0][batch:]
    assert epoch_of(sampler, 4) == expected[0], "only once"
    assert epoch_of(sampler, 5) == expected[1]


def test_epochs_after_the_resumed_one_are_complete():
    sampler = sampler_of()
    sampler.resume(4, 3)
    assert epoch_of(sampler, 5) == epoch_of(sampler_of(), 5)


@pytest.mark.parametrize(("n", "last"), [(24, [4, 4]), (23, [4, 3]), (20, [2, 2]), (17, [1, 1])])
def test_two_devices_share_each_global_batch(as_device, n, last):
    as_device(0, 1)
    together = epoch_of(sampler_of(n, batch_size=8), 2)
    parts = []
    for rank in range(2):
        as_device(rank, 2)
        sampler = sampler_of(n, batch_size=4)
        parts.append(epoch_of(sampler, 2))
        assert len(parts[-1]) == len(sampler) == 3
    assert [len(part[-1]) for part in parts] == last
    for whole, first, second in zip(together, *parts, strict=True):
        assert sorted({*first, *second}) == sorted(whole)
        # Only a batch with fewer cells than devices repeats a cell.
        assert len(first) + len(second) == max(2, len(whole))


def test_resume_on_several_devices(as_device):
    for rank in range(3):
        as_device(rank, 3)
        sampler = sampler_of(50)
        sampler.resume(1, 2)
        assert list(sampler) == epoch_of(sampler_of(50), 1)[2:]


def test_a_batch_size_below_one_is_an_error():
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        sampler_of(batch_size=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_returns_the_batches_of_the_data_set(num_workers):
    loader = BatchLoader(Squares(), sampler=sampler_of(5, 2, shuffle=False), num_workers=num_workers)
    assert list(loader) == [(0, 1), (4, 9), (16,)]
    assert len(loader) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("progress", "epoch"), [((1, 2), 1), ((1, 6), 2), ((0, 0), 0)])
def test_loader_state_restores_epoch_batch_and_seed(progress, epoch, num_workers):
    state = BatchLoader(Squares(), sampler=sampler_of(seed=7), progress=lambda: progress).state_dict()
    loader = BatchLoader(Squares(), sampler=sampler_of(seed=8), num_workers=num_workers)
    loader.load_state_dict(state)
    # Workers prefetch, so the epoch must be right before it is set.
    rest = list(loader)
    expected = epoch_of(sampler_of(seed=7), epoch)[progress[1] % 6 :]
    assert rest == [tuple(position**2 for position in batch) for batch in expected]
    assert len(rest) == {0: 6, 1: 4, 2: 6}[epoch]
