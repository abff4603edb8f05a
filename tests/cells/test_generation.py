import pytest
import torch
from torch import nn

from primeflow_perturbench.cells.generation import TILE, CellGenerator, condition_generator, group_rows
from primeflow_perturbench.flow.sampling import ODESolver

N_GENES, WIDTH = 5, 3
NULL = torch.tensor([0.0, 0.0, 1.0])
A, B, C = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.tensor([1.0, 1.0, 0])
MIDPOINT, DOPRI5 = ODESolver("midpoint", steps=4), ODESolver("dopri5")
SOLVERS = pytest.mark.parametrize("solver", [MIDPOINT, DOPRI5], ids=["midpoint", "dopri5"])


class Network:
    """A fixed nonlinear velocity that keeps how many rows each call had."""

    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(N_GENES + 1 + WIDTH, 32), nn.Tanh(), nn.Linear(32, N_GENES))
        self.rows = []

    def __call__(self, x, t, condition):
        assert len(x) == len(t) == len(condition)
        self.rows.append(len(x))
        with torch.no_grad():
            return 3 * self.layers(torch.cat([x, t[:, None], condition], dim=1))


class SharedForwards(CellGenerator):
    """Several tiles in a forward, as on an accelerator."""

    def _batches(self, condition, counts):
        tiles, most = list(self._tiles(condition, counts)), max(1, self.sample_batch_size // TILE)
        yield from (tiles[start : start + most] for start in range(0, len(tiles), most))


def repeated(**cells):
    """Condition vectors, so many of each named one."""
    return torch.cat([globals()[name].repeat(n, 1) for name, n in cells.items()])


def generated(condition, kind=CellGenerator, network=None, solver=MIDPOINT, **settings):
    return kind(network or Network(), N_GENES, NULL, solver, **settings).generate(condition)


def noise(condition, seed=0):
    """Cells of a velocity of zero, which are the noise that they start from."""
    return CellGenerator(lambda x, t, c: torch.zeros_like(x), N_GENES, NULL, MIDPOINT, seed=seed).generate(condition)


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_batch_size_changes_no_bit(solver, guidance):
    condition = repeated(A=40, B=5, C=70)
    cells = [generated(condition, solver=solver, guidance=guidance, sample_batch_size=n) for n in (1, 7, 512)]
    assert cells[0].shape == (115, N_GENES)
    assert cells[0].isfinite().all()
    assert torch.equal(cells[0], cells[1])
    assert torch.equal(cells[0], cells[2])
    assert len(cells[0].unique(dim=0)) == 115


@SOLVERS
def test_the_order_of_conditions_changes_no_bit(solver):
    ordered = generated(repeated(A=40, B=5, C=20), solver=solver)
    turned = generated(repeated(C=20, A=40, B=5), solver=solver)
    assert torch.equal(turned, torch.cat([ordered[45:], ordered[:45]]))
    mixed = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    condition = repeated(A=40, B=5, C=20)[mixed]
    cells = generated(condition, solver=solver)
    for vector, start, n in ((A, 0, 40), (B, 40, 5), (C, 45, 20)):
        rows = (condition == vector).all(dim=1)
        assert torch.equal(cells[rows], ordered[start : start + n])


@SOLVERS
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 40])
def test_fewer_cells_are_the_first_of_more(solver, n):
    assert torch.equal(generated(repeated(A=n), solver=solver), generated(repeated(A=70), solver=solver)[:n])


@SOLVERS
def test_other_conditions_in_the_call_change_no_bit(solver):
    together = generated(repeated(A=40, B=5, C=70), solver=solver)
    apart = torch.cat([generated(repeated(**{name: n}), solver=solver) for name, n in (("A", 40), ("B", 5), ("C", 70))])
    assert torch.equal(together, apart)


def test_another_seed_and_another_condition_give_other_noise():
    first = noise(repeated(A=40))
    assert torch.equal(first, noise(repeated(A=40)))
    assert not torch.isclose(first, noise(repeated(A=40), seed=1)).any()
    assert not torch.isclose(first, noise(repeated(B=40))).any()
    both = noise(repeated(A=5000, B=5000))
    assert both.mean() == pytest.approx(0, abs=0.03)
    assert both.var() == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(torch.stack([both[:5000].flatten(), both[5000:].flatten()]))[0, 1]
    assert abs(correlation) < 0.03


