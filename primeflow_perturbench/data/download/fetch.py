"""Fetch the public PerturBench data sets into a folder, pinned to one commit by a lock file beside them."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from primeflow_perturbench.data.download.catalogue import DATASETS, REPOSITORY, Dataset, choose, unpacked_name
from primeflow_perturbench.data.download.hub import Hub, RemoteFile, Snapshot, verify
from primeflow_perturbench.data.download.lock import LOCK, Lock, size_on_disk
from primeflow_perturbench.data.download.unpack import gunzip, untar
from primeflow_perturbench.errors import InputError

BUSY = ".perturbench.busy"
DEFAULT_REVISION = "main"
# Digits of a checksum in the name of an unfinished file, so that another revision's bytes are never continued.
TAG = 12


def data_folder() -> Path:
    """The folder of the data: the environment variable PRIMEFLOW_DATA, or ``data``."""
    return Path(os.environ.get("PRIMEFLOW_DATA") or "data")


def download(
    names: Sequence[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    keep: bool = False,
    console: Console | None = None,
) -> None:
    """Fetch data sets, check and unpack them; what is there already stays, what was interrupted goes on.

    Parameters
    ----------
    names
        Data sets of `catalogue.DATASETS`, or "all".
    folder
        Where they go; `data_folder` by default.
    revision
        Branch, tag or commit of the repository; the one that the folder's lock file has, or main.
    force
        Fetch again what is there.
    keep
        Keep the compressed files too.
    console
        Gets a line per file, and bars if it is a terminal.

    Raises
    ------
    InputError
        On an unknown name, a hub that cannot be reached or lacks a file, a revision other than the folder's, a wrong
        checksum, a damaged archive, or a disk that is full or closed.
    """
    datasets = choose(names)
    folder = data_folder() if folder is None else Path(folder)
    console = console or Console(quiet=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _Download(folder, console, keep).run(datasets, revision, force)
    except OSError as error:
        raise InputError(_disk_sentence(folder, error)) from error


def listing(folder: str | os.PathLike[str] | None = None, revision: str | None = None) -> tuple[Table, str | None]:
    """Table of the data sets; with a sentence if the hub could not tell their sizes."""
    lock = Lock.read(data_folder() if folder is None else Path(folder))
    snapshot, trouble = None, None
    try:
        snapshot = Hub(REPOSITORY).snapshot(revision or lock.revision or DEFAULT_REVISION)
    except InputError as error:
        trouble = str(error)
    table = Table(title=f"Data sets of {REPOSITORY}", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for heading in ("name", "what", "task", "files"):
        table.add_column(heading, no_wrap=heading in ("name", "files"))
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    for dataset in DATASETS.values():
        files, size = dataset.files, "?"
        if snapshot:
            files = _present(dataset, snapshot)
            size = decimal(sum(snapshot.files[name].size for name in files if name in snapshot.files))
        here = "yes" if lock.holds_all(dataset) else "in part" if any(map(lock.holds, files)) else "no"
        unpacked = "\n".join(map(unpacked_name, files))
        table.add_row(dataset.name, dataset.what, dataset.task, unpacked, size, here)
    return table, trouble


class _Download:
    """One run of `download` within a folder."""

    def __init__(self, folder: Path, console: Console, keep: bool):
        self.folder, self.console, self.keep = folder, console, keep
        self.lock = Lock.read(folder)

    def run(self, datasets: Sequence[Dataset], revision: str | None, force: bool) -> None:
        """Fetch what is missing; the hub is not asked if nothing is."""
        if revision is None and not force and all(map(self.lock.holds_all, datasets)):
            self._say_present([name for dataset in datasets for name in (*dataset.optional, *dataset.files)])
            return
        hub = Hub(REPOSITORY)
        snapshot = hub.snapshot(revision or self.lock.revision or DEFAULT_REVISION)
        self._pin(snapshot, revision)
        names = [name for dataset in datasets for name in _present(dataset, snapshot)]
        _require_files(names, snapshot, hub)
        if not force:
            self._say_present(names)
            names = [name for name in names if not self.lock.holds(name)]
            self._refuse_strangers(names)
        files = [snapshot.files[name] for name in names]
        self._require_space(files)
        for file in files:
            self._get(hub, file)

    def _pin(self, snapshot: Snapshot, revision: str | None) -> None:
        pinned = self.lock.revision
        if pinned is not None and snapshot.revision != pinned:
            raise InputError(
                f"{self.folder / LOCK}: found commit {pinned}, expected {snapshot.revision} as {revision or pinned!r} "
                "now is; leave --revision out to stay with the former, or give another --folder for the latter"
            )
        # At once, so that an interrupted download goes on with the same commit.
        self.lock.revision = snapshot.revision
        self.lock.write()

    def _say_present(self, names: Sequence[str]) -> None:
        for name in names:
            if self.lock.holds(name):
                self._say(f"{self.folder / unpacked_name(name)} is already there")

    def _refuse_strangers(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.folder / unpacked_name(name)
            if path.exists():
                raise InputError(
                    f"{path}: found a file that {LOCK} does not record as it is, expected none or an unchanged one; "
                    "move it away, or let --force replace it"
                )

    def _require_space(self, files: Sequence[RemoteFile]) -> None:
        missing = sum(file.size - size_on_disk(self._partial(file)) for file in files)
        # At the end the largest lies here packed and unpacked, and unpacked is never much smaller.
        missing += max((file.size for file in files if file.name.endswith(".gz")), default=0)
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise InputError(
                f"{self.folder}: found {decimal(free)} free on the disk, expected {decimal(missing)} at the least; "
                "free some, or give another --folder"
            )

    def _get(self, hub: Hub, file: RemoteFile) -> None:
        target, partial = self.folder / unpacked_name(file.name), self._partial(file)
        self._sweep(file, partial)
        with self._bar(f"fetching {file.name}", file.size, size_on_disk(partial)) as report:
            hub.fetch(file, self.lock.revision, partial, report)
        with self._bar(f"checking {file.name}", file.size) as report:
            sha256 = verify(file, partial, report)
        self.lock.compare(file, sha256)
        self._unpack(file, partial, target)
        if self.keep and target.name != file.name:
            partial.replace(self.folder / file.name)
        partial.unlink(missing_ok=True)
        self.lock.record(file, sha256)
        self._say(f"{target} is there ({decimal(size_on_disk(target))})")

    def _unpack(self, file: RemoteFile, partial: Path, target: Path) -> None:
        if target.name == file.name:
            partial.replace(target)
            return
        tar = partial.with_suffix(".tar") if file.name.endswith(".tar.gz") else None
        try:
            with self._bar(f"unpacking {file.name}", file.size) as report:
                gunzip(partial, tar or target, report, file.name)
            if tar:
                untar(tar, target, file.name)
        except InputError:
            # Its checksum is right, so more of the same bytes would not mend it.
            partial.unlink()
            raise
        finally:
            if tar:
                tar.unlink(missing_ok=True)

    def _partial(self, file: RemoteFile) -> Path:
        return self.folder / f".{file.name}.{file.checksum[:TAG]}.incomplete"

    def _sweep(self, file: RemoteFile, partial: Path) -> None:
        """Remove what killed downloads of a file left behind, but for the bytes to go on from."""
        left = [
            *self.folder.glob(f".{file.name}.*.incomplete"),
            *self.folder.glob(f".{unpacked_name(file.name)}.*.part"),
        ]
        for path in left:
            if path != partial:
                path.unlink()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=total, completed=done)
            yield lambda bytes_done: progress.update(task, completed=bytes_done)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second download."""
    try:
        with FileLock(folder / BUSY, timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"{folder}: found another download at work there, expected none; wait until it has ended"
        ) from error


def _present(dataset: Dataset, snapshot: Snapshot) -> tuple[str, ...]:
    """Files of a data set in the order of fetching: the optional ones that the repository has, then the others."""
    return (*(name for name in dataset.optional if name in snapshot.files), *dataset.files)


def _require_files(names: Sequence[str], snapshot: Snapshot, hub: Hub) -> None:
    for name in names:
        if name not in snapshot.files:
            raise InputError(
                f"{name}: found no such file in {REPOSITORY} at {hub.endpoint}, commit {snapshot.revision}, expected "
                "one; give another --revision that has it"
            )


def _disk_sentence(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: found the disk full, expected room for the data; free some, the same command then continues"
    return f"{folder}: found {error.strerror or error}, expected a folder to write to; mend it or give another --folder"
