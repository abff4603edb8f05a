"""Whether a value from a file or a command line has the type of an annotation, and that type in words."""

import math
import os
import typing
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal

# The largest whole number that every reader of JSON, and every float, represents exactly.
LARGEST = 2**53


def fits(value: Any, kind: Any, loose: bool = False) -> bool:
    """Whether a value has a type; numbers are finite, and whole numbers exact.

    Parameters
    ----------
    value
        Boolean, number, text, ``None``, list or mapping.
    kind
        Annotation of a parameter.
    loose
        Whether text, such as a label or a path, may look like a number, and whether a mapping may describe an object
        of any other type.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(fits(value, each, loose) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if kind is int or (kind is float and type(value) is int):
        return type(value) is int and abs(value) <= LARGEST
    if kind is float:
        return type(value) is float and math.isfinite(value)
    if kind in (bool, NoneType):
        return type(value) is kind
    if is_text(origin):
        return type(value) is str or (loose and type(value) in (int, float))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(each, inner[0], loose) for each in value if inner)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(each, inner[1], loose) for each in value.values() if inner)
    return loose and (kind in (Any, object) or isinstance(value, dict | list))


def described(kind: Any) -> str:
    """A type in words: ``a whole number or 'auto'``."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(described(each) for each in inner))
    if origin is Literal:
        return " or ".join("false" if each is False else repr(each) for each in inner)
    if origin in (list, tuple, Sequence):
        return f"a list of {described(inner[0])}" if inner else "a list"
    if is_text(origin):
        return "text"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", NoneType: "null", Any: "anything"}
    return words.get(origin, "a mapping of settings")


def is_text(origin: Any) -> bool:
    """Whether a type is text or a path."""
    return origin is str or (isinstance(origin, type) and issubclass(origin, os.PathLike))
