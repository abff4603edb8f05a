"""Loaders of whole batches, which are the same on any number of devices and after a restart."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .collate import noop_collate


class EpochBatches(DistributedSampler):
    """Lists of positions. The shuffle depends only on (seed, epoch), and iteration can start within an epoch.

    Each global batch is divided among the devices: two devices with batch size B together see what one device with
    batch size 2 B sees. The class derives from `DistributedSampler` so that Lightning keeps it and calls `set_epoch`.

    Parameters
    ----------
    n
        Number of items.
    batch_size
        Items per batch and device.
    shuffle
        Whether to shuffle.
    seed
        Random seed of the shuffles.
    """

    def __init__(self, n: int, batch_size: int, shuffle: bool = False, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.epoch = 0
        self._first_batch: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        """Start the next iteration of epoch ``epoch`` at batch ``batch``."""
        self.epoch = epoch
        self._first_batch = {epoch: batch}

    @property
    def _devices(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        _, world = self._devices
        return -(-self.n // (self.batch_size * world))

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self._devices
        order = torch.arange(self.n)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.n, generator=generator)
        for batch in range(self._first_batch.pop(self.epoch, 0), len(self)):
            together = order[batch * self.batch_size * world : (batch + 1) * self.batch_size * world]
            mine = together[rank::world]
            # If the last batch has fewer items than devices, repeat one: every device must take a step.
            yield (mine if len(mine) else together[:1]).tolist()


class BatchLoader(DataLoader):
    """Loader over `EpochBatches` that a checkpoint can restore within an epoch.

    Parameters
    ----------
    dataset
        Data set that can be indexed with a list of positions.
    sampler
        Positions of each batch.
    progress
        Returns (epoch, number of its batches trained so far); called when a checkpoint is saved.
    **loader
        Further arguments of `torch.utils.data.DataLoader`, such as ``num_workers``.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sampler: EpochBatches,
        progress: Callable[[], tuple[int, int]] | None = None,
        **loader,
    ):
        # Lightning rebuilds loaders with all arguments of `DataLoader`, including these two.
        loader |= {"batch_size": None, "collate_fn": noop_collate}
        super().__init__(dataset, sampler=sampler, **loader)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        """Progress of the training, and the seed of the shuffles."""
        epoch, batch = self._progress() if self._progress else (0, 0)
        if batch >= len(self.sampler):
            # Workers prefetch as soon as the loader is restored, before the epoch is set.
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "seed": self.sampler.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was called."""
        self.sampler.seed = state["seed"]
        self.sampler.resume(state["epoch"], state["batch"])
