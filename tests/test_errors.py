"""Phrases of error messages: lists, counts and suggestions."""

from primeflow_perturbench.errors import InputError, counted, first_line, nearest, quoted, with_nearest


def test_quoted_shows_the_first_names_and_counts_the_others():
    assert quoted(["a", "b"]) == "'a', 'b'"
    assert quoted(["a", 2, "c"], limit=2) == "'a', '2' and 1 more"
    assert quoted([]) == ""


def test_counted_uses_singular_and_plural():
    assert [counted(names, "gene") for names in ([], ["a"], ["a", "b"])] == ["0 genes", "1 gene", "2 genes"]


def test_nearest_is_the_most_similar_known_name_or_none():
    assert nearest("condtion", ["cell_type", "condition", "conditions"]) == "condition"
    assert nearest("xyz", ["cell_type"]) is None
    assert nearest("xyz", []) is None


def test_with_nearest_suggests_a_known_name_for_each_unknown_name():
    assert with_nearest(["KLF2", "Q"], ["KLF1", "MYC"]) == "'KLF2' (did you mean 'KLF1'?), 'Q'"
    assert with_nearest(["Q", "R", "S"], [], limit=1) == "'Q' and 2 more"


def test_first_line_drops_the_remaining_lines_and_the_full_stop():
    assert first_line(OSError("file is cut.\nDetails follow.")) == "file is cut"
    assert first_line(KeyError()) == "KeyError"


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
