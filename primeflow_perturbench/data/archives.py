"""Unpack gzip and tar files."""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from primeflow_perturbench.errors import InputError, first_line

BLOCK_BYTES = 2**20


def gunzip(source: Path, target: Path) -> None:
    """Unpack a gzip file. If it raises, ``target`` is incomplete.

    Raises
    ------
    InputError
        If ``source`` is truncated or damaged.
    """
    with _damage_reported(source), gzip.open(source, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, BLOCK_BYTES)


def untar(source: Path, target: Path) -> None:
    """Unpack a gzipped tar file into the new folder ``target``. If it raises, ``target`` is incomplete.

    If the archive consists of one folder with the name of ``target``, its content goes to ``target`` itself. Extra
    files that macOS adds (``._name``) are skipped.

    Raises
    ------
    InputError
        If the archive is damaged, has no files, or has a member that is not a plain file or lies outside the folder.
    """
    with _damage_reported(source), tarfile.open(source, "r:gz") as archive:
        n_files = 0
        for member in archive:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise InputError(
                    f"{source}: found the member {member.name!r}, which is a link or lies outside the folder, expected "
                    "plain files; do not use this archive"
                )
            if member.isfile() and not path.name.startswith("._"):
                member.name = str(path.relative_to(target.name) if path.is_relative_to(target.name) else path)
                archive.extract(member, target, filter="data")
                n_files += 1
    if not n_files:
        raise InputError(f"{source}: found an archive without files, expected at least one; use another revision")


@contextmanager
def _damage_reported(source: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise InputError(
            f"{source}: found a damaged archive ({first_line(error)}), expected a complete one; download it again"
        ) from error
