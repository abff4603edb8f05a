"""Asynchronous copies between the CPU and a GPU."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device``; to a GPU asynchronously, from pinned memory."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Copy of values to the CPU, in float32.

    On a GPU the copy is queued behind the computation of the values and does not block work that is launched later.

    Parameters
    ----------
    x
        The values, which may still be computed.
    """

    def __init__(self, x: Tensor):
        self._done: torch.cuda.Event | None = None
        if x.device.type != "cuda":
            self._copy = x.to("cpu", torch.float32)
            return
        self._copy = torch.empty(x.shape, dtype=torch.float32, pin_memory=True)
        self._copy.copy_(x.float(), non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next one has been created."""
    iterator = iter(items)
    for held in iterator:
        for following in iterator:
            yield held
            held = following
        yield held
