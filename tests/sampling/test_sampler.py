import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.sampling import sampler as sampler_module
from primeflow_perturbench.sampling.batch_size import TILE, BatchSize
from primeflow_perturbench.sampling.sampler import Sampler, condition_generator, gather
from primeflow_perturbench.sampling.transfer import HostCopy

N_GENES, WIDTH = 5, 3
# Flat vectors: two perturbations and the null flag.
NULL = torch.tensor([0.0, 0.0, 1.0])
VECTORS = {"A": torch.tensor([1.0, 0, 0]), "B": torch.tensor([0, 1.0, 0]), "C": torch.tensor([1.0, 1.0, 0])}
MIDPOINT, DOPRI5 = ODESolver("midpoint", steps=4), ODESolver("dopri5")
SOLVERS = pytest.mark.parametrize("solver", [MIDPOINT, DOPRI5], ids=["midpoint", "dopri5"])


class Network:
    """A fixed nonlinear velocity that records the number of rows of each call."""

    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(N_GENES + 1 + WIDTH, 32), nn.Tanh(), nn.Linear(32, N_GENES))
        self.rows = []

    def __call__(self, x, t, condition):
        assert len(x) == len(t) == len(condition)
        self.rows.append(len(x))
        with torch.no_grad():
            return 3 * self.layers(torch.cat([x, t[:, None], condition], dim=1))


class SharedPasses(Sampler):
    """Several tiles share a forward pass, as on an accelerator."""

    def _together(self, condition):
        if self.batch_size.tiles is None:
            self.batch_size.measure(lambda: self._evaluate_tile(condition), torch.device("cuda"))
        return self.batch_size.tiles


def conditions(vectors):
    return Condition.from_vector(vectors, 2)


def repeated(**cells):
    """Conditions: each name as often as its number says."""
    return conditions(torch.cat([VECTORS[name].repeat(n, 1) for name, n in cells.items()]))


def sampler_of(kind=Sampler, network=None, solver=MIDPOINT, sample_batch_size=256, **settings):
    batch_size = BatchSize(sample_batch_size)
    null = conditions(NULL[None])
    return kind(network or Network(), Condition.vector, N_GENES, null, solver, batch_size=batch_size, **settings)


def cells_of(sampler, condition, **finish):
    """Cells of a sampler, one for each row of the conditions."""
    return gather(condition, N_GENES, lambda *requested: sampler.stream(*requested, **finish))


def generated(condition, kind=Sampler, network=None, **settings):
    return cells_of(sampler_of(kind, network, **settings), condition)


def gaussian_flow(x, t, condition):
    """Exact velocity for independent genes: control cells N(2, 0.5^2), all others N(-1, 1.5^2)."""
    treated = condition[:, :2].any(1, keepdim=True)
    mean, std = torch.where(treated, -1.0, 2.0), torch.where(treated, 1.5, 0.5)
    t = t[:, None]
    return mean + (t * std**2 - (1 - t)) * (x - t * mean) / (t**2 * std**2 + (1 - t) ** 2)


def test_control_cells_are_transported_by_both_flows():
    """Both flows of a Gaussian are affine, so the counterfactual of a point has a closed form."""
    points, time = torch.linspace(-1, 3, N_GENES), 0.6
    settings = {
        "source": lambda condition, n, generator: (points.expand(n, -1), condition.as_control()),
        "encode_from": time,
    }
    cells = generated(repeated(A=3), network=gaussian_flow, solver=ODESolver("midpoint", 400), **settings)
    encoded = (points - time * 2.0) / (time**2 * 0.5**2 + (1 - time) ** 2) ** 0.5
    torch.testing.assert_close(cells, (-1 + 1.5 * encoded).expand(3, -1), atol=2e-3, rtol=0)
    plain = generated(repeated(A=3), **settings)
    assert (plain - cells).abs().max() > 0.5


def noise(condition, seed=0):
    """Cells of a zero velocity: the noise at which they start."""
    return generated(condition, network=lambda x, t, c: torch.zeros_like(x), seed=seed)


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
    for name, start, n in (("A", 0, 40), ("B", 40, 5), ("C", 45, 20)):
        rows = (condition.vector() == VECTORS[name]).all(dim=1)
        assert torch.equal(cells[rows], ordered[start : start + n])


