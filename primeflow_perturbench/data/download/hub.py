"""A data set repository on the Hugging Face hub: its files at one commit, and fetching one, resumed and checked."""

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from primeflow_perturbench.errors import InputError

DEFAULT_ENDPOINT = "https://huggingface.co"
BLOCK = 2**20
# Seconds to wait for the list of files.
PATIENCE = 10
# Attempts in a row that bring no byte, and the seconds between them.
ATTEMPTS = 3
PAUSE = 2
SERVER_ERROR = 500


class RemoteFile(NamedTuple):
    """A file of the repository."""

    name: str
    size: int
    sha256: str | None
    """None where git holds the file itself; then ``blob_id`` is the checksum."""
    blob_id: str | None
    """SHA-1 of git's blob."""

    @property
    def checksum(self) -> str:
        """What the bytes must hash to."""
        return self.sha256 or self.blob_id


class Snapshot(NamedTuple):
    """The repository at one commit."""

    revision: str
    files: dict[str, RemoteFile]


class Hub:
    """A data set repository on the hub that the environment variable HF_ENDPOINT names, or on the public one.

    Parameters
    ----------
    repository
        ``owner/name``.

    Raises
    ------
    InputError
        If HF_ENDPOINT is no address.
    """

    def __init__(self, repository: str):
        self.repository = repository
        # Read now: huggingface_hub itself would take the value of the moment when it was imported.
        self.endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        if not _is_address(self.endpoint):
            raise InputError(
                f"HF_ENDPOINT: found {self.endpoint!r}, expected an address like {DEFAULT_ENDPOINT}; mend or unset it"
            )

    def snapshot(self, revision: str) -> Snapshot:
        """Resolve a branch, tag or commit, and list its files.

        Raises
        ------
        InputError
            If the hub cannot be reached, or has no such repository or revision.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        api = HfApi(endpoint=self.endpoint)
        try:
            info = api.dataset_info(self.repository, revision=revision, files_metadata=True, timeout=PATIENCE)
            files = {
                file.rfilename: RemoteFile(file.rfilename, file.size, file.lfs and file.lfs.sha256, file.blob_id)
                for file in info.siblings
            }
        except RevisionNotFoundError as error:
            raise InputError(
                f"{self.repository}: found no revision {revision!r} at {self.endpoint}, expected a branch, tag or "
                "commit; leave --revision out for the pinned one or main"
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{self.repository}: found no such data set open to you at {self.endpoint}, expected a public one; "
                "check HF_ENDPOINT"
            ) from error
        except HfHubHTTPError as error:
            raise self._refused(self.repository, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.endpoint}: found an answer that is not the hub's, expected a list of files; check HF_ENDPOINT, "
                "and whether the network wants a login"
            ) from error
        except _network_errors() as error:
            raise self._unreachable(error) from error
        return Snapshot(info.sha, files)

    def fetch(self, file: RemoteFile, revision: str, partial: Path, report: Callable[[int], None]) -> None:
        """Bring ``partial`` to the whole file, from wherever it ends; what is there stays when the connection breaks.

        Parameters
        ----------
        file
            The file, of a snapshot.
        revision
            The snapshot's commit.
        partial
            Where the bytes go; may hold the first of them.
        report
            Called with the bytes held so far.

        Raises
        ------
        InputError
            If the hub refuses the file, or the connection breaks again and again.
        OSError
            If ``partial`` cannot be written.
        """
        from huggingface_hub.errors import HfHubHTTPError

        fruitless = 0
        while (held := _size(partial)) != file.size:
            if held > file.size:
                partial.unlink()
            try:
                self._continue(file, revision, partial, report)
            except _network_errors() as error:
                if getattr(error, "errno", None) is not None:
                    raise  # The disk's fault.
                if isinstance(error, HfHubHTTPError) and error.response.status_code < SERVER_ERROR:
                    raise self._refused(file.name, error) from error
                fruitless = 1 if _size(partial) > held else fruitless + 1
                if fruitless == ATTEMPTS:
                    raise self._broken(file, _size(partial), error) from error
                time.sleep(PAUSE)

    def _continue(self, file: RemoteFile, revision: str, partial: Path, report: Callable[[int], None]) -> None:
        # `hf_hub_download` throws an unfinished file away and may go round HF_ENDPOINT by Xet; this does neither.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, file.name, repo_type="dataset", revision=revision, endpoint=self.endpoint)
        # A compressed answer could not be continued at a byte of the file.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        with _quiet_hub(), _Watched(partial, report) as target:
            http_get(url, target, resume_size=target.tell(), headers=headers, expected_size=file.size)

    def _unreachable(self, error: Exception) -> InputError:
        return InputError(
            f"{self.endpoint} cannot be reached ({_reason(error)}); check the network, HTTPS_PROXY and HF_ENDPOINT, "
            "then run the same command"
        )

    def _refused(self, what: str, error: Exception) -> InputError:
        return InputError(
            f"{what}: found status {error.response.status_code} from {self.endpoint} for {self.repository}, expected "
            "the file to be open to all; check HF_ENDPOINT and your access, or try later"
        )

    def _broken(self, file: RemoteFile, held: int, error: Exception) -> InputError:
        return InputError(
            f"{file.name}: the connection to {self.endpoint} broke at {held:,} of {file.size:,} bytes "
            f"({_reason(error)}); the same command continues there"
        )


def verify(file: RemoteFile, path: Path, report: Callable[[int], None]) -> str:
    """Check the bytes of ``path`` against the hub's checksum; remove the file if they differ.

    Returns
    -------
    SHA-256 of the file, hexadecimal.

    Raises
    ------
    InputError
        If the checksum differs.
    """
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % _size(path))
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            sha256.update(block)
            if file.sha256 is None:
                blob.update(block)
            report(stream.tell())
    found = sha256.hexdigest() if file.sha256 else blob.hexdigest()
    if found != file.checksum:
        path.unlink()
        raise InputError(
            f"{file.name}: found checksum {found}, expected {file.checksum} as the hub has it; the damaged copy is "
            "removed, run the same command again"
        )
    return sha256.hexdigest()


class _Watched(io.BufferedWriter):
    """A file opened for appending that tells how far it is after every write."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(io.FileIO(path, "ab"))
        self._report = report

    def write(self, data: bytes) -> int:
        written = super().write(data)
        self._report(self.tell())
        return written


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub's own bars and warnings off the terminal."""
    from huggingface_hub import utils

    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _network_errors() -> tuple[type[Exception], ...]:
    """Errors of the connection, whichever HTTP client huggingface_hub has."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the hub's own error is the client's: requests in 0.x, httpx in 1.x, httpx2 in 2.x.
    return (OSError, *HfHubHTTPError.__bases__)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
