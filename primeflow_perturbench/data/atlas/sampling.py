"""Which cells of an atlas make which batch: balanced, read in blocks, the same on any number of devices and resumed.

An epoch over n training cells is n draws. Of N_d cells of data set d, n_dc of them of condition c, each is drawn

    w = n  N_d^a / sum_d' N_d'^a  n_dc^b / sum_c' n_dc'^b  1 / n_dc

times an epoch in expectation: data sets share the epoch in proportion to N^a, the conditions of each in proportion to
n^b; 1 leaves them as they are, 0 makes them equal. A block is read ``k = ceil(max w)`` times an epoch, at random places
of it. The draws lie on a line on which a cell has length ``w / k`` at each of its k places, at distance 1 from each
other with a random start (systematic sampling, Madow 1949). So the expectation is exact, a cell is drawn at most once
each time that its block is read, and with a = b = 1 every cell is drawn just once an epoch.
"""

# scDataset's strategies are not used: it deals whole fetches to processes, so that batches change with the number of
# devices, has no weights on two levels and cannot begin inside an epoch.

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.embedded.data.loading import BatchLoader, EpochBatches
from primeflow_perturbench.perturbench.embedded.data.types import Batch

# A block is read no more often an epoch; the rarest cells are then drawn more than once at a time.
MOST_VISITS = 8
# Cells on the line at a time, so that memory does not grow with the atlas.
LINE = 2_000_000
EPOCH, FETCH = 0, 1


def block_bounds(datasets: np.ndarray, block_size: int) -> np.ndarray:
    """First cell of each block, and the number of cells, shape (blocks + 1,).

    Parameters
    ----------
    datasets
        Number of each cell's data set, shape (n,); a block ends where it changes.
    block_size
        Most cells of a block.
    """
    changes = np.flatnonzero(np.diff(datasets)) + 1
    edges = [0, *changes.tolist(), len(datasets)]
    starts = [np.arange(first, last, block_size) for first, last in pairwise(edges)]
    return np.concatenate([*starts, [len(datasets)]]).astype(np.int64)


def cell_weights(datasets: np.ndarray, conditions: np.ndarray, dataset: float, condition: float) -> np.ndarray:
    """How often each cell is drawn an epoch, w of the module's text, in expectation; shape (n,), mean 1.

    Parameters
    ----------
    datasets, conditions
        Number of each cell's data set, and of its condition in that data set or in all, shape (n,) each.
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
    """Cells of an epoch in the order of their blocks' places, shape (n,).

    Parameters
    ----------
    bounds
        Bounds of the blocks, shape (blocks + 1,).
    weights
        Draws of each cell in expectation, with mean 1; shape (n,).
    generator
        Of all that is random.
    """
    starts, sizes = bounds[:-1], np.diff(bounds)
    # Rounding must not add a visit.
    visits = np.ceil(np.maximum.reduceat(weights, starts) - 1e-9).clip(1, MOST_VISITS).astype(np.int64)
    order = generator.permutation(np.repeat(np.arange(len(sizes)), visits))
    # Away from 0 and 1, where the rounding of the line's length would count.
    target, passed, drawn = generator.uniform(1e-6, 1 - 1e-6), 0.0, []
    at_once = max(1, LINE // int(sizes.max()))
    for first in range(0, len(order), at_once):
        blocks = order[first : first + at_once, None]
        # A random order within a block, since a file may repeat its conditions at a fixed distance.
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
    """Whether each cell is for validation, shape (n,): whole blocks, a share of those of each group.

    A block mixes groups where a file is not sorted, and counts as of the group of its middle cell. Training keeps a
    block without which it would lack a label.

    Parameters
    ----------
    bounds
        Bounds of the blocks, shape (blocks + 1,).
    groups
        Number of each cell's data set and condition, shape (n,).
    needed
        For each column of labels that training must know, the number of each cell's label, shape (n,).
    fraction
        Share of the blocks.
    seed
        Of the choice.

    Raises
    ------
    InputError
        If training needs every block.
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


class BlockBatches(EpochBatches):
    """Batches of an epoch, a fetch of them at a time; an item is a list of batches, each a list of cells.

    The contract is that of `EpochBatches`: an epoch depends on (seed, epoch) alone, global batches are dealt to devices
    cell by cell, and an epoch can begin at any batch. A fetch is shuffled before it is cut into batches. The length is
    in batches.

    Parameters
    ----------
    cells
        The cells to draw from, in file order, shape (n,).
    datasets
        Number of their data sets, shape (n,).
    weights
        How often each is drawn, with mean 1; shape (n,).
    batch_size
        Cells in a batch of one device.
    block_size
        Consecutive cells that are read together.
    fetch_factor
        Batches that are read together.
    seed
        Seed of the epochs.
    shuffle
        Whether each epoch is drawn anew; if not, all are the first.
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
        super().__init__(len(cells), batch_size, shuffle, seed)
        self.cells, self.weights, self.fetch_factor = cells, weights, fetch_factor
        self.bounds = block_bounds(datasets, block_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        rank, world = self._devices
        epoch = self.epoch if self.shuffle else 0
        begin = self._first_batch.pop(self.epoch, 0)
        order = draw_epoch(self.bounds, self.weights, np.random.default_rng([self.seed, epoch, EPOCH]))
        batch = self.batch_size * world
        for fetch in range(begin // self.fetch_factor, -(-len(self) // self.fetch_factor)):
            read = order[fetch * self.fetch_factor * batch : (fetch + 1) * self.fetch_factor * batch]
            read = np.random.default_rng([self.seed, epoch, FETCH, fetch]).permutation(self.cells[read])
            together = [read[first : first + batch] for first in range(0, len(read), batch)]
            together = together[max(0, begin - fetch * self.fetch_factor) :]
            # A last batch smaller than the number of devices: repeat, since every device must take a step.
            yield [(part[rank::world] if rank < len(part) else part[:1]).tolist() for part in together]


class FetchLoader(BatchLoader):
    """`BatchLoader` over `BlockBatches`: reads by the fetch, gives by the batch.

    Without workers, a thread reads the next fetch while the batches of the last are trained on.
    """

    def __iter__(self) -> Iterator[Batch]:
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
