"""Perturbation labels: parser and canonical form."""

import pytest

from primeflow_perturbench.labels import canonical_label, raw_parts, split_label


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("A", ("A",)),
        ("A+B", ("A", "B")),
        ("B+A", ("A", "B")),
        ("A+A", ("A",)),
        ("B+A+B", ("A", "B")),
        ("A+control", ("A",)),
        ("control+A", ("A",)),
        ("control", ()),
        ("control+control", ()),
    ],
)
def test_split_label_sorts_parts_and_drops_repetitions_and_control(label, parts):
    assert split_label(label, "+", "control") == parts
    assert canonical_label(label, "+", "control") == ("+".join(parts) or "control")


@pytest.mark.parametrize("delimiter", [None, ""])
def test_without_a_delimiter_a_label_is_one_perturbation(delimiter):
    assert split_label("B+A", delimiter, "control") == ("B+A",)
    assert canonical_label("B+A", delimiter, "control") == "B+A"
    assert canonical_label("control", delimiter, "control") == "control"


def test_a_control_that_contains_the_delimiter_is_recognized():
    assert split_label("non-targeting", "-", "non-targeting") == ()
    assert canonical_label("non-targeting", "-", "non-targeting") == "non-targeting"


def test_a_delimiter_may_have_several_characters():
    assert canonical_label("B_and_A", "_and_", "control") == "A_and_B"


def test_empty_parts_stay_so_that_checks_can_report_them():
    assert split_label("A+", "+", "control") == ("", "A")


def test_raw_parts_are_the_label_as_written():
    assert raw_parts("B+control+A+A", "+") == ("B", "control", "A", "A")
    assert raw_parts("B+A", None) == ("B+A",)