@SOLVERS
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 40])
def test_a_smaller_request_gets_the_first_cells_of_a_larger_one(solver, n):
    assert torch.equal(generated(repeated(A=n), solver=solver), generated(repeated(A=70), solver=solver)[:n])


@SOLVERS
def test_other_conditions_in_the_call_change_no_bit(solver):
    together = generated(repeated(A=40, B=5, C=70), solver=solver)
    apart = torch.cat([generated(repeated(**{name: n}), solver=solver) for name, n in (("A", 40), ("B", 5), ("C", 70))])
    assert torch.equal(together, apart)


def test_seeds_and_conditions_have_independent_noise():
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
    """Sums of embeddings give -0.0 or 0.0, depending on the order of additions."""
    negative = conditions(torch.tensor([[1.0, -0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(generated(negative), generated(repeated(A=2)))
    assert torch.equal(*(condition_generator(0, key).get_state() for key in negative.row_keys()))


def test_gather_asks_once_for_each_condition_in_order_of_first_appearance():
    asked = []

    def stream(condition, counts):
        asked.append((condition.vector().tolist(), counts))
        yield from ((row, 0, torch.full((n, N_GENES), float(row))) for row, n in enumerate(counts))

    cells = gather(conditions(torch.stack([VECTORS[name] for name in "BABCA"])), N_GENES, stream)
    assert asked == [([VECTORS[name].tolist() for name in "BAC"], [2, 2, 1])]
    assert cells[:, 0].tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(("guidance", "factor"), [(1.0, 1), (3.0, 2), (0.0, 1)])
@pytest.mark.parametrize("sample_batch_size", [1, 32, 70, 128])
@pytest.mark.parametrize("kind", [Sampler, SharedPasses])
def test_a_pass_has_at_most_the_allowed_number_of_rows(kind, guidance, factor, sample_batch_size):
    network = Network()
    generated(repeated(A=200, B=5), kind, network, guidance=guidance, sample_batch_size=sample_batch_size)
    most = max(TILE, sample_batch_size)
    assert max(network.rows) <= factor * most
    assert max(network.rows) == factor * (TILE if kind is Sampler else TILE * (most // TILE))


@SOLVERS
def test_the_velocity_is_evaluated_as_often_as_the_solver_declares(solver):
    network = Network()
    generated(repeated(A=40, B=5), network=network, solver=solver)
    if solver.evaluations:
        assert len(network.rows) == 3 * solver.evaluations
    assert set(network.rows) == {TILE}


@pytest.mark.parametrize("sample_batch_size", [1, 64, 512])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tiles_that_share_a_pass_agree_to_rounding(sample_batch_size, guidance):
    condition = repeated(A=40, B=5, C=70)
    shared = generated(condition, SharedPasses, guidance=guidance, sample_batch_size=sample_batch_size)
    alone = generated(condition, guidance=guidance)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert alone.std() > 0.1


def test_tiles_of_several_conditions_fill_a_pass():
    network = Network()
    generated(repeated(A=40, B=5, C=70), SharedPasses, network, sample_batch_size=100)
    assert network.rows == [3 * TILE] * 2 * MIDPOINT.evaluations


def test_tiles_share_a_pass_on_an_accelerator_unless_the_solver_is_adaptive():
    gpu = SimpleNamespace(is_null=SimpleNamespace(device=torch.device("cuda")))
    assert sampler_of(sample_batch_size=100)._together(gpu) == 3
    assert sampler_of(sample_batch_size=100)._together(repeated(A=1)) == 1
    assert sampler_of(solver=DOPRI5, sample_batch_size=100)._together(gpu) == 1


def test_a_velocity_towards_a_mean_gives_the_closed_form():
    """dx/dt = mu_c - x from noise gives x(1) = mu_c + (x(0) - mu_c) / e, for each condition its own mu_c."""
    means = torch.randn(WIDTH, N_GENES, generator=torch.Generator().manual_seed(0))
    condition = repeated(A=40, B=5, C=20)
    x_0, mu = noise(condition, seed=4), condition.vector() @ means
    cells = generated(condition, network=lambda x, t, c: c @ means - x, solver=ODESolver("midpoint", 300), seed=4)
    torch.testing.assert_close(cells, mu + (x_0 - mu) * torch.exp(torch.tensor(-1.0)), rtol=1e-5, atol=1e-5)
    assert (cells - x_0).abs().max() > 0.5


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_shifts_the_mean_by_its_strength(w):
    """With v = c A, guided cells are x(0) + (null + w (c - null)) A."""
    means = torch.randn(WIDTH, N_GENES, generator=torch.Generator().manual_seed(0))
    condition = repeated(A=40, C=3)
    expected = noise(condition) + (NULL + w * (condition.vector() - NULL)) @ means
    cells = generated(condition, network=lambda x, t, c: c @ means, guidance=w)
    torch.testing.assert_close(cells, expected, rtol=1e-5, atol=1e-5)


def test_finish_is_applied_to_every_cell():
    condition = repeated(A=40, B=5)
    finished = cells_of(sampler_of(), condition, finish=lambda x: 2 * x + 1)
    assert torch.equal(finished, 2 * generated(condition) + 1)


def test_a_request_for_no_cells_computes_nothing():
    network = Network()
    assert generated(repeated(A=0), network=network).shape == (0, N_GENES)
    assert network.rows == []


def test_a_negative_guidance_is_an_error():
    with pytest.raises(ValueError, match="guidance must be at least 0, got -1"):
        generated(repeated(A=1), guidance=-1)


# --- streams


def streamed(names, counts, kind=Sampler, **settings):
    """Cells by name of a stream of named conditions, checked to come in order and without a gap."""
    condition = conditions(torch.stack([VECTORS[name] for name in names]))
    cells = {name: torch.empty(0, N_GENES) for name in names}
    last = 0
    for row, first, block in sampler_of(kind, **settings).stream(condition, counts):
        assert row >= last
        assert first == len(cells[names[row]])
        cells[names[row]] = torch.cat([cells[names[row]], block])
        last = row
    assert [len(block) for block in cells.values()] == list(counts)
    return cells


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sample_batch_size", [1, 512])
def test_a_stream_has_the_bits_of_gathered_cells(solver, guidance, sample_batch_size):
    settings = {"solver": solver, "guidance": guidance, "sample_batch_size": sample_batch_size}
    cells = streamed("ABC", [40, 5, 70], **settings)
    assert torch.equal(torch.cat(list(cells.values())), generated(repeated(A=40, B=5, C=70), **settings))


@SOLVERS
def test_a_streamed_cell_depends_on_neither_order_nor_counts_nor_other_conditions(solver):
    first, turned = streamed("ABC", [40, 5, 70], solver=solver), streamed("CAB", [33, 64, 1], solver=solver)
    for name, n in {"A": 40, "B": 1, "C": 33}.items():
        assert torch.equal(first[name][:n], turned[name][:n])
    assert torch.equal(streamed("B", [5], solver=solver)["B"], first["B"])
    assert not torch.equal(first["A"][:5], first["B"])


def test_a_stream_of_shared_passes_is_in_order_and_agrees_to_rounding():
    shared = streamed("ABC", [40, 5, 70], SharedPasses, sample_batch_size=100)
    for name, cells in streamed("ABC", [40, 5, 70]).items():
        torch.testing.assert_close(shared[name], cells, rtol=1e-5, atol=1e-5)


def test_a_stream_computes_only_what_is_taken_from_it():
    network = Network()
    blocks = sampler_of(network=network).stream(repeated(A=1, B=1), [10**9, 1])
    assert network.rows == []
    _, _, cells = next(blocks)
    assert len(cells) == TILE
    assert len(network.rows) == MIDPOINT.evaluations


def test_a_row_without_cells_is_skipped():
    assert len(streamed("ABC", [3, 0, 2])["B"]) == 0


def test_a_stream_needs_a_count_for_every_row():
    with pytest.raises(ValueError, match="shorter"):
        list(sampler_of().stream(repeated(A=1, B=1), [1]))


# --- too little memory


class SmallDevice(Network):
    """A velocity that runs out of memory beyond ``most`` rows."""

    def __init__(self, most):
        super().__init__()
        self.most, self.failed = most, []

    def __call__(self, x, t, condition):
        if len(x) > self.most:
            self.failed.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(x, t, condition)


def test_a_pass_that_is_too_large_is_halved_until_it_fits_and_stays_halved(caplog):
    condition, network = repeated(A=300, B=5, C=300), SmallDevice(3 * TILE)
    sampler = sampler_of(SharedPasses, network, sample_batch_size=16 * TILE)
    with caplog.at_level(logging.WARNING):
        cells = cells_of(sampler, condition)
    assert network.failed == [16 * TILE, 8 * TILE, 4 * TILE]
    assert set(network.rows) == {2 * TILE, TILE}
    torch.testing.assert_close(cells, generated(condition), rtol=1e-5, atol=1e-5)
    assert len(caplog.records) == 1
    assert "too little memory for 512 cells in a forward pass; continuing with 256" in caplog.text
    cells_of(sampler, condition)
    assert len(network.failed) == 3


def test_a_batch_that_runs_out_of_memory_halfway_is_repeated():
    """The second evaluation of the second batch fails once; no cell is lost, doubled or changed."""

    class OnceFull(Network):
        failed = False

        def __call__(self, x, t, condition):
            if len(self.rows) == MIDPOINT.evaluations + 1 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(x, t, condition)

    condition, network = repeated(A=200, B=5), OnceFull()
    cells = generated(condition, SharedPasses, network, sample_batch_size=2 * TILE)
    assert network.failed
    torch.testing.assert_close(cells, generated(condition), rtol=1e-5, atol=1e-5)
    assert len(cells.unique(dim=0)) == 205


def test_a_tile_that_does_not_fit_is_an_input_error():
    with pytest.raises(
        InputError, match="too little memory to generate 32 cells, the minimum; free its memory, use a smaller"
    ):
        generated(repeated(A=200), SharedPasses, SmallDevice(TILE - 1), sample_batch_size=128)


def test_other_errors_of_the_network_are_raised():
    def broken(x, t, condition):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        generated(repeated(A=5), network=broken)


# --- computing ahead of the copies to the CPU


class Ahead(SharedPasses):
    """A batch is launched before the previous one is finished, as on a GPU."""

    def _ahead(self, device):
        return True


def test_the_next_batch_is_launched_before_the_previous_one_is_waited_for(monkeypatch):
    events = []

    class Logged(HostCopy):
        def __init__(self, x):
            super().__init__(x)
            self.number = sum(event.startswith("launch") for event in events)
            events.append(f"launch {self.number}")

        def wait(self):
            events.append(f"wait {self.number}")
            return super().wait()

    monkeypatch.setattr(sampler_module, "HostCopy", Logged)
    cells = generated(repeated(A=5 * TILE), Ahead, sample_batch_size=2 * TILE)
    assert events == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
    events.clear()
    assert torch.equal(cells, generated(repeated(A=5 * TILE), SharedPasses, sample_batch_size=2 * TILE))
    assert events == ["launch 0", "wait 0", "launch 1", "wait 1", "launch 2", "wait 2"]


def test_a_stream_that_computes_ahead_is_in_order_and_complete():
    ahead = streamed("ABC", [40, 5, 70], Ahead, sample_batch_size=64)
    for name, cells in streamed("ABC", [40, 5, 70], SharedPasses, sample_batch_size=64).items():
        assert torch.equal(ahead[name], cells)


def test_only_a_gpu_computes_ahead():
    assert sampler_of()._ahead(torch.device("cuda"))
    assert not sampler_of()._ahead(torch.device("cpu"))


# --- measured batch size


def test_auto_measures_one_tile_with_guidance_before_the_first_batch(monkeypatch):
    network = Network()

    def three(self, evaluate, device):
        evaluate()
        self.tiles = 3

    monkeypatch.setattr(BatchSize, "measure", three)
    cells = generated(repeated(A=6 * TILE), SharedPasses, network, guidance=3.0, sample_batch_size="auto")
    assert network.rows == [2 * TILE] + [6 * TILE] * 2 * MIDPOINT.evaluations
    torch.testing.assert_close(cells, generated(repeated(A=6 * TILE), guidance=3.0), rtol=1e-5, atol=1e-5)


def test_auto_is_one_tile_on_the_cpu():
    network = Network()
    generated(repeated(A=70), network=network, sample_batch_size="auto")
    assert set(network.rows) == {TILE}
