"""Fetch a shared model from the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from primeflow_perturbench.data.download import hub_endpoint
from primeflow_perturbench.errors import InputError, first_line

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether a text has the form ``owner/name`` of a repository on the Hub."""
    return bool(NAME.fullmatch(name)) and ".." not in name


def fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download some files of a repository, and return their folder in the Hub's cache.

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
        If the Hub has no such repository or revision, or cannot be reached.
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
            f"{name} is no folder, and {endpoint} has no public model of this name; give the path of a folder, or "
            "owner/name of a public model"
        ) from error
    # The bases of the Hub's error include that of its HTTP client; a missing cache is an OSError.
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:
        raise InputError(
            f"{name} is no folder, and it could not be fetched from {endpoint} ({first_line(error)}); give the path of "
            "a folder, or try again"
        ) from error
