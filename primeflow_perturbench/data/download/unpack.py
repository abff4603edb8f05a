"""Unpack gzip and tar files so that the result is whole or absent."""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing

BLOCK = 2**20
MACOS_EXTRA = "._"


def gunzip(source: Path, target: Path, report: Callable[[int], None], name: str) -> None:
    """Unpack a gzip file, block by block.

    Parameters
    ----------
    source
        The gzip file.
    target
        File that appears once all of ``source`` has been read and its checksums hold.
    report
        Called with the bytes of ``source`` read so far.
    name
        Name of the gzip file for the sentence.

    Raises
    ------
    InputError
        If ``source`` is cut short or damaged.
    """
    try:
        with (
            replacing(target) as temporary,
            source.open("rb") as packed,
            gzip.open(packed) as stream,
            temporary.open("wb") as plain,
        ):
            while block := stream.read(BLOCK):
                plain.write(block)
                report(packed.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{name}: found a damaged gzip file ({error}), expected a whole one; nothing was put in place, "
            "try again or give another --revision"
        ) from error


def untar(source: Path, target: Path, name: str) -> None:
    """Unpack a tar file into the folder ``target``, which appears by one rename and replaces one that is there.

    A first folder of the same name inside the archive is ``target`` itself; the extra files that macOS adds are left
    out.

    Raises
    ------
    InputError
        If the archive is damaged, holds no file, or has a member that is a link, a device or outside of ``target``.
    """
    temporary, before = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    _remove(temporary, before)
    try:
        _extract(source, temporary, target.name, name)
        if target.exists():
            target.rename(before)
        temporary.rename(target)
    finally:
        _remove(temporary, before)


def _extract(source: Path, folder: Path, top: str, name: str) -> None:
    written = False
    try:
        with tarfile.open(source, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                within = path.relative_to(top) if path.is_relative_to(top) else path
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise InputError(
                        f"{name}: found the member {member.name!r}, which is a link or leaves the folder, expected "
                        "files within it; nothing was put in place, give another --revision"
                    )
                if member.isdir() or path.name.startswith(MACOS_EXTRA):
                    continue
                file = folder / within
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as out:
                    shutil.copyfileobj(archive.extractfile(member), out, BLOCK)
                written = True
    except tarfile.TarError as error:
        raise InputError(f"{name}: found a damaged tar file ({error}), expected a whole one; try again") from error
    if not written:
        raise InputError(f"{name}: found a tar file without files, expected some; give another --revision")


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
