"""Cells to a device and back without waiting for it."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Tensor of the CPU on ``device``; a GPU copies it when its turn comes, from pinned memory."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Values on their way to the CPU, in float32.

    On a GPU the copy goes to pinned memory behind the work that makes the values, and holds up nothing that is launched
    after it.

    Parameters
    ----------
    x
        The values, perhaps still being computed.
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
        """The values on the CPU, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each given out once the next one has been made."""
    iterator = iter(items)
    for held in iterator:
        for following in iterator:
            yield held
            held = following
        yield held
