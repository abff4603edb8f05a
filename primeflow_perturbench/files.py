"""Atomic writes, JSON, YAML and SHA-256 of files."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from primeflow_perturbench.errors import InputError, first_line

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Limits of a YAML file.
DEEPEST, LARGEST = 100, 1_000_000


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path beside ``path`` and rename it to ``path`` at the end.

    If the block raises, the temporary file is deleted and ``path`` keeps its previous content. Missing parent folders
    are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent.absolute())
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.part")
    try:
        yield temporary
        # On the disk before the name is: a crash of the machine must not leave an empty file.
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine have left in a folder, once per process."""
    for path in folder.glob(".*.part"):
        start, _, process = path.stem.rpartition("-")
        if start.endswith(f".{os.uname().nodename}") and process.isdigit() and not is_alive(int(process)):
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether this machine runs a process of this number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Content of a JSON file.

    Raises
    ------
    InputError
        If the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: found no readable file, expected JSON ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found text that is not JSON ({first_line(error)})") from error


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file; aliases may not multiply it, and nesting is limited.

    Raises
    ------
    InputError
        If the file is missing, cannot be read, is not YAML, or is nested or expands beyond `DEEPEST` and `LARGEST`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_expansion(text)
        return yaml.load(text, Loader=LOADER)
    except OSError as error:
        raise InputError(f"{path}: found no readable file, expected YAML ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path}: found text that is not YAML{line} ({reason}); correct it there") from error


def _check_expansion(text: str) -> None:
    """Raise `ValueError` for a text whose values are nested too deep, or too many once aliases are replaced."""
    sizes, anchors, known = [0], [], {}
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes.pop()
            known[anchors.pop()] = size
            sizes[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            # An alias within its own anchor is endless.
            sizes[-1] += known.get(event.anchor, LARGEST + 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            known[event.anchor] = 1
        if len(sizes) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} lists or mappings inside each other")
        if sizes[-1] > LARGEST:
            raise ValueError(f"aliases that stand for more than {LARGEST:,} values")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; the file is read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
