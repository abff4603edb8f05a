"""Sample cells of conditions; each cell is a function of (seed, condition, index) alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.flow.guidance import Velocity, guide
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.sampling.batch_size import TILE, BatchSize
from primeflow_perturbench.sampling.transfer import HostCopy, one_behind, to_device

Finish = Callable[[Tensor], Tensor]
Source = Callable[[Condition, int, torch.Generator], tuple[Tensor, Condition]]
Block = tuple[int, int, Tensor]


class Tile(NamedTuple):
    """Cells ``first`` to ``first + n`` of the condition in row ``row``.

    They start at ``x_0`` (TILE, W), cells of the condition ``origin`` (1).
    """

    row: int
    first: int
    n: int
    x_0: Tensor
    origin: Condition


def condition_generator(seed: int, key: bytes) -> torch.Generator:
    """Random generator of a condition, seeded by a hash of the seed and its key, see `Condition.row_keys`."""
    digest = hashlib.sha256(seed.to_bytes(16, "little", signed=True) + key).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def gather(condition: Condition, n_genes: int, stream: Callable[[Condition, list[int]], Iterator[Block]]) -> Tensor:
    """Cells (N, G) in the order of the rows of ``condition`` (N), from a stream over the distinct conditions.

    The k-th row of a condition gets the condition's k-th cell.
    """
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(condition.row_keys()):
        rows.setdefault(key, []).append(row)
    groups = list(rows.values())
    cells = torch.empty(len(condition), n_genes)
    for group, first, block in stream(condition[[found[0] for found in groups]], [len(found) for found in groups]):
        cells[groups[group][first : first + len(block)]] = block
    return cells


class Sampler:
    """Samples cells of conditions from a velocity field.

    The unit of work is a tile: `TILE` consecutive cells of one condition. A tile is always computed completely, and
    cells that were not requested are discarded. Computations on a tile have the same shapes in every batch, so a cell
    has the same bits for every batch size and order of conditions. On an accelerator several tiles share a forward
    pass, so there cells agree to rounding; the noise is the same everywhere. An adaptive solver chooses its steps from
    the cells that it integrates together and therefore always gets a single tile. A forward pass that runs out of
    memory is repeated with fewer tiles.

    Parameters
    ----------
    velocity
        ``(x (B, W), t (B,), embedded condition (B, C)) -> (B, W)``.
    embed
        Maps conditions (N) to what the velocity reads, (N, C).
    width
        Coordinates of the space of the flow, W.
    null_condition
        The null condition, a batch of one.
    solver
        ODE solver.
    guidance
        Strength w of classifier-free guidance.
    seed
        Seed of all noise.
    batch_size
        Number of tiles that share a forward pass on an accelerator; keeps what it learns about memory.
    source
        ``(condition (1), n, generator) -> (x (n, W), origin (1))`` on the CPU, the starting points of n cells and the
        condition that they have; ``None`` is standard normal noise.
    encode_from
        Time of the starting points in (0, 1): they are first transported to noise by the flow of their own condition,
        see `SamplingSettings.control_start`; ``None`` for starting points at time 0.
    """

    def __init__(
        self,
        velocity: Velocity,
        embed: Callable[[Condition], Tensor],
        width: int,
        null_condition: Condition,
        solver: ODESolver,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: BatchSize | None = None,
        source: Source | None = None,
        encode_from: float | None = None,
    ):
        self._plain_velocity, self.embed, self.null_condition = velocity, embed, null_condition
        self.width, self.solver, self.guidance, self.seed = width, solver, guidance, seed
        self.batch_size = batch_size or BatchSize()
        self.source, self.encode_from = source or self._noise, encode_from

    def stream(self, condition: Condition, counts: Sequence[int], finish: Finish = lambda x: x) -> Iterator[Block]:
        """Yield blocks ``(row, first, cells (n, G))`` of the first ``counts[row]`` cells of each row's condition.

        Rows come in order, and so do the cells of a row; ``first`` is the index of a block's first cell within its
        condition. Only one batch of cells is computed at a time; while the CPU handles one, a GPU computes the next.

        Parameters
        ----------
        condition
            Conditions (N), on the device that computes. Equal conditions get equal cells.
        counts
            Number of cells of each row, length N.
        finish
            Applied on the device to each batch of generated values, for example decoding.
        """
        null = self.embed(self.null_condition.to(condition.is_null.device))
        self._velocity = guide(self._plain_velocity, null, self.guidance)
        launched = self._launched(condition, counts, finish)
        for batch, copy in one_behind(launched) if self._ahead(condition.is_null.device) else launched:
            for tile, cells in zip(batch, copy.wait().split(TILE), strict=True):
                yield tile.row, tile.first, cells[: tile.n]

    def _launched(
        self, condition: Condition, counts: Sequence[int], finish: Finish
    ) -> Iterator[tuple[list[Tile], HostCopy]]:
        """Tiles that were integrated together, and their cells."""
        tiles = self._tiles(condition, counts)
        while batch := list(islice(tiles, self._together(condition))):
            copy = self._integrate(batch, condition, finish)
            if copy is None:
                self.batch_size.halve(len(batch))
                tiles = chain(batch, tiles)
            else:
                yield batch, copy

    def _integrate(self, batch: list[Tile], condition: Condition, finish: Finish) -> HostCopy | None:
        """Cells of tiles, integrated together; ``None`` if the device has too little memory for them."""
        try:
            x = to_device(torch.cat([tile.x_0 for tile in batch]), condition.is_null.device)
            # Each row is embedded alone: the bits of a matrix product may depend on the number of rows.
            single = [condition[[tile.row]] for tile in batch]
            if self.encode_from is not None:
                origins = [tile.origin.to(condition.is_null.device) for tile in batch]
                origin = torch.cat([self.embed(one).expand(TILE, -1) for one in origins])
                x = self.solver.integrate(lambda x, t: self._plain_velocity(x, t, origin), x, self.encode_from, 0.0)
            embedded = torch.cat([self.embed(one).expand(TILE, -1) for one in single])
            return HostCopy(finish(self.solver.integrate(lambda x, t: self._velocity(x, t, embedded), x)))
        except torch.OutOfMemoryError:
            return None

    def _tiles(self, condition: Condition, counts: Sequence[int]) -> Iterator[Tile]:
        """The tiles of every row."""
        # Moved to the CPU at once: row by row, each copy would wait for the device's queue.
        condition = condition.to("cpu")
        for row, (key, n) in enumerate(zip(condition.row_keys(), counts, strict=True)):
            generator = condition_generator(self.seed, key)
            for first in range(0, int(n), TILE):
                yield Tile(row, first, min(TILE, int(n) - first), *self.source(condition[[row]], TILE, generator))

    def _noise(self, condition: Condition, n: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Standard normal noise (n, W)."""
        return torch.randn(n, self.width, generator=generator), condition

    def _together(self, condition: Condition) -> int:
        """Number of tiles that share a forward pass."""
        device = condition.is_null.device
        if device.type == "cpu" or self.solver.adaptive:
            return 1
        if self.batch_size.tiles is None:
            self.batch_size.measure(lambda: self._evaluate_tile(condition), device)
        return self.batch_size.tiles

    def _evaluate_tile(self, condition: Condition) -> None:
        """Evaluate the velocity once, for a tile of zeros."""
        device = condition.is_null.device
        x, t = torch.zeros(TILE, self.width, device=device), torch.zeros(TILE, device=device)
        self._velocity(x, t, self.embed(condition[[0]]).expand(TILE, -1))

    def _ahead(self, device: torch.device) -> bool:
        """Whether a batch is launched before the previous one is finished."""
        return device.type == "cuda"
