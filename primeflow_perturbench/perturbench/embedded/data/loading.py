"""Loaders that hand out whole batches, the same ones on any number of devices and after a restart."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .collate import noop_collate


class EpochBatches(DistributedSampler):
    """Lists of positions, reshuffled each epoch from (seed, epoch) alone and able to begin inside an epoch.

    Global batch b of an epoch is cut into one part a device, so that two devices with batch size B see
    together what one device with 2 B sees. It counts as a `DistributedSampler` so that Lightning leaves
    it in place and calls `set_epoch`.

    Parameters
    ----------
    n
        Number of items.
    batch_size
        Items in a batch of one device.
    shuffle
        Whether to shuffle.
    seed
        Seed of the shuffles.
    """

    def __init__(self, n: int, batch_size: int, shuffle: bool = False, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"the loader needs a batch size of at least 1, got {batch_size}")
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.epoch = 0
        self._first_batch: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        """Begin epoch ``epoch`` at its batch ``batch`` when it is iterated next."""
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
            # A last batch smaller than the number of devices: repeat, since every device must take a step.
            yield (mine if len(mine) else together[:1]).tolist()


class BatchLoader(DataLoader):
    """Loader over `EpochBatches` that a checkpoint can restore in mid-epoch.

    Parameters
    ----------
    dataset
        Data set that is indexed by a list of positions.
    sampler
        Which positions make a batch.
    progress
        Returns (epoch, batches trained in it); called when a checkpoint is saved.
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
        # Lightning builds loaders anew with every argument of `DataLoader`, these two among them.
        loader |= {"batch_size": None, "collate_fn": noop_collate}
        super().__init__(dataset, sampler=sampler, **loader)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        """Where training stands and the seed that shuffles."""
        epoch, batch = self._progress() if self._progress else (0, 0)
        if batch >= len(self.sampler):
            # Workers fetch ahead as soon as the loader is restored, before the epoch is set.
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "seed": self.sampler.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.sampler.seed = state["seed"]
        self.sampler.resume(state["epoch"], state["batch"])
