"""Perturbation labels: the one parser and the one canonical form.

A label names the perturbations of a cell, joined by a delimiter: ``A+B``. Order and repetition do not matter, and the
control's name is no perturbation: ``A+B`` equals ``B+A``; ``A+A``, ``A+control`` and ``control+A`` equal ``A``.
"""

Parts = tuple[str, ...]


def raw_parts(label: str, delimiter: str | None) -> Parts:
    """Parts of a label as written: in order, with repetitions, empty parts and the control. For checks of labels."""
    return tuple(label.split(delimiter)) if delimiter else (label,)


def split_label(label: str, delimiter: str | None, control: str) -> Parts:
    """Perturbations that a label names, sorted and each once; none for control cells.

    Parameters
    ----------
    label
        Value of the perturbation column.
    delimiter
        Text between the perturbations of a combination; ``None`` or empty if no label is a combination.
    control
        Label of control cells. It may contain the delimiter.
    """
    return () if label == control else tuple(sorted({*raw_parts(label, delimiter)} - {control}))


def canonical_label(label: str, delimiter: str | None, control: str) -> str:
    """The one label of all labels that name the same perturbations; ``control`` for control cells."""
    return (delimiter or "").join(split_label(label, delimiter, control)) or control
