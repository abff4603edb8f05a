import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool, ControlSurvey

P = 2
COVARIATES = {"line": ["alpha", "beta"], "dose": None}
# perturbation (2) | line (2) | dose | null
CONTROL_ALPHA, CONTROL_BETA = [0.0, 0, 1, 0, 5], [0.0, 0, 0, 1, 5]
G0_ALPHA, G0_BETA, G0_LOW = [1.0, 0, 1, 0, 5], [1.0, 0, 0, 1, 5], [1.0, 0, 1, 0, 2.5]


def vectors(*conditions):
    return torch.tensor([[*condition, 0.0] for condition in conditions])


def marked(*marks):
    """Cells that can be told apart: all three genes of each have its mark."""
    return torch.tensor(marks, dtype=torch.float32)[:, None].expand(-1, 3)


def surveyed(most=10):
    survey = ControlSurvey(P, most)
    survey.add(vectors(CONTROL_ALPHA, G0_ALPHA, CONTROL_BETA, CONTROL_ALPHA), marked(1, 2, 3, 4))
    survey.add(vectors(G0_BETA, CONTROL_ALPHA, CONTROL_BETA), marked(5, 6, 7))
    return survey


def pool_of(survey, encode=lambda x: x):
    return ControlPool.of(survey, encode, COVARIATES)


def drawn(pool, condition, n=200):
    rows = pool.context_rows(vectors(condition)).expand(n)
    return pool.draw(rows, torch.linspace(0, 1 - 1e-6, n))[:, 0].tolist()


def test_cells_are_controls_of_the_same_covariates_and_all_of_them():
    pool = pool_of(surveyed())
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0, 6.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0} == set(drawn(pool, CONTROL_BETA))


def test_each_control_is_drawn_as_often():
    cells = drawn(pool_of(surveyed()), G0_ALPHA, n=3000)
    assert [cells.count(mark) for mark in (1.0, 4.0, 6.0)] == [1000, 1000, 1000]


def test_the_first_of_a_combination_are_kept():
    survey = surveyed(most=2)
    assert survey.complete
    pool = pool_of(survey)
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0}
    assert not surveyed(most=3).complete


def test_processes_together_keep_as_many():
    other = ControlSurvey(P, 4)
    other.add(vectors(CONTROL_ALPHA, CONTROL_ALPHA, CONTROL_BETA), marked(8, 9, 10))
    pool = pool_of(ControlSurvey.of_all([surveyed(4), other]))
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0, 6.0, 8.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0, 10.0}


def test_cells_are_kept_in_the_space_of_the_flow():
    pool = pool_of(surveyed(), encode=lambda x: 10 * x[:, :2])
    assert pool.cells.shape == (5, 2)
    assert set(drawn(pool, G0_ALPHA)) == {10.0, 40.0, 60.0}


def test_a_number_that_rounds_up_to_one_is_the_last_control():
    pool = pool_of(surveyed())
    rows = pool.context_rows(vectors(G0_ALPHA))
    assert pool.draw(rows, torch.tensor([1.0]))[0, 0] == 6


def test_a_combination_without_controls_is_named():
    survey = surveyed()
    survey.add(vectors(G0_LOW), marked(9))
    assert not survey.complete
    with pytest.raises(InputError, match=r"no control cells with line=alpha, dose=2\.5 are among the training cells"):
        pool_of(survey)
    with pytest.raises(InputError, match=r"no control cells with line=alpha, dose=2\.5 are among the training cells"):
        pool_of(surveyed()).context_rows(vectors(G0_ALPHA, G0_LOW))


def test_the_null_condition_has_no_controls():
    with pytest.raises(InputError, match="the null condition has none"):
        pool_of(surveyed()).context_rows(torch.tensor([[0.0, 0, 0, 0, 0, 1]]))


def test_without_covariates_all_controls_are_one_pool():
    survey = ControlSurvey(P, 10)
    survey.add(torch.tensor([[0.0, 0, 0], [1, 0, 0]]), marked(1, 2))
    pool = ControlPool.of(survey, lambda x: x, {})
    assert pool.context_rows(torch.tensor([[0.0, 1, 0]])).tolist() == [0]
    assert pool.cells[:, 0].tolist() == [1]
    none = ControlSurvey(P, 10)
    none.add(torch.tensor([[1.0, 0, 0]]), marked(2))
    with pytest.raises(InputError, match="but no control cells are among the training cells"):
        ControlPool.of(none, lambda x: x, {})


def test_its_state_gives_it_back():
    pool = pool_of(surveyed())
    again = ControlPool.from_state(pool.state())
    assert drawn(again, G0_ALPHA) == drawn(pool, G0_ALPHA)
    assert again.covariates == COVARIATES
