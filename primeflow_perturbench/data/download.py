"""Download the public PerturBench data sets: pinned to one commit, verified, unpacked and listed in a lock file."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from primeflow_perturbench.console import PlainConsole
from primeflow_perturbench.data.archives import gunzip, untar
from primeflow_perturbench.errors import InputError, first_line, nearest
from primeflow_perturbench.files import file_hash, read_json, write_json

REPOSITORY = "altoslabs/perturbench"
LOCK = "perturbench.lock.json"
BUSY, STAGING = ".perturbench.busy", ".perturbench.download"
ALL = "all"


class Dataset(NamedTuple):
    """A data set and its files in the repository."""

    description: str
    task: str
    files: tuple[str, ...]


DATASETS = {
    "norman19": Dataset("CRISPRa with pairs, K562", "unseen pairs", ("norman19_processed.h5ad.gz",)),
    "sciplex3": Dataset("drugs, cancer lines", "unseen lines", ("sciplex3_processed.h5ad.gz",)),
    "frangieh21": Dataset(
        "CRISPR, melanoma", "unseen treatments", ("frangieh21_split.csv", "frangieh21_processed.h5ad.gz")
    ),
    "jiang24": Dataset(
        "CRISPRi with cytokines, cancer lines",
        "unseen lines, cytokines",
        ("jiang24_split.csv", "jiang24_processed.h5ad.gz"),
    ),
    "op3": Dataset("drugs, blood cells", "unseen cell types", ("op3_split.csv", "op3_processed.h5ad.gz")),
    "mcfaline23": Dataset(
        "CRISPR with drugs, glioma lines",
        "unseen lines, drugs",
        ("mcfaline23_gxe_splits.tar.gz", "mcfaline23_gxe_processed.h5ad.gz"),
    ),
}


@dataclasses.dataclass
class Lock:
    """What a folder holds: the commit of the repository, and size and checksum of each downloaded file."""

    folder: Path
    revision: str | None = None
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the lock file of a folder; an empty lock if there is none.

        Raises
        ------
        InputError
            If the file is not a lock file.
        """
        path = folder / LOCK
        if not path.exists():
            return cls(folder)
        try:
            content = read_json(path)
            return cls(folder, content["revision"], dict(content["files"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: found content that is not a lock file, expected the one of an earlier download; "
                "move it away and download again with --force"
            ) from error

    def write(self) -> None:
        """Write the lock file."""
        write_json(self.folder / LOCK, {"repository": REPOSITORY, "revision": self.revision, "files": self.files})

    def target(self, name: str) -> Path:
        """Return the path of an unpacked file: without .gz, and a folder for a .tar.gz."""
        return self.folder / name.removesuffix(".gz").removesuffix(".tar")

    def has(self, name: str) -> bool:
        """Return whether a file lies unpacked in the folder with its recorded size."""
        return name in self.files and size_on_disk(self.target(name)) == self.files[name]["unpacked_size"]


def data_folder() -> Path:
    """Return the folder of the data: the environment variable PRIMEFLOW_DATA, or ``data``."""
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
    """Download, verify and unpack data sets. Files that are already in the folder stay.

    Parameters
    ----------
    names
        Names in `DATASETS`, or "all".
    folder
        Where the files go; `data_folder` by default.
    revision
        Branch, tag or commit of the repository; by default the commit in the folder's lock file, or else main.
    force
        Download again what the folder has.
    keep
        Keep the compressed files as well.
    console
        Receives one line per file.

    Raises
    ------
    InputError
        If a name is unknown, the hub cannot be reached or lacks a file, the revision differs from the folder's, a
        checksum is wrong, an archive is damaged, or the disk is full or not writable.
    """
    files = _files(names)
    folder = data_folder() if folder is None else Path(folder)
    console = console or PlainConsole(quiet=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / BUSY, timeout=0):
            _download(files, Lock.read(folder), revision, force, keep, console)
    except Timeout as error:
        raise InputError(
            f"{folder}: found another download into this folder, expected none; wait for its end"
        ) from error
    except OSError as error:
        found, hint = error.strerror or first_line(error), "give another --folder, or free space if the disk is full"
        raise InputError(f"{folder}: found {found!r}, expected a writable folder; {hint}") from error


def dataset_table(
    folder: str | os.PathLike[str] | None = None, revision: str | None = None
) -> tuple[Table, str | None]:
    """Return a table of the data sets, and why their sizes are unknown if the hub could not be asked."""
    lock = Lock.read(data_folder() if folder is None else Path(folder))
    remote, problem = {}, None
    try:
        _, remote = _list_files(revision or lock.revision or "main")
    except InputError as error:
        problem = str(error)
    table = Table(title=f"Data sets of {REPOSITORY}", box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in ("name", "what", "task", "files", "size", "here"):
        justify = "right" if heading == "size" else "left"
        table.add_column(heading, justify=justify, no_wrap=heading not in ("what", "task"))
    for name, (description, task, files) in DATASETS.items():
        size = decimal(sum(remote[file].size for file in files if file in remote)) if remote else "?"
        here = "yes" if all(map(lock.has, files)) else "in part" if any(map(lock.has, files)) else "no"
        table.add_row(name, description, task, "\n".join(lock.target(file).name for file in files), size, here)
    return table, problem


def hub_endpoint() -> str:
    """Return the address of the Hugging Face hub: the environment variable HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; -1 if there is neither."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else -1


def _files(names: Sequence[str]) -> list[str]:
    """Return the files of data sets, each once."""
    for name in names:
        if name != ALL and name not in DATASETS:
            match = nearest(name, DATASETS)
            hint = f"; did you mean {match!r}?" if match else ""
            raise InputError(
                f"data set {name!r}: found no such name, expected one of {', '.join(DATASETS)} or {ALL}{hint}"
            )
    return [file for name, dataset in DATASETS.items() if name in names or ALL in names for file in dataset.files]


def _download(
    names: Sequence[str], lock: Lock, revision: str | None, force: bool, keep: bool, console: Console
) -> None:
    def report(line: str) -> None:
        console.print(line)

    if not force:
        for name in filter(lock.has, names):
            report(f"{lock.target(name)} is already there")
        names = [name for name in names if not lock.has(name)]
        if not names and revision is None:
            return
        for path in filter(Path.exists, map(lock.target, names)):
            raise InputError(
                f"{path}: found a file that {LOCK} does not record in this form, expected none; move it away, or "
                "replace it with --force"
            )
    commit, remote = _list_files(revision or lock.revision or "main")
    if lock.revision not in (None, commit):
        raise InputError(
            f"{lock.folder / LOCK}: found commit {lock.revision}, expected {commit}, which {revision!r} stands for; "
            "omit --revision to keep the commit of the folder, or give another --folder"
        )
    for name in names:
        if name not in remote:
            raise InputError(
                f"{name}: found no such file in {REPOSITORY} at {hub_endpoint()}, commit {commit}, expected one; "
                "give another --revision"
            )
    _check_space(lock.folder, [remote[name] for name in names])
    # Pin the commit first, so that an interrupted download continues with it.
    lock.revision = commit
    lock.write()
    for name in names:
        _fetch(remote[name], lock, keep, console)
        report(f"{lock.target(name)} is there ({decimal(size_on_disk(lock.target(name)))})")


def _check_space(folder: Path, files: Sequence[Any]) -> None:
    needed = sum(file.size for file in files)
    # The largest file is on the disk both packed and unpacked for a while, and unpacking does not shrink it.
    needed += max((file.size for file in files if file.rfilename.endswith(".gz")), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: found {decimal(free)} free on the disk, expected at least {decimal(needed)}; free some, or "
            "give another --folder"
        )


def _list_files(revision: str) -> tuple[str, dict[str, Any]]:
    """Return the commit of a branch, tag or commit of the repository, and its files (`RepoSibling`) by name."""
    from huggingface_hub import HfApi

    with _hub_errors(revision):
        api = HfApi(endpoint=hub_endpoint())
        info = api.dataset_info(REPOSITORY, revision=revision, files_metadata=True, timeout=10)
        return info.sha, {file.rfilename: file for file in info.siblings}


def _fetch(file: Any, lock: Lock, keep: bool, console: Console) -> None:
    """Download, verify, unpack and record one file. A complete staged download is used again."""
    from huggingface_hub import hf_hub_download

    name, staging = file.rfilename, lock.folder / STAGING
    with _hub_errors(lock.revision):
        settings = {"repo_type": "dataset", "revision": lock.revision, "endpoint": hub_endpoint()}
        packed = Path(hf_hub_download(REPOSITORY, name, local_dir=staging, **settings))
    target = lock.target(name)
    unpacked = staging / target.name
    try:
        with console.status(f"verifying {name}"):
            sha256 = _verify(file, packed)
        with console.status(f"unpacking {name}"):
            if name.endswith(".tar.gz"):
                shutil.rmtree(unpacked, ignore_errors=True)
                untar(packed, unpacked)
            elif name.endswith(".gz"):
                gunzip(packed, unpacked)
    except InputError:
        shutil.rmtree(staging)
        raise
    if target.is_dir():
        shutil.rmtree(target)
    unpacked.replace(target)
    if keep and packed != unpacked:
        packed.replace(lock.folder / name)
    shutil.rmtree(staging)
    lock.files[name] = {"size": file.size, "sha256": sha256, "unpacked_size": size_on_disk(target)}
    lock.write()


def _verify(file: Any, path: Path) -> str:
    """Return the SHA-256 of a download; `InputError` if its checksum differs from the hub's."""
    sha256 = file_hash(path)
    if file.lfs is not None:
        found, expected = sha256, file.lfs.sha256
    else:  # A small file, for which the hub knows the name of its blob in git.
        content = path.read_bytes()
        found, expected = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), file.blob_id
    if found != expected:
        raise InputError(
            f"{file.rfilename}: found checksum {found}, expected {expected} according to the hub; the damaged copy is "
            "deleted, download it again"
        )
    return sha256


@contextmanager
def _hub_errors(revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into `InputError`."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    endpoint = hub_endpoint()
    try:
        yield
    except RevisionNotFoundError as error:
        raise InputError(
            f"{REPOSITORY}: found no revision {revision!r} at {endpoint}, expected a branch, tag or commit; omit "
            "--revision for the one of the folder, or main"
        ) from error
    # The bases of the hub's error include that of its HTTP client: requests, httpx or a later one. The other errors are
    # those of an answer that is not the hub's, such as a login page.
    except (OSError, ValueError, KeyError, TypeError, *HfHubHTTPError.__bases__) as error:
        if getattr(error, "errno", None) is not None:
            raise  # The disk is at fault.
        raise InputError(
            f"{REPOSITORY} cannot be downloaded from {endpoint} ({first_line(error.__cause__ or error)}); check the "
            "network, HTTPS_PROXY and HF_ENDPOINT, then repeat the command"
        ) from error
