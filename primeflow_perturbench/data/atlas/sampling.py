"""Which cells of an atlas form which batch: balanced, read in blocks, independent of the number of devices, resumable.

An epoch over n training cells has n draws. Let data set d have N_d cells, n_dc of them of condition c. A cell is drawn

    w = n  N_d^a / sum_d' N_d'^a  n_dc^b / sum_c' n_dc'^b  1 / n_dc

times per epoch in expectation: the data sets share the epoch in proportion to N^a, and the conditions of each in
proportion to n^b. An exponent of 1 keeps the proportions of the files, 0 makes all shares equal.

A block of consecutive cells is visited ``k = ceil(max w)`` times per epoch, at random positions. The draws are a
systematic sample (Madow 1949): each visit of a block lays its cells on a line with length ``w / k`` each, and points at
distance 1 with a random start choose cells. So the expectation is exact, a visit draws a cell at most once, and with
a = b = 1 every cell is drawn exactly once per epoch.

scDataset is not used: it deals whole fetches to processes, so that batches depend on the number of devices, and it has
neither weights on two levels nor a start within an epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from primeflow_perturbench.errors import InputError

# Limit on the visits of a block per epoch. Cells with a larger weight are drawn more than once per visit.
MAX_VISITS = 8
# Cells that are put on the line at a time, so that memory does not grow with the atlas.
LINE = 2_000_000
EPOCH, FETCH = 0, 1


def block_bounds(datasets: np.ndarray, block_size: int) -> np.ndarray:
    """Return the first cell of each block and the number of cells, shape (n_blocks + 1,).

    Parameters
    ----------
    datasets
        Index of the data set of each cell, shape (n,). A block ends where it changes.
    block_size
        Maximum number of cells per block.
    """
    changes = np.flatnonzero(np.diff(datasets)) + 1
    edges = [0, *changes.tolist(), len(datasets)]
    starts = [np.arange(first, last, block_size) for first, last in pairwise(edges)]
    return np.concatenate([*starts, [len(datasets)]]).astype(np.int64)


def cell_weights(datasets: np.ndarray, conditions: np.ndarray, dataset: float, condition: float) -> np.ndarray:
    """Return the expected number of draws of each cell per epoch, w of the module's docstring; shape (n,), mean 1.

    Parameters
    ----------
    datasets, conditions
        Index of the data set and of the condition of each cell, shape (n,) each.
    dataset, condition
        The exponents a and b.
    """
    n_conditions = int(conditions.max()) + 1
    pairs, pair_of = np.unique(datasets.astype(np.int64) * n_conditions + conditions, return_inverse=True)
    cells_of_pair = np.bincount(pair_of)
    _, dataset_of = np.unique(pairs // n_conditions, return_inverse=True)
    cells_of_dataset = np.bincount(dataset_of, weights=cells_of_pair)
    in_dataset = cells_of_pair.astype(float) ** condition
    in_dataset /= np.bincount(dataset_of, weights=in_dataset)[dataset_of]
    of_dataset = cells_of_dataset**dataset / (cells_of_dataset**dataset).sum()
    return (len(datasets) * of_dataset[dataset_of] * in_dataset / cells_of_pair)[pair_of]


def draw_epoch(bounds: np.ndarray, weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the cells of an epoch in the order of the visits of their blocks, shape (n,).

    Parameters
    ----------
    bounds
        Bounds of the blocks, shape (n_blocks + 1,).
    weights
        Expected number of draws of each cell, mean 1, shape (n,).
    generator
        Source of all randomness.
    """
    starts, sizes = bounds[:-1], np.diff(bounds)
    # The tolerance keeps rounding errors from adding a visit.
    visits = np.ceil(np.maximum.reduceat(weights, starts) - 1e-9).clip(1, MAX_VISITS).astype(np.int64)
    order = generator.permutation(np.repeat(np.arange(len(sizes)), visits))
    # Away from 0 and 1, where rounding errors of the line's length would change the number of draws.
    target, passed, drawn = generator.uniform(1e-6, 1 - 1e-6), 0.0, []
    step = max(1, LINE // int(sizes.max()))
    for first in range(0, len(order), step):
        blocks = order[first : first + step, None]
        # Random order within a block, since a file may repeat its conditions at a fixed distance.
        places = generator.random((len(blocks), int(sizes.max()))).argsort(axis=1)
        cells = np.minimum(starts[blocks] + places, len(weights) - 1)
        lengths = np.where(places < sizes[blocks], weights[cells] / visits[blocks], 0.0)
        line = passed + lengths.ravel().cumsum()
        passed = line[-1]
        targets = np.arange(target, passed)
        target += len(targets)
        drawn.append(cells.ravel()[np.searchsorted(line, targets, side="right")])
    return np.concatenate(drawn)


def validation_cells(
    bounds: np.ndarray, groups: np.ndarray, needed: Sequence[np.ndarray], fraction: float, seed: int
) -> np.ndarray:
    """Choose the validation cells: a fraction of the blocks, spread evenly over the groups. Return a mask, shape (n,).

    A block belongs to the group of its middle cell. A block stays in training if training would lack a label without
    it.

    Parameters
    ----------
    bounds
        Bounds of the blocks, shape (n_blocks + 1,).
    groups
        Index of the data set and condition of each cell, shape (n,).
    needed
        For each column whose labels training must know, the index of each cell's label, shape (n,).
    fraction
        Fraction of the blocks.
    seed
        Random seed.

    Raises
    ------
    InputError
        If training needs all blocks.
    """
    starts, n_blocks = bounds[:-1], len(bounds) - 1
    generator = np.random.default_rng(seed)
    middle = groups[(bounds[:-1] + bounds[1:]) // 2]
    by_group = np.lexsort([generator.random(n_blocks), middle])
    wanted = max(1, round(fraction * n_blocks))
    chosen = np.zeros(n_blocks, dtype=bool)
    chosen[by_group[((np.arange(wanted) + generator.random()) * n_blocks / wanted).astype(np.int64)]] = True
    held_out = np.repeat(chosen, np.diff(bounds))
    for labels in needed:
        lacking = np.bincount(labels[~held_out], minlength=labels.max() + 1)[labels] == 0
        chosen &= ~np.logical_or.reduceat(lacking, starts)
        held_out = np.repeat(chosen, np.diff(bounds))
    if not chosen.any():
        raise InputError(
            f"data.val_fraction={fraction} holds out {wanted} of {n_blocks} blocks of cells, but training needs all of "
            "them to know every perturbation and covariate; lower data.block_size"
        )
    return held_out


class BlockBatches(DistributedSampler):
    """The batches of an epoch, one fetch of batches at a time: an item is a list of batches, each a list of cells.

    An epoch depends on (seed, epoch) alone. Global batches are dealt to the devices cell by cell, so that two devices
    with batch size B see together what one device with 2 B sees. An epoch can start at any batch. The cells of a fetch
    are shuffled before they are cut into batches. The length is in batches.

    The class derives from `DistributedSampler` so that Lightning keeps it and calls `set_epoch`.

    Parameters
    ----------
    cells
        The cells to draw from, in file order, shape (n,).
    datasets
        Index of their data sets, shape (n,).
    weights
        Expected number of draws of each per epoch, mean 1, shape (n,).
    batch_size
        Cells per batch and device.
    block_size
        Consecutive cells that are read together.
    fetch_factor
        Batches that are read together.
    seed
        Random seed of the epochs.
    shuffle
        Whether each epoch is drawn anew. If not, all equal the first.
    """

    def __init__(
        self,
        cells: np.ndarray,
        datasets: np.ndarray,
        weights: np.ndarray,
        batch_size: int,
        block_size: int = 64,
        fetch_factor: int = 8,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.cells, self.weights, self.batch_size, self.fetch_factor = cells, weights, batch_size, fetch_factor
        self.bounds = block_bounds(datasets, block_size)
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self._first_batch: dict[int, int] = {}

    def resume(self, epoch: int, batch: int) -> None:
        """Start epoch ``epoch`` at its batch ``batch`` in the next iteration."""
        self.epoch, self._first_batch = epoch, {epoch: batch}

    @property
    def _devices(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        return -(-len(self.cells) // (self.batch_size * self._devices[1]))

    def __iter__(self) -> Iterator[list[list[int]]]:
        rank, world = self._devices
        epoch = self.epoch if self.shuffle else 0
        begin = self._first_batch.pop(self.epoch, 0)
        order = draw_epoch(self.bounds, self.weights, np.random.default_rng([self.seed, epoch, EPOCH]))
        batch = self.batch_size * world
        for fetch in range(begin // self.fetch_factor, -(-len(self) // self.fetch_factor)):
            read = order[fetch * self.fetch_factor * batch : (fetch + 1) * self.fetch_factor * batch]
            read = np.random.default_rng([self.seed, epoch, FETCH, fetch]).permutation(self.cells[read])
            batches = [read[first : first + batch] for first in range(0, len(read), batch)]
            batches = batches[max(0, begin - fetch * self.fetch_factor) :]
            # Every device must take a step: if the last batch has fewer cells than devices, its first cell is repeated.
            yield [(part[rank::world] if rank < len(part) else part[:1]).tolist() for part in batches]


class FetchLoader(DataLoader):
    """Loader over `BlockBatches` that reads by the fetch, yields by the batch, and resumes within an epoch.

    Without workers, a thread reads the next fetch while the batches of the current one are used.

    Parameters
    ----------
    dataset
        Data set that is indexed by a list of batches.
    sampler
        The batches.
    progress
        Returns (epoch, number of its batches trained on); called when a checkpoint is saved.
    **loader
        Other arguments of `torch.utils.data.DataLoader`, such as ``num_workers``.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sampler: BlockBatches,
        progress: Callable[[], tuple[int, int]] | None = None,
        **loader: Any,
    ):
        # Lightning rebuilds loaders with all arguments of DataLoader, including these two.
        loader |= {"batch_size": None, "collate_fn": _unchanged}
        super().__init__(dataset, sampler=sampler, **loader)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        """Return the progress of training and the seed of the epochs."""
        epoch, batch = self._progress() if self._progress else (0, 0)
        if batch >= len(self.sampler):
            # Workers read ahead as soon as the loader is restored, before the epoch is set.
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "seed": self.sampler.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.sampler.seed = state["seed"]
        self.sampler.resume(state["epoch"], state["batch"])

    def __iter__(self) -> Iterator[Any]:
        fetches = super().__iter__()
        if self.num_workers > 0:
            for fetch in fetches:
                yield from fetch
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, fetches, None)
            while (fetch := ahead.result()) is not None:
                ahead = reader.submit(next, fetches, None)
                yield from fetch


def _unchanged(item: Any) -> Any:
    return item
