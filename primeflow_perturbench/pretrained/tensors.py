"""Tensors of a model by name in a safetensors file, and what they must be."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from primeflow_perturbench.errors import InputError

Shape = tuple[int, ...]
# The types that a model's tensors have, by their names in the header.
DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def flattened(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings, by their keys joined with dots."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")


def without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """What nested mappings hold beside tensors."""
    return {
        key: without_tensors(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if not isinstance(value, Tensor)
    }


def with_tensors(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Nested mappings as they were before `flattened` and `without_tensors` parted them."""
    whole = {key: with_tensors(v, tensors, f"{prefix}{key}.") if isinstance(v, dict) else v for key, v in plain.items()}
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return whole | {key: tensor for key, tensor in own.items() if "." not in key}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write tensors to a safetensors file.

    Returns
    -------
    Names of the matrices that lie in memory column by column, of which the file holds the transpose. A product with
    one that lay otherwise could differ in its last bit.
    """
    transposed = [
        name
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
    ]
    laid = {name: tensor.T if name in transposed else tensor for name, tensor in tensors.items()}
    # Safetensors refuses tensors that share memory; a copy shares none.
    path.write_bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in laid.items()}))
    return transposed


class TensorFile:
    """The header of a safetensors file, checked against the file's length.

    Parameters
    ----------
    path
        The file.
    transposed
        What `write_tensors` returned.

    Raises
    ------
    InputError
        If it is no safetensors file, is cut short, or holds tensors of a type that we never write.
    """

    def __init__(self, path: Path, transposed: list[str]):
        self.path, self._transposed = path, transposed
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    part = file.get_slice(name)
                    self._add(name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is no whole safetensors file ({error}); save the model again or fetch the file again"
            ) from error
        strange = [name for name in transposed if len(self.shapes.get(name, ())) != 2]
        if strange:
            raise InputError(f"{path} has no matrix {strange[0]!r}, which config.json calls transposed; save it again")

    def _add(self, name: str, shape: Shape, dtype: str) -> None:
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(f"{self.path}, tensor {name!r} has type {dtype}, expected one of {known}; save it again")
        self.shapes[name] = shape[::-1] if name in self._transposed else shape
        self.dtypes[name] = DTYPES[dtype]

    @property
    def values(self) -> int:
        """Numbers in the file."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def check(self, expected: Mapping[str, tuple[Shape, torch.dtype]], why: str) -> None:
        """Raise `InputError` unless the file holds tensors of these shapes and types, and no other.

        Parameters
        ----------
        expected
            Shape and type by name.
        why
            What in ``config.json`` they follow from, for errors.
        """
        for names, what in ((set(expected) - set(self.shapes), "lacks"), (set(self.shapes) - set(expected), "has")):
            if names:
                name = min(names)
                but = "which belongs" if what == "lacks" else "which does not belong"
                raise InputError(f"{self.path} {what} the tensor {name!r}, {but} to {why}; save the model again")
        for name, (shape, dtype) in expected.items():
            found = self.shapes[name], self.dtypes[name]
            if found != (shape, dtype):
                raise InputError(
                    f"{self.path}, tensor {name!r} has shape {found[0]} and type {found[1]}, but {why} need {shape} "
                    f"and {dtype}; save the model again"
                )

    def read(self) -> dict[str, Tensor]:
        """The tensors, each in memory of its own.

        Raises
        ------
        InputError
            If a value is NaN or infinite.
        """
        tensors = {}
        with safe_open(self.path, framework="pt") as file:
            for name in self.shapes:
                # Products depend in their last bit on where in memory a matrix begins; a copy begins as new ones do.
                tensor = file.get_tensor(name).clone()
                tensors[name] = tensor.T if name in self._transposed else tensor
                if not tensors[name].isfinite().all():
                    raise InputError(
                        f"{self.path}, tensor {name!r} holds NaN or infinite values; share a model whose training did "
                        "not diverge"
                    )
        return tensors
