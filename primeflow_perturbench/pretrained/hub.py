"""A shared model on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from primeflow_perturbench.data.download import hub_endpoint
from primeflow_perturbench.errors import InputError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether a text is ``owner/name``, as the hub calls its repositories."""
    return bool(NAME.fullmatch(name)) and ".." not in name


def fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Folder of a hub's repository at a revision, with no other than some files.

    Parameters
    ----------
    name
        ``owner/name``.
    revision
        Branch, tag or commit; ``None`` is the main branch.
    files
        Names of the files.

    Raises
    ------
    InputError
        If the hub has no such repository or revision, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    endpoint = hub_endpoint()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), endpoint=endpoint))
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r} at {endpoint}; give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is no folder here, and {endpoint} has no model of this name that is open to you; give the "
            "path of a folder, or owner/name of a public model"
        ) from error
    # The base of the hub's own error is that of its HTTP client; a missing cache is a FileNotFoundError.
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{name} is no folder here, and it could not be fetched from {endpoint} ({reason}); give the path of a "
            "folder, or try again"
        ) from error
