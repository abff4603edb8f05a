import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sampling.batch_size import FILLED, MOST_TILES, TILE, BatchSize

GPU = torch.device("cuda")
MIB = 2**20


class Memory:
    """A GPU with ``free`` MiB of memory; evaluating a tile reserves ``tile`` MiB."""

    def __init__(self, monkeypatch, free, tile):
        self.free, self.tile = free, tile
        self.reserved, self.allocated = 500, 400
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved * MIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated * MIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free * MIB, 10**12))

    def forward(self):
        if self.tile > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.reserved, self.free = self.reserved + self.tile, self.free - self.tile


@pytest.mark.parametrize(("cells", "tiles"), [(1, 1), (31, 1), (32, 1), (64, 2), (100, 3), ("auto", None)])
def test_a_pass_has_whole_tiles_and_at_least_one(cells, tiles):
    assert BatchSize(cells).tiles == tiles


@pytest.mark.parametrize("cells", [0, -5, "all"])
def test_any_other_size_is_an_error(cells):
    with pytest.raises(InputError, match=f"sample_batch_size must be at least 1, or 'auto', got {cells!r}"):
        BatchSize(cells)


def test_a_measured_size_uses_free_memory_and_unused_memory_of_the_allocator(monkeypatch):
    memory, size = Memory(monkeypatch, free=1000, tile=50), BatchSize("auto")
    size.measure(memory.forward, GPU)
    # 1000 free at first, and 100 reserved but not allocated: 1100 MiB at 50 MiB per tile.
    assert size.tiles == int(FILLED * 1100 / 50)


def test_a_measured_size_has_bounds(monkeypatch):
    sizes = []
    for tile in (950, 0, 1):
        memory, size = Memory(monkeypatch, free=1000, tile=tile), BatchSize("auto")
        size.measure(memory.forward, GPU)
        sizes.append(size.tiles)
    assert sizes == [1, MOST_TILES, MOST_TILES]


def test_a_tile_that_does_not_fit_is_an_error(monkeypatch):
    memory = Memory(monkeypatch, free=40, tile=50)
    with pytest.raises(InputError, match=f"too little memory to generate {TILE} cells"):
        BatchSize("auto").measure(memory.forward, GPU)


def test_an_accelerator_that_does_not_report_its_memory_gets_the_default_size():
    size = BatchSize("auto")
    size.measure(lambda: pytest.fail("measured"), torch.device("mps"))
    assert size.tiles == BatchSize().tiles > 1


def test_halving_warns_once(caplog):
    size = BatchSize(320)
    for tried, tiles in ((10, 5), (5, 2), (2, 1)):
        size.halve(tried)
        assert size.tiles == tiles
    assert len(caplog.records) == 1
    with pytest.raises(InputError, match="set accelerator=cpu"):
        size.halve(1)
