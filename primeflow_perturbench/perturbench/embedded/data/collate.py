"""Joining batches."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def noop_collate(items: Sequence[T] | T) -> T:
    """Take the one item of a list as it is: data sets here already return whole batches."""
    if isinstance(items, list):
        (items,) = items
    return items