@pytest.mark.parametrize("seed", [-1, 0, 2**40])
def test_any_whole_number_is_a_seed(seed):
    assert torch.equal(noise(repeated(A=3), seed), noise(repeated(A=3), seed))
    assert not torch.equal(noise(repeated(A=3), seed), noise(repeated(A=3), seed + 1))


def test_sampling_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    noise(repeated(A=3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_negative_zero_is_the_same_condition():
    """Sums of embeddings give -0.0 or 0.0 as the arithmetic happens to fall."""
    negative = torch.tensor([[1.0, -0.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(generated(negative), generated(repeated(A=2)))
    assert len(group_rows(negative)) == 1
    states = [condition_generator(0, vector).get_state() for vector in negative]
    assert torch.equal(*states)


def test_rows_are_grouped_in_order_of_first_appearance():
    condition = torch.stack([B, A, B, C, A])
    groups = group_rows(condition)
    assert [rows.tolist() for _, rows in groups] == [[0, 2], [1, 4], [3]]
    for (vector, _), expected in zip(groups, (B, A, C), strict=True):
        assert torch.equal(vector, expected)


@pytest.mark.parametrize(("guidance", "factor"), [(1.0, 1), (3.0, 2), (0.0, 1)])
@pytest.mark.parametrize("sample_batch_size", [1, 32, 70, 128])
@pytest.mark.parametrize("kind", [CellGenerator, SharedForwards])
def test_the_velocity_never_sees_more_rows_than_allowed(kind, guidance, factor, sample_batch_size):
    network = Network()
    generated(repeated(A=200, B=5), kind, network, guidance=guidance, sample_batch_size=sample_batch_size)
    most = max(TILE, sample_batch_size)
    assert max(network.rows) <= factor * most
    assert max(network.rows) == factor * (TILE if kind is CellGenerator else TILE * (most // TILE))


@SOLVERS
def test_the_condition_is_evaluated_as_often_as_the_solver_says(solver):
    network = Network()
    generated(repeated(A=40, B=5), network=network, solver=solver)
    if solver.evaluations:
        assert len(network.rows) == 3 * solver.evaluations
    assert set(network.rows) == {TILE}


@pytest.mark.parametrize("sample_batch_size", [1, 64, 512])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tiles_that_share_a_forward_agree_to_rounding(sample_batch_size, guidance):
    condition = repeated(A=40, B=5, C=70)
    shared = generated(condition, SharedForwards, guidance=guidance, sample_batch_size=sample_batch_size)
    alone = generated(condition, guidance=guidance)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert alone.std() > 0.1


def test_several_tiles_of_several_conditions_are_batched_in_full():
    class Meta(torch.Tensor):
        """A tensor that says that it lives on an accelerator."""

        @property
        def device(self):
            return torch.device("cuda")

    condition, counts = torch.stack([A, B, C]), [40, 5, 70]
    generator = CellGenerator(Network(), N_GENES, NULL, MIDPOINT, sample_batch_size=100)
    lengths = [len(batch) for batch in generator._batches(condition.as_subclass(Meta), counts)]
    assert lengths == [3, 3]
    adaptive = CellGenerator(Network(), N_GENES, NULL, DOPRI5, sample_batch_size=100)
    assert [len(batch) for batch in adaptive._batches(condition.as_subclass(Meta), counts)] == [1] * 6
    assert [len(batch) for batch in generator._batches(condition, counts)] == [1] * 6


def test_a_velocity_towards_a_mean_gives_the_closed_form():
    """dx/dt = mu_c - x from noise gives x(1) = mu_c + (x(0) - mu_c) / e, for each condition its own mu_c."""
    means = torch.randn(WIDTH, N_GENES, generator=torch.Generator().manual_seed(0))
    condition = repeated(A=40, B=5, C=20)
    x_0, mu = noise(condition, seed=4), condition @ means
    generator = CellGenerator(lambda x, t, c: c @ means - x, N_GENES, NULL, ODESolver("rk4", 20), seed=4)
    cells = generator.generate(condition)
    torch.testing.assert_close(cells, mu + (x_0 - mu) * torch.exp(torch.tensor(-1.0)), rtol=1e-5, atol=1e-5)
    assert (cells - x_0).abs().max() > 0.5


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_moves_the_mean_by_its_strength(w):
    """With v = c A, guided cells are x(0) + (null + w (c - null)) A."""
    means = torch.randn(WIDTH, N_GENES, generator=torch.Generator().manual_seed(0))
    condition = repeated(A=40, C=3)
    generator = CellGenerator(lambda x, t, c: c @ means, N_GENES, NULL, MIDPOINT, guidance=w)
    expected = noise(condition) + (NULL + w * (condition - NULL)) @ means
    torch.testing.assert_close(generator.generate(condition), expected, rtol=1e-5, atol=1e-5)


def test_finish_is_applied_to_every_cell():
    condition = repeated(A=40, B=5)
    generator = CellGenerator(Network(), N_GENES, NULL, MIDPOINT)
    plain = generator.generate(condition)
    assert torch.equal(generator.generate(condition, finish=lambda x: 2 * x + 1), 2 * plain + 1)


def test_no_cells_asked_for_are_none():
    network = Network()
    assert generated(torch.empty(0, WIDTH), network=network).shape == (0, N_GENES)
    assert network.rows == []


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sample_batch_size must be at least 1, got 0"):
        CellGenerator(Network(), N_GENES, NULL, MIDPOINT, sample_batch_size=0)


def test_a_negative_guidance_is_refused():
    with pytest.raises(ValueError, match="guidance must be at least 0, got -1"):
        CellGenerator(Network(), N_GENES, NULL, MIDPOINT, guidance=-1)


# --- streams


def streamed(names, counts, kind=CellGenerator, **settings):
    """Cells by name of a stream of named conditions, checked to come in order and without a gap."""
    condition = torch.stack([globals()[name] for name in names])
    cells = {name: torch.empty(0, N_GENES) for name in names}
    last = 0
    generator = kind(Network(), N_GENES, NULL, settings.pop("solver", MIDPOINT), **settings)
    for row, first, block in generator.stream(condition, counts):
        assert row >= last
        assert first == len(cells[names[row]])
        cells[names[row]] = torch.cat([cells[names[row]], block])
        last = row
    assert [len(block) for block in cells.values()] == list(counts)
    return cells


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sample_batch_size", [1, 512])
def test_a_stream_has_the_bits_of_generate(solver, guidance, sample_batch_size):
    settings = {"solver": solver, "guidance": guidance, "sample_batch_size": sample_batch_size}
    cells = streamed("ABC", [40, 5, 70], **settings)
    assert torch.equal(torch.cat(list(cells.values())), generated(repeated(A=40, B=5, C=70), **settings))


@SOLVERS
def test_a_stream_depends_on_neither_order_nor_counts_nor_company(solver):
    first, turned = streamed("ABC", [40, 5, 70], solver=solver), streamed("CAB", [33, 64, 1], solver=solver)
    for name, n in {"A": 40, "B": 1, "C": 33}.items():
        assert torch.equal(first[name][:n], turned[name][:n])
    assert torch.equal(streamed("B", [5], solver=solver)["B"], first["B"])
    assert not torch.equal(first["A"][:5], first["B"])


def test_a_stream_of_shared_forwards_is_in_order_and_agrees_to_rounding():
    shared = streamed("ABC", [40, 5, 70], SharedForwards, sample_batch_size=100)
    for name, cells in streamed("ABC", [40, 5, 70]).items():
        torch.testing.assert_close(shared[name], cells, rtol=1e-5, atol=1e-5)


def test_a_stream_computes_only_what_is_taken_from_it():
    network = Network()
    blocks = CellGenerator(network, N_GENES, NULL, MIDPOINT).stream(torch.stack([A, B]), [10**9, 1])
    assert network.rows == []
    _, _, cells = next(blocks)
    assert len(cells) == TILE
    assert len(network.rows) == MIDPOINT.evaluations


def test_a_row_of_no_cells_is_passed_over():
    assert len(streamed("ABC", [3, 0, 2])["B"]) == 0


def test_a_stream_needs_a_count_for_every_row():
    with pytest.raises(ValueError, match="shorter"):
        list(CellGenerator(Network(), N_GENES, NULL, MIDPOINT).stream(torch.stack([A, B]), [1]))
