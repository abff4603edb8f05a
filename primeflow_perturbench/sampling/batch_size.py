"""How many cells share a forward pass on an accelerator: set, or measured, and reduced if memory runs out."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from primeflow_perturbench.errors import InputError

log = logging.getLogger(__name__)

TILE = 32
# Larger passes are not faster, and the main memory holds several batches.
MOST_TILES = 64
# Share of the free memory that a measured size may use.
FILLED = 0.8


class BatchSize:
    """Number of tiles, of `TILE` cells each, that share a forward pass.

    Parameters
    ----------
    cells
        Maximum number of cells in a pass, at least one tile; ``"auto"`` measures the memory of one tile.

    Attributes
    ----------
    tiles
        Tiles of a pass; ``None`` until measured.

    Raises
    ------
    InputError
        If ``cells`` is neither a positive number nor ``"auto"``.
    """

    def __init__(self, cells: int | Literal["auto"] = 256):
        if cells != "auto" and (isinstance(cells, str) or cells < 1):
            raise InputError(f"sample_batch_size must be at least 1, or 'auto', got {cells!r}")
        self.tiles = None if cells == "auto" else max(1, cells // TILE)
        self._warned = False

    def measure(self, evaluate: Callable[[], object], device: torch.device) -> None:
        """Choose the number of tiles that fit the free memory.

        Parameters
        ----------
        evaluate
            Evaluates the velocity of one tile.
        device
            Device of the evaluation.
        """
        if device.type != "cuda":
            self.tiles = BatchSize().tiles
            return
        torch.cuda.empty_cache()
        # The allocator's own peak is not used: resetting it would lose the peak of the training.
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
        """Use half of ``tried`` tiles from now on, because memory was insufficient; warn the first time.

        Raises
        ------
        InputError
            If a single tile did not fit.
        """
        if tried == 1:
            raise InputError(
                f"the device has too little memory to generate {TILE} cells, the minimum; "
                "free its memory, use a smaller network or set accelerator=cpu"
            )
        self.tiles = tried // 2
        if not self._warned:
            log.warning(
                "The device has too little memory for %d cells in a forward pass; continuing with %d or fewer. The "
                "generated cells are the same.",
                tried * TILE,
                self.tiles * TILE,
            )
        self._warned = True
