import pytest
import torch

from primeflow_perturbench.sampling.transfer import HostCopy, one_behind, to_device


def test_a_copy_on_the_cpu_is_immediate_and_in_float32():
    x = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    copy = HostCopy(x).wait()
    assert copy.dtype == torch.float32
    assert torch.equal(copy.double(), x)
    assert torch.equal(to_device(x, torch.device("cpu")), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_are_complete_although_it_continues():
    x = torch.randn(4000, 4000, generator=torch.Generator().manual_seed(0))
    on_gpu = to_device(x, torch.device("cuda"))
    copies = []
    for _ in range(3):
        copies.append(HostCopy(on_gpu))
        on_gpu = on_gpu * 2
    for power, copy in enumerate(copies):
        assert copy.wait().is_pinned()
        assert torch.equal(copy.wait(), x * 2**power)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_each_item_is_yielded_after_the_next_one_is_created(n):
    made = []

    def items():
        for item in range(n):
            made.append(item)
            yield item

    given = []
    for item in one_behind(items()):
        assert len(made) == min(item + 2, n)
        given.append(item)
    assert given == list(range(n))
