import pytest
import torch

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool, ControlReservoir

P = 2
COVARIATES = {"line": ["alpha", "beta"], "dose": None}
# perturbation (2) | line (2) | dose | null
CONTROL_ALPHA, CONTROL_BETA = [0.0, 0, 1, 0, 5], [0.0, 0, 0, 1, 5]
G0_ALPHA, G0_BETA, G0_LOW = [1.0, 0, 1, 0, 5], [1.0, 0, 0, 1, 5], [1.0, 0, 1, 0, 2.5]


def conditions(*vectors, null=0.0):
    return Condition.from_vector(torch.tensor([[*vector, null] for vector in vectors]), P)


def marked(*marks):
    """Distinguishable cells: all three genes of a cell equal its mark."""
    return torch.tensor(marks, dtype=torch.float32)[:, None].expand(-1, 3)


def reservoir_of(most=10):
    reservoir = ControlReservoir(most)
    reservoir.add(conditions(CONTROL_ALPHA, G0_ALPHA, CONTROL_BETA, CONTROL_ALPHA), marked(1, 2, 3, 4))
    reservoir.add(conditions(G0_BETA, CONTROL_ALPHA, CONTROL_BETA), marked(5, 6, 7))
    return reservoir


def pool_of(reservoir, encode=lambda x: x):
    return ControlPool.fit(reservoir, encode, COVARIATES)


def drawn(pool, condition, n=200):
    rows = pool.context_rows(conditions(condition)).expand(n)
    return pool.draw(rows, torch.linspace(0, 1 - 1e-6, n))[:, 0].tolist()


def test_all_controls_of_the_same_covariates_are_drawn_and_no_others():
    pool = pool_of(reservoir_of())
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0, 6.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0} == set(drawn(pool, CONTROL_BETA))


def test_controls_are_drawn_equally_often():
    cells = drawn(pool_of(reservoir_of()), G0_ALPHA, n=3000)
    assert [cells.count(mark) for mark in (1.0, 4.0, 6.0)] == [1000, 1000, 1000]


def test_the_first_controls_of_a_context_are_kept():
    reservoir = reservoir_of(most=2)
    assert reservoir.complete
    pool = pool_of(reservoir)
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0}
    assert not reservoir_of(most=3).complete


def test_merged_processes_keep_the_first_controls():
    other = ControlReservoir(4)
    other.add(conditions(CONTROL_ALPHA, CONTROL_ALPHA, CONTROL_BETA), marked(8, 9, 10))
    pool = pool_of(ControlReservoir.merge([reservoir_of(4), other]))
    assert set(drawn(pool, G0_ALPHA)) == {1.0, 4.0, 6.0, 8.0}
    assert set(drawn(pool, G0_BETA)) == {3.0, 7.0, 10.0}


def test_controls_are_kept_in_the_space_of_the_flow():
    pool = pool_of(reservoir_of(), encode=lambda x: 10 * x[:, :2])
    assert pool.cells.shape == (5, 2)
    assert set(drawn(pool, G0_ALPHA)) == {10.0, 40.0, 60.0}


def test_a_number_that_rounds_up_to_one_draws_the_last_control():
    pool = pool_of(reservoir_of())
    rows = pool.context_rows(conditions(G0_ALPHA))
    assert pool.draw(rows, torch.tensor([1.0]))[0, 0] == 6


def test_a_context_without_controls_is_named():
    reservoir = reservoir_of()
    reservoir.add(conditions(G0_LOW), marked(9))
    assert not reservoir.complete
    with pytest.raises(InputError, match=r"the training cells contain no control cells with line=alpha, dose=2\.5;"):
        pool_of(reservoir)
    with pytest.raises(InputError, match=r"the training cells contain no control cells with line=alpha, dose=2\.5;"):
        pool_of(reservoir_of()).context_rows(conditions(G0_ALPHA, G0_LOW))


def test_the_null_condition_has_no_controls():
    with pytest.raises(InputError, match="the null condition has none"):
        pool_of(reservoir_of()).context_rows(conditions([0.0] * 5, null=1.0))


def test_without_covariates_all_controls_form_one_pool():
    reservoir = ControlReservoir(10)
    reservoir.add(conditions([0.0, 0], [1.0, 0]), marked(1, 2))
    pool = ControlPool.fit(reservoir, lambda x: x, {})
    assert pool.context_rows(conditions([0.0, 1])).tolist() == [0]
    assert pool.cells[:, 0].tolist() == [1]
    none = ControlReservoir(10)
    none.add(conditions([1.0, 0]), marked(2))
    with pytest.raises(InputError, match="the training cells contain no control cells;"):
        ControlPool.fit(none, lambda x: x, {})


def test_a_pool_is_restored_from_its_state():
    pool = pool_of(reservoir_of())
    again = ControlPool.from_state(pool.state())
    assert drawn(again, G0_ALPHA) == drawn(pool, G0_ALPHA)
    assert again.covariates == COVARIATES
