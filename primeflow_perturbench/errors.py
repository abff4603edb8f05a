"""The error that users see, and helpers that phrase lists and suggestions in its message."""

import difflib
from collections.abc import Iterable, Sequence, Sized


class InputError(ValueError):
    """Invalid input: a file, a setting or a command-line argument that the user has to change.

    The message is one sentence that names the file, column, gene or value, says what was found and what was expected,
    and gives a hint. Commands print it without a traceback.
    """


def quoted(names: Iterable[object], limit: int = 10) -> str:
    """The first ``limit`` names in quotes and the number of the others: ``'a', 'b' and 3 more``."""
    return _listed([repr(str(name)) for name in names], limit)


def brief(value: object, length: int = 80) -> str:
    """The start of a value as Python writes it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def counted(names: Sized, noun: str) -> str:
    """The number of names with the noun in singular or plural: ``1 gene``, ``2 genes``."""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def nearest(name: object, known: Iterable[object]) -> str | None:
    """The known name that resembles ``name`` most, or ``None`` if none is close."""
    by_case = {str(other).casefold(): str(other) for other in known}
    match = difflib.get_close_matches(str(name).casefold(), by_case, n=1)
    return by_case[match[0]] if match else None


def with_nearest(unknown: Sequence[object], known: Iterable[object], limit: int = 10) -> str:
    """The first ``limit`` unknown names, each with the known name nearest to it: ``'gen1' (did you mean 'gene1'?)``."""
    known = list(known)
    matches = [(name, nearest(name, known)) for name in unknown[:limit]]
    shown = [f"{str(name)!r} (did you mean {match!r}?)" if match else repr(str(name)) for name, match in matches]
    return _listed(shown + [""] * (len(unknown) - len(shown)), limit)


def first_line(error: Exception) -> str:
    """First line of another library's error message, without its full stop; the error's class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _listed(items: Sequence[str], limit: int) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
