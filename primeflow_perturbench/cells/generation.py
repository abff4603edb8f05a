"""Generate the cells of conditions, each cell being a function of (seed, condition, index) alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from primeflow_perturbench.flow.guidance import Velocity, guide
from primeflow_perturbench.flow.sampling import ODESolver

TILE = 32
Finish = Callable[[Tensor], Tensor]
Block = tuple[int, int, Tensor]


class Tile(NamedTuple):
    """``n`` cells of the condition in row ``row``, from its cell ``first`` on, and their noise (TILE, G)."""

    row: int
    first: int
    n: int
    noise: Tensor


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


class CellGenerator:
    """Draws cells of conditions from a velocity field.

    The unit of work is a tile: `TILE` consecutive cells of one condition, always complete, of which
    the cells that nobody asked for are thrown away. Arithmetic on a tile has one shape whatever the
    batch it came in, so a cell has the same bits at every batch size and in every order of conditions.
    On an accelerator several tiles share a forward, so there cells agree to rounding; the noise is the
    same everywhere. An adaptive solver chooses its steps from the cells it integrates together, so it
    always gets one tile at a time.

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
    sample_batch_size
        Most cells on the device at once; at least one tile is.
    """

    def __init__(
        self,
        velocity: Velocity,
        n_genes: int,
        null_condition: Tensor,
        solver: ODESolver,
        guidance: float = 1.0,
        seed: int = 0,
        sample_batch_size: int = 256,
    ):
        if sample_batch_size < 1:
            raise ValueError(f"sample_batch_size must be at least 1, got {sample_batch_size}")
        self.velocity = guide(velocity, null_condition, guidance)
        self.n_genes, self.solver, self.seed = n_genes, solver, seed
        self.sample_batch_size = sample_batch_size

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
        groups = [rows for _, rows in group_rows(condition)]
        distinct = condition[[int(rows[0]) for rows in groups]]
        cells = torch.empty(len(condition), self.n_genes)
        for group, first, block in self.stream(distinct, [len(rows) for rows in groups], finish):
            cells[groups[group][first : first + len(block)]] = block
        return cells

    def stream(self, condition: Tensor, counts: Sequence[int], finish: Finish = unchanged) -> Iterator[Block]:
        """Blocks ``(row, first, cells (n, G))`` of the first ``counts[row]`` cells of each row's condition.

        Rows come in order, and so do the cells of a row; ``first`` is the index of a block's first cell within
        its condition. No more than ``sample_batch_size`` cells exist at once, on the device or on the CPU.

        Parameters
        ----------
        condition
            Condition vectors (N, C), on the device that computes. Rows that are equal get equal cells.
        counts
            Cells of each row, length N.
        finish
            As for `generate`.
        """
        for batch in self._batches(condition, counts):
            x_0 = torch.cat([tile.noise for tile in batch]).to(condition.device)
            repeated = torch.cat([condition[tile.row].expand(TILE, -1) for tile in batch])

            def velocity(x: Tensor, t: Tensor, repeated: Tensor = repeated) -> Tensor:
                return self.velocity(x, t, repeated)

            x_1 = finish(self.solver.integrate(velocity, x_0)).to("cpu", torch.float32)
            for tile, cells in zip(batch, x_1.split(TILE), strict=True):
                yield tile.row, tile.first, cells[: tile.n]

    def _tiles(self, condition: Tensor, counts: Sequence[int]) -> Iterator[Tile]:
        """The tiles of every row."""
        for row, (vector, n) in enumerate(zip(condition, counts, strict=True)):
            generator = condition_generator(self.seed, vector)
            for first in range(0, int(n), TILE):
                noise = torch.randn(TILE, self.n_genes, generator=generator)
                yield Tile(row, first, min(TILE, int(n) - first), noise)

    def _batches(self, condition: Tensor, counts: Sequence[int]) -> Iterator[list[Tile]]:
        """Lists of tiles that are integrated together."""
        alone = condition.device.type == "cpu" or self.solver.adaptive
        most = 1 if alone else max(1, self.sample_batch_size // TILE)
        tiles = self._tiles(condition, counts)
        while batch := list(islice(tiles, most)):
            yield batch
