"""How many cells share a forward on an accelerator: given, or measured, and fewer once memory has run out."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from primeflow_perturbench.errors import InputError

log = logging.getLogger(__name__)

TILE = 32
# From here on a larger forward is no faster, and the host's memory holds several batches.
MOST_TILES = 64
# Share of free memory that a measured size may fill.
FILLED = 0.8


class BatchSize:
    """Number of tiles, of `TILE` cells each, that share a forward.

    Parameters
    ----------
    cells
        Most cells on the device at once, at least one tile is; ``"auto"`` to judge by the memory that one tile takes.

    Attributes
    ----------
    tiles
        Tiles of a forward; ``None`` until it is measured.

    Raises
    ------
    InputError
        If ``cells`` is neither.
    """

    def __init__(self, cells: int | Literal["auto"] = 256):
        if cells != "auto" and (isinstance(cells, str) or cells < 1):
            raise InputError(f"sample_batch_size must be at least 1, or 'auto', got {cells!r}")
        self.tiles = None if cells == "auto" else max(1, cells // TILE)
        self._warned = False

    def measure(self, evaluate: Callable[[], object], device: torch.device) -> None:
        """Choose the number of tiles that free memory holds.

        Parameters
        ----------
        evaluate
            Evaluates the velocity of one tile.
        device
            Where it does so.
        """
        if device.type != "cuda":
            self.tiles = BatchSize().tiles
            return
        torch.cuda.empty_cache()
        # Not the allocator's own peak: to set that back would lose the peak of the training.
        before = torch.cuda.memory_reserved(device)
        try:
            evaluate()
        except torch.OutOfMemoryError:
            self.halve(1)
        reserved = torch.cuda.memory_reserved(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved - torch.cuda.memory_allocated(device)
        fitting = int(FILLED * free / max(reserved - before, 1))
        self.tiles = min(max(fitting, 1), MOST_TILES)

    def halve(self, tried: int) -> None:
        """From now on take half of ``tried`` tiles, for which memory was too little; warn the first time.

        Raises
        ------
        InputError
            If one tile was too much.
        """
        if tried == 1:
            raise InputError(
                f"the device has too little memory to generate {TILE} cells, the least that is generated together; "
                "free its memory, take a smaller network or set accelerator=cpu"
            )
        self.tiles = tried // 2
        if not self._warned:
            log.warning(
                "The device has too little memory for %d cells in a forward; going on with %d, or fewer if need be. "
                "The cells are the same.",
                tried * TILE,
                self.tiles * TILE,
            )
        self._warned = True
