"""Generate the cells of conditions, each cell being a function of (seed, condition, index) alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from primeflow_perturbench.flow.guidance import Velocity, guide_within
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.sampling.batch_size import TILE, BatchSize
from primeflow_perturbench.sampling.transfer import HostCopy, one_behind, to_device

Finish = Callable[[Tensor], Tensor]
Source = Callable[[Tensor, int, torch.Generator], Tensor]
Block = tuple[int, int, Tensor]


class Tile(NamedTuple):
    """``n`` cells of the condition in row ``row``, from its cell ``first`` on, and where they start, (TILE, G)."""

    row: int
    first: int
    n: int
    x_0: Tensor


def unchanged(x: Tensor) -> Tensor:
    """The values as they are."""
    return x


def unsigned_zeros(condition: Tensor) -> Tensor:
    """Condition vectors in float32 on the CPU whose bytes are equal where their numbers are: -0.0 becomes 0.0."""
    return condition.to("cpu", torch.float32) + 0.0


def condition_generator(seed: int, condition: Tensor) -> torch.Generator:
    """Generator of a condition's own: seeded by a hash of the seed and the condition vector (C,)."""
    message = seed.to_bytes(16, "little", signed=True) + unsigned_zeros(condition).numpy().tobytes()
    digest = hashlib.sha256(message).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def group_rows(condition: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Distinct condition vectors in order of first appearance, each with the rows (n,) that hold it."""
    rows: dict[bytes, list[int]] = {}
    for row, vector in enumerate(unsigned_zeros(condition).numpy()):
        rows.setdefault(vector.tobytes(), []).append(row)
    return [(condition[found[0]], torch.tensor(found)) for found in rows.values()]


def gather(condition: Tensor, n_genes: int, stream: Callable[[Tensor, list[int]], Iterator[Block]]) -> Tensor:
    """Cells (N, G) in the order of the rows of ``condition`` (N, C), from a stream of distinct conditions and counts.

    The k-th row of a condition gets the condition's k-th cell.
    """
    groups = [rows for _, rows in group_rows(condition)]
    distinct = condition[[int(rows[0]) for rows in groups]]
    cells = torch.empty(len(condition), n_genes)
    for group, first, block in stream(distinct, [len(rows) for rows in groups]):
        cells[groups[group][first : first + len(block)]] = block
    return cells


class CellGenerator:
    """Draws cells of conditions from a velocity field.

    The unit of work is a tile: `TILE` consecutive cells of one condition, always complete, of which
    the cells that nobody asked for are thrown away. Arithmetic on a tile has one shape whatever the
    batch it came in, so a cell has the same bits at every batch size and in every order of conditions.
    On an accelerator several tiles share a forward, so there cells agree to rounding; the noise is the
    same everywhere. An adaptive solver chooses its steps from the cells it integrates together, so it
    always gets one tile at a time. A forward for which memory is too little is repeated with fewer tiles.

    Parameters
    ----------
    velocity
        ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    n_genes
        Number of genes, G.
    null_condition
        The null condition, shape (C,).
    solver
        How to integrate.
    guidance
        Strength w of classifier-free guidance.
    seed
        Seed of all noise.
    batch_size
        How many tiles share a forward on an accelerator; what it learns of the memory there stays in it.
    guidance_interval
        Times ``[lo, hi]`` of guidance, see `flow.guidance.guide_within`.
    source
        ``(condition (C,), n, generator) -> x_0 (n, G)`` on the CPU, where n cells of a condition start; ``None`` is
        standard normal noise.
    """

    def __init__(
        self,
        velocity: Velocity,
        n_genes: int,
        null_condition: Tensor,
        solver: ODESolver,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: BatchSize | None = None,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        source: Source | None = None,
    ):
        self.pieces = guide_within(velocity, null_condition, guidance, guidance_interval)
        self.null_condition = null_condition
        self.n_genes, self.solver, self.seed = n_genes, solver, seed
        self.batch_size = batch_size or BatchSize()
        self.source = source or self._noise

    def generate(self, condition: Tensor, finish: Finish = unchanged) -> Tensor:
        """Cells (N, G) on the CPU, in the order of the rows of ``condition`` (N, C).

        The k-th row of a condition gets the condition's k-th cell.

        Parameters
        ----------
        condition
            Condition vectors, on the device that computes.
        finish
            Applied to each batch of generated values on the device, for example decoding.
        """
        return gather(condition, self.n_genes, lambda distinct, counts: self.stream(distinct, counts, finish))

    def stream(self, condition: Tensor, counts: Sequence[int], finish: Finish = unchanged) -> Iterator[Block]:
        """Blocks ``(row, first, cells (n, G))`` of the first ``counts[row]`` cells of each row's condition.

        Rows come in order, and so do the cells of a row; ``first`` is the index of a block's first cell within
        its condition. No more cells than share a forward are computed at once; while the CPU has one batch of them,
        a GPU computes the next.

        Parameters
        ----------
        condition
            Condition vectors (N, C), on the device that computes. Rows that are equal get equal cells.
        counts
            Cells of each row, length N.
        finish
            As for `generate`.
        """
        launched = self._launched(condition, counts, finish)
        for batch, copy in one_behind(launched) if self._ahead(condition.device) else launched:
            for tile, cells in zip(batch, copy.wait().split(TILE), strict=True):
                yield tile.row, tile.first, cells[: tile.n]

    def _launched(
        self, condition: Tensor, counts: Sequence[int], finish: Finish
    ) -> Iterator[tuple[list[Tile], HostCopy]]:
        """Tiles that were integrated together, and their cells."""
        tiles = self._tiles(condition, counts)
        while batch := list(islice(tiles, self._together(condition.device))):
            copy = self._integrate(batch, condition, finish)
            if copy is None:
                self.batch_size.halve(len(batch))
                tiles = chain(batch, tiles)
            else:
                yield batch, copy

    def _integrate(self, batch: list[Tile], condition: Tensor, finish: Finish) -> HostCopy | None:
        """Cells of tiles, integrated together; ``None`` where the device has too little memory for them."""
        try:
            x = to_device(torch.cat([tile.x_0 for tile in batch]), condition.device)
            repeated = torch.cat([condition[tile.row].expand(TILE, -1) for tile in batch])
            for start, end, velocity in self.pieces:

                def field(x: Tensor, t: Tensor, velocity: Velocity = velocity) -> Tensor:
                    return velocity(x, t, repeated)

                x = self.solver.integrate(field, x, start, end)
            return HostCopy(finish(x))
        except torch.OutOfMemoryError:
            return None

    def _tiles(self, condition: Tensor, counts: Sequence[int]) -> Iterator[Tile]:
        """The tiles of every row."""
        # Moved at once: each row by itself would wait for all that a GPU has been given to do.
        for row, (vector, n) in enumerate(zip(condition.cpu(), counts, strict=True)):
            generator = condition_generator(self.seed, vector)
            for first in range(0, int(n), TILE):
                x_0 = self.source(vector, TILE, generator)
                yield Tile(row, first, min(TILE, int(n) - first), x_0)

    def _noise(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise (n, G)."""
        return torch.randn(n, self.n_genes, generator=generator)

    def _together(self, device: torch.device) -> int:
        """How many tiles share a forward."""
        if self._alone(device):
            return 1
        if self.batch_size.tiles is None:
            self.batch_size.measure(lambda: self._evaluate_tile(device), device)
        return self.batch_size.tiles

    def _evaluate_tile(self, device: torch.device) -> None:
        """Each velocity once, for a tile of zeros."""
        x, t = torch.zeros(TILE, self.n_genes, device=device), torch.zeros(TILE, device=device)
        null = self.null_condition.to(device).expand(TILE, -1)
        for piece in self.pieces:
            piece.velocity(x, t, null)

    def _alone(self, device: torch.device) -> bool:
        """Whether each tile is integrated by itself."""
        return device.type == "cpu" or self.solver.adaptive

    def _ahead(self, device: torch.device) -> bool:
        """Whether a batch is launched before the one before it is waited for."""
        return device.type == "cuda"
