"""The lock file of a data folder: which commit of the repository it holds, and each file's size and checksum."""

import dataclasses
import json
from pathlib import Path
from typing import Self

from primeflow_perturbench.data.download.catalogue import REPOSITORY, Dataset, unpacked_name
from primeflow_perturbench.data.download.hub import RemoteFile
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing

LOCK = "perturbench.lock.json"


@dataclasses.dataclass
class Lock:
    """What a folder holds of the repository: the commit, and each file's size and checksum."""

    folder: Path
    revision: str | None = None
    files: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The lock of a folder; an empty one where there is none.

        Raises
        ------
        InputError
            If the lock file is not what `write` writes.
        """
        path = folder / LOCK
        if not path.exists():
            return cls(folder)
        try:
            content = json.loads(path.read_text())
            return cls(folder, content["revision"], dict(content["files"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: found content that is no lock file, expected the one of a former download; "
                "move it away and fetch with --force"
            ) from error

    def write(self) -> None:
        """Write the lock file."""
        content = {"repository": REPOSITORY, "revision": self.revision, "files": self.files}
        with replacing(self.folder / LOCK) as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def compare(self, file: RemoteFile, sha256: str) -> None:
        """Raise `InputError` if a former download of the same file had another checksum."""
        known = self.files.get(file.name, {}).get("sha256", sha256)
        if sha256 != known:
            raise InputError(
                f"{file.name}: found checksum {sha256}, expected {known} as {self.folder / LOCK} has it for the same "
                "commit; check HF_ENDPOINT, or move the lock file away if it is wrong"
            )

    def record(self, file: RemoteFile, sha256: str) -> None:
        """Note that a file is in place, and write."""
        on_disk = size_on_disk(self.folder / unpacked_name(file.name))
        self.files[file.name] = {"size": file.size, "sha256": sha256, "unpacked_size": on_disk}
        self.write()

    def holds(self, name: str) -> bool:
        """Whether a file of the repository lies unpacked in the folder as it was recorded."""
        path = self.folder / unpacked_name(name)
        return name in self.files and path.exists() and size_on_disk(path) == self.files[name]["unpacked_size"]

    def holds_all(self, dataset: Dataset) -> bool:
        """Whether nothing of a data set is left to fetch."""
        # Optional files come first: once the others are here, one without a record is none of the repository's.
        return all(map(self.holds, (*dataset.files, *(name for name in dataset.optional if name in self.files))))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
