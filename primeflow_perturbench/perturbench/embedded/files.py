"""Atomic writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` if the block ends without an error."""
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
