"""Batches of an atlas: balanced, one draw per cell, equal on two devices and after a restart."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from primeflow_perturbench.data.atlas import sampling
from primeflow_perturbench.data.atlas.sampling import (
    BlockBatches,
    FetchLoader,
    block_bounds,
    cell_weights,
    draw_epoch,
    validation_cells,
)
from primeflow_perturbench.errors import InputError

# Two data sets of different size. Conditions are mixed within a file: one is periodic, one is rare.
of_dataset = np.repeat([0, 1], [900, 300])
of_condition = np.concatenate([np.arange(900) % 3 == 0, np.arange(300) % 30 == 0]).astype(np.int64)
of_condition[[5, 250, 251]] = 2
N = len(of_dataset)


def batches(**changed) -> BlockBatches:
    settings = {"batch_size": 50, "block_size": 16, "fetch_factor": 3, "seed": 4} | changed
    weights = settings.pop("weights", np.ones(N))
    return BlockBatches(np.arange(1000, 1000 + N), of_dataset, weights, **settings)


def flat(sampler: BlockBatches) -> list[list[int]]:
    return [batch for fetch in sampler for batch in fetch]


def cells_of(batches: list[list[int]]) -> list[int]:
    return [cell for batch in batches for cell in batch]


def on_devices(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(BlockBatches, "_devices", property(lambda self: (rank, world)))


def test_blocks_end_where_the_data_set_changes():
    assert block_bounds(np.array([0, 0, 0, 0, 0, 1, 1, 2]), 2).tolist() == [0, 2, 4, 5, 7, 8]
    assert block_bounds(np.array([3]), 64).tolist() == [0, 1]


@pytest.mark.parametrize(("dataset", "condition"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.25, 0.75)])
def test_weights_follow_the_formula(dataset, condition):
    weights = cell_weights(of_dataset, of_condition, dataset, condition)
    assert weights.sum() == pytest.approx(N)
    sizes = {d: (of_dataset == d).sum() for d in (0, 1)}
    all_datasets = sum(size**dataset for size in sizes.values())
    for d, size in sizes.items():
        assert weights[of_dataset == d].sum() == pytest.approx(N * size**dataset / all_datasets)
        labels, counts = np.unique(of_condition[of_dataset == d], return_counts=True)
        for label, count in zip(labels, counts, strict=True):
            found = weights[(of_dataset == d) & (of_condition == label)]
            assert np.ptp(found) == 0
            share = count**condition / (counts**condition).sum()
            assert found.sum() == pytest.approx(N * size**dataset / all_datasets * share)


def test_proportional_shares_draw_every_cell_once():
    weights = cell_weights(of_dataset, of_condition, 1.0, 1.0)
    for seed in range(5):
        order = draw_epoch(block_bounds(of_dataset, 16), weights, np.random.default_rng(seed))
        assert np.array_equal(np.sort(order), np.arange(N))
        assert not np.array_equal(order, np.arange(N))


@pytest.mark.parametrize("line", [50, 10**6])
def test_mean_number_of_draws_equals_the_weight(monkeypatch, line):
    """Also for periodic conditions, and when the line is built in pieces."""
    monkeypatch.setattr(sampling, "LINE", line)
    weights = cell_weights(of_dataset, of_condition, 0.5, 0.25)
    assert weights.max() > sampling.MAX_VISITS  # rare cells are drawn several times per visit
    assert weights.min() < 0.7
    bounds, epochs = block_bounds(of_dataset, 16), 400
    drawn = np.stack(
        [
            np.bincount(draw_epoch(bounds, weights, np.random.default_rng([7, epoch])), minlength=N)
            for epoch in range(epochs)
        ]
    )
    assert (drawn.sum(1) == N).all()
    # The number of draws varies no more than a Poisson variable.
    deviation = np.sqrt(np.maximum(weights, 1) / epochs)
    assert np.abs((drawn.mean(0) - weights) / deviation).max() < 5
    # Frequent conditions occur in every epoch.
    for label in (0, 1):
        in_epoch = drawn[:, of_condition == label].sum(1)
        assert in_epoch.std() < 0.1 * in_epoch.mean()


def test_visit_draws_no_cell_twice():
    weights = cell_weights(of_dataset, of_condition, 0.0, 1.0)
    bounds = block_bounds(of_dataset, 16)
    assert 1.9 < weights.max() < 2.1
    order = draw_epoch(bounds, weights, np.random.default_rng(0))
    block_of = np.searchsorted(bounds, order, side="right") - 1
    edges = [0, *(np.flatnonzero(np.diff(block_of)) + 1), len(order)]
    visits = [order[first:last] for first, last in pairwise(edges)]
    twice = sum(len(visit) > len(set(visit)) for visit in visits)
    # Two consecutive visits of one block look like one visit.
    assert twice <= 3
    assert len(visits) > 1.1 * (len(bounds) - 1)


def test_epoch_depends_only_on_seed_and_epoch():
    first, same, other_seed, later = batches(), batches(), batches(seed=5), batches()
    later.set_epoch(1)
    expected = flat(first)
    assert flat(same) == expected
    assert sorted(cells_of(expected)) == list(range(1000, 1000 + N))
    assert len(first) == len(expected) == N // 50
    for different in (flat(other_seed), flat(later)):
        assert different != expected
        assert sorted(cells_of(different)) == sorted(cells_of(expected))


def test_fetch_has_few_blocks_and_mixed_batches():
    (fetch, *_) = batches()
    cells = np.array(cells_of(fetch)) - 1000
    assert len(cells) == 150
    assert len(np.unique(cells // 16)) < 20, "expected complete blocks"
    assert all(len(set(np.array(batch) // 16)) > 5 for batch in fetch), "expected batches from many blocks"


@pytest.mark.parametrize("begin", [0, 1, 3, 7, 23])
def test_epoch_can_start_at_any_batch(begin):
    expected = flat(batches())
    resumed = batches()
    resumed.resume(0, begin)
    assert flat(resumed) == expected[begin:]
    # Only once: the next epoch is complete.
    resumed.set_epoch(1)
    assert len(flat(resumed)) == len(expected)


@pytest.mark.parametrize("batch_size", [50, 70])
def test_two_devices_together_see_the_batches_of_one(monkeypatch, batch_size):
    weights = cell_weights(of_dataset, of_condition, 0.5, 0.5)
    expected = flat(batches(batch_size=batch_size, weights=weights))
    halves = []
    for rank in (0, 1):
        on_devices(monkeypatch, rank, 2)
        halves.append(flat(batches(batch_size=batch_size // 2, weights=weights)))
    assert len(halves[0]) == len(halves[1]) == len(expected)
    for together, first, second in zip(expected, *halves, strict=True):
        assert (together[0::2], together[1::2]) == (first, second)


def test_last_batch_smaller_than_the_number_of_devices_gives_each_a_cell(monkeypatch):
    last = []
    for rank in range(3):
        on_devices(monkeypatch, rank, 3)
        cells = np.arange(7)
        last.append(flat(BlockBatches(cells, np.zeros(7, int), np.ones(7), batch_size=2, block_size=4))[-1])
    assert [len(batch) for batch in last] == [1, 1, 1]


def test_validation_batches_are_the_same_in_every_epoch():
    fixed = batches(shuffle=False)
    first = flat(fixed)
    fixed.set_epoch(3)
    assert flat(fixed) == first
    assert first[0] != sorted(first[0])


def test_validation_takes_whole_blocks_of_each_group_evenly():
    """Sorted files with 40 blocks of each of three groups: a tenth of each."""
    groups = np.repeat([0, 1, 2], 400)
    bounds = block_bounds(np.zeros(1200, int), 10)
    chosen = validation_cells(bounds, groups, [groups], 0.1, seed=3)
    blocks = chosen.reshape(120, 10)
    assert (blocks.all(1) | ~blocks.any(1)).all()
    assert [chosen[groups == group].sum() for group in range(3)] == [40, 40, 40]
    assert np.array_equal(chosen, validation_cells(bounds, groups, [groups], 0.1, seed=3))
    assert not np.array_equal(chosen, validation_cells(bounds, groups, [groups], 0.1, seed=4))


def test_training_keeps_blocks_with_rare_labels():
    groups, rare = np.zeros(100, int), np.zeros(100, int)
    rare[20:40] = 1
    bounds = block_bounds(groups, 10)
    for seed in range(20):
        chosen = validation_cells(bounds, groups, [groups, rare], 0.5, seed)
        assert not chosen[20:40].all(), "only two blocks have the label"
        assert chosen.any()
    with pytest.raises(InputError, match=r"val_fraction=0.5 holds out 5 of 10 blocks .* lower data.block_size"):
        validation_cells(bounds, groups, [np.arange(100)], 0.5, seed=0)


class Cells:
    """Data set whose batches are tensors of their cells. It records the requested fetches."""

    def __init__(self):
        self.fetches = []

    def __len__(self):
        return N

    def __getitem__(self, fetch):
        self.fetches.append(fetch)
        return tuple(torch.tensor(batch) for batch in fetch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_yields_single_batches_in_order(num_workers):
    loader = FetchLoader(Cells(), sampler=batches(), num_workers=num_workers)
    assert [batch.tolist() for batch in loader] == flat(batches())
    assert len(loader) == 24


def test_loader_reads_one_fetch_ahead():
    cells = Cells()
    iterator = iter(FetchLoader(cells, sampler=batches()))
    next(iterator)
    iterator.close()
    assert len(cells.fetches) <= 2


def test_error_while_reading_ahead_is_raised():
    class Broken(Cells):
        def __getitem__(self, fetch):
            raise InputError("cells.h5ad is gone")

    with pytest.raises(InputError, match="cells.h5ad is gone"):
        next(iter(FetchLoader(Broken(), sampler=batches())))
