import pytest
import torch

from primeflow_perturbench.calibration.mixed_model import (
    VARIANCES,
    Effects,
    MixedModel,
    cell_spread,
    choose_variances,
)
from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.expression.statistics import ConditionStatistics

LINES, PERTURBATIONS, GENES = ["a", "b", "c"], ["P", "Q", "R", "S"], 7
ENCODER = ConditionEncoder(len(PERTURBATIONS), {"line": LINES})


def condition(line, label):
    """One condition."""
    multi_hot = torch.tensor([[float(name in label.split("+")) for name in PERTURBATIONS]])
    return ENCODER(multi_hot, {"line": torch.tensor([[float(name == line) for name in LINES]])})


def together(conditions):
    """Conditions, each of one, as one batch."""
    conditions = list(conditions)
    vectors = torch.cat([one.vector() for one in conditions])
    return Condition.from_vector(vectors, conditions[0].perturbations.shape[1])


def screen(heldout=(("c", "P+Q"),), cells=30, noise=0.0, transfer=True, seed=0):
    """Statistics and true means of simulated conditions: line + perturbation effect, shared or the line's own."""
    generator = torch.Generator().manual_seed(seed)
    base = {line: 2 + torch.rand(GENES, generator=generator) for line in LINES}
    shared = {name: 0.5 * torch.randn(GENES, generator=generator) for name in PERTURBATIONS}
    own = {(line, name): 0.5 * torch.randn(GENES, generator=generator) for line in LINES for name in PERTURBATIONS}
    truth, statistics = {}, ConditionStatistics()
    for line in LINES:
        for label in ["control", *PERTURBATIONS, "P+Q"]:
            parts = [name for name in label.split("+") if name != "control"]
            truth[line, label] = base[line] + sum(shared[name] if transfer else own[line, name] for name in parts)
            if (line, label) not in heldout:
                values = truth[line, label] + noise * torch.randn(cells, GENES, generator=generator)
                statistics.add(condition(line, label).expand(cells), values)
    return statistics, truth


def error(model, truth, line, label):
    return float((model(condition(line, label))[0] - truth[line, label]).abs().max())


def test_shared_effects_carry_over_to_a_line_that_lacks_the_perturbation():
    statistics, truth = screen(heldout=[("c", "R"), ("c", "P+Q")])
    assert error(MixedModel.fit(ENCODER, statistics), truth, "c", "R") < 0.1
    assert float((truth["c", "control"] - truth["c", "R"]).abs().max()) > 0.5


def test_effects_of_a_pair_add_up_within_a_line_even_if_lines_share_nothing():
    statistics, truth = screen(heldout=[("c", "P+Q")], transfer=False, cells=1000)
    assert error(MixedModel.fit(ENCODER, statistics), truth, "c", "P+Q") < 0.2
    assert float((truth["c", "P"] - truth["c", "P+Q"]).abs().max()) > 0.5


def test_effects_that_lines_do_not_share_are_not_carried_over():
    """If another line's effect is uninformative, the best guess is the line without the effect."""
    far, near = [], []
    for seed in range(5):
        statistics, truth = screen(heldout=[("c", "R")], transfer=False, noise=0.3, seed=seed)
        guess = MixedModel.fit(ENCODER, statistics)(condition("c", "R"))[0]
        others = (truth["a", "R"] - truth["a", "control"] + truth["b", "R"] - truth["b", "control"]) / 2
        near.append(float((guess - truth["c", "control"]).norm()))
        far.append(float((guess - truth["c", "control"] - others).norm()))
    assert sum(near) < 0.8 * sum(far)


def test_the_posterior_equals_ridge_regression_on_explicit_effects():
    statistics, _ = screen(noise=0.5)
    model = MixedModel.fit(ENCODER, statistics)
    conditions, values, counts = statistics.tensors()
    p, line = conditions.perturbations.double(), conditions.covariates.double()
    treated = (p.sum(1, keepdim=True) > 0).double()
    blocks = [
        torch.ones(len(p), 1).double(),
        treated,
        p,
        line,
        line * treated,
        (line[:, :, None] * p[:, None]).flatten(1),
    ]
    kept = [(block, variance) for block, variance in zip(blocks, model.variances[0], strict=True) if variance > 0]
    features = torch.cat([block for block, _ in kept], 1)
    penalty = torch.cat([torch.full((block.shape[1],), 1 / float(v)) for block, v in kept]).double()
    centered = values - values.mean(0)
    spread = cell_spread(conditions, statistics.scatter(), counts)
    weighted = features.T * counts / spread
    effects = torch.linalg.solve(weighted @ features + torch.diag(penalty), weighted @ centered)
    torch.testing.assert_close(model(conditions).double(), features @ effects + values.mean(0), rtol=0, atol=1e-4)


def test_the_chosen_variances_minimize_the_true_leave_one_out_error():
    """The closed form is compared with refitting without each condition."""
    statistics, _ = screen(noise=1.0)
    conditions, values, counts = statistics.tensors()
    perturbed = conditions.perturbations.sum(1) > 0
    rest = values - values.mean(0)
    similarities = Effects.fit(ENCODER, conditions).similarities(conditions, conditions, torch.float64)
    similarities = torch.stack(list(similarities))

    def left_out(variances):
        kernel = torch.einsum("k,knm->nm", variances, similarities)
        total = 0.0
        for row in range(len(rest)):
            others = torch.arange(len(rest)) != row
            solved = torch.linalg.solve(kernel[others][:, others] + torch.diag(1 / counts[others]), rest[others])
            total += float((kernel[row, others] @ solved - rest[row]).square().sum()) * bool(perturbed[row])
        return total

    chosen, error = choose_variances(similarities, rest @ rest.T, 1 / counts, perturbed.double())
    best = left_out(chosen)
    assert error == pytest.approx(best)
    assert (chosen[[0, 1, 3, 4]] >= 0.3).all()
    for effect in range(len(chosen)):
        for value in VARIANCES if effect in (2, 5) else VARIANCES[-4:]:
            other = chosen.clone()
            other[effect] = value
            assert left_out(other) >= best - 1e-9
    assert best < 0.99 * left_out(torch.full_like(chosen, 0.3))


def test_cells_of_a_noisy_line_have_a_larger_variance():
    generator = torch.Generator().manual_seed(0)
    statistics, cells = ConditionStatistics(), {}
    for line, noise in (("a", 1.0), ("b", 3.0)):
        for label in ("control", "P"):
            cells[line, label] = 5 + noise * torch.randn(40, GENES, generator=generator, dtype=torch.float64)
            for part in cells[line, label].split(7):
                statistics.add(condition(line, label).expand(len(part)), part)
    conditions, _, counts = statistics.tensors()
    scatter = statistics.scatter()
    expected = {key: float(x.var(0, correction=0).sum()) * 40 for key, x in cells.items()}
    assert sorted(scatter.tolist()) == pytest.approx(sorted(expected.values()))
    squares = {line: expected[line, "control"] + expected[line, "P"] for line in "ab"}
    average = sum(squares.values()) / 156
    raw = {line: (squares[line] + 20 * average) / 98 for line in "ab"}
    spread = cell_spread(conditions, scatter, counts)
    ratio = float(spread.max() / spread.min())
    assert ratio == pytest.approx(raw["b"] / raw["a"])
    assert ratio > 4
    assert float(spread.mean()) == pytest.approx(1)
    assert (spread[(conditions.vector() == condition("b", "P").vector()).all(1)] > 1).all()


def programs(seed):
    """Statistics and truth of 30 perturbations in two lines: one gene program is shared, the other a line's own."""
    generator = torch.Generator().manual_seed(seed)
    encode = ConditionEncoder(30, {"line": ["a", "b"]})
    shared, own = torch.randn(30, generator=generator), torch.randn(2, 30, generator=generator)
    program = torch.zeros(2, 12)
    program[0, :6] = program[1, 6:] = 0.5
    statistics, heldout = ConditionStatistics(), []
    for line in range(2):
        for row in range(-1, 30):
            hot = torch.eye(30)[[row]] if row >= 0 else torch.zeros(1, 30)
            here = encode(hot, {"line": torch.eye(2)[[line]]})
            mean = 5 + (shared[row] * program[0] + own[line, row] * program[1] if row >= 0 else torch.zeros(12))
            if line == 1 and row >= 20:
                heldout.append((here, 5 + shared[row] * program[0]))
            else:
                statistics.add(here.expand(50), mean + 0.3 * torch.randn(50, 12, generator=generator))
    return encode, statistics, heldout


def test_components_let_each_gene_program_share_its_own_part(monkeypatch):
    """One program carries over completely, the other not at all: a single set of variances cannot do both."""

    def error(most):
        monkeypatch.setattr("primeflow_perturbench.calibration.mixed_model.MOST_COMPONENTS", most)
        found = []
        for seed in range(3):
            encode, statistics, heldout = programs(seed)
            model = MixedModel.fit(encode, statistics)
            found += [float((model(here)[0] - best).square().mean()) for here, best in heldout]
        return sum(found), len(model.components)

    separate, components = error(8)
    single, none = error(0)
    assert components >= 1
    assert none == 0
    assert separate < 0.5 * single


def test_the_prediction_for_the_null_condition_is_the_mean_of_all():
    statistics, _ = screen()
    model = MixedModel.fit(ENCODER, statistics)
    torch.testing.assert_close(model(ENCODER.null)[0], statistics.tensors()[1].mean(0).float())
    both = model(together([ENCODER.null, condition("a", "P")]))
    torch.testing.assert_close(both[1:], model(condition("a", "P")))


def test_predictions_are_never_negative():
    statistics = ConditionStatistics()
    for line, label, value in (("a", "control", 1.0), ("a", "P", 0.1), ("a", "Q", 0.1), ("b", "control", 0.5)):
        statistics.add(condition(line, label).expand(50), torch.full((50, GENES), value))
    assert (MixedModel.fit(ENCODER, statistics)(condition("b", "P+Q")) >= 0).all()


def test_batches_and_merged_parts_give_the_statistics_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    rows = together(condition(line, label) for line in LINES for label in ("control", "P", "Q+R"))
    conditions = rows[torch.randint(9, (200,), generator=generator)]
    cells = torch.rand(200, GENES, generator=generator)
    whole, parts = ConditionStatistics(), [ConditionStatistics(), ConditionStatistics()]
    whole.add(conditions, cells)
    for part, chosen in zip(parts, torch.arange(200).split(120), strict=True):
        for batch in chosen.split(50):
            part.add(conditions[batch], cells[batch])
    (found, means, counts), merged = whole.tensors(), ConditionStatistics.merge(parts).tensors()
    torch.testing.assert_close(found.vector(), merged[0].vector())
    torch.testing.assert_close(means, merged[1])
    torch.testing.assert_close(counts, merged[2])
    assert counts.sum() == 200
    key = condition("b", "Q+R").row_keys()[0]
    mine = torch.tensor([other == key for other in conditions.row_keys()])
    row = found.row_keys().index(key)
    torch.testing.assert_close(means[row], cells[mine].double().mean(0))
    assert counts[row] == mine.sum()


def test_near_values_of_a_continuous_covariate_are_similar():
    doses = ConditionEncoder(1, {"line": ["a"], "dose": None})

    def at(dose):
        return doses(torch.ones(1, 1), {"line": torch.ones(1, 1), "dose": torch.tensor([[dose]])})

    statistics = ConditionStatistics()
    for dose in (0.0, 1.0, 2.0, 3.0):
        statistics.add(at(dose).expand(100), torch.full((100, 2), 1 + dose))
    model = MixedModel.fit(doses, statistics)
    found = torch.cat([model(at(dose)) for dose in (0.2, 1.5, 2.8)])[:, 0]
    assert found[0] < found[1] < found[2]
    assert found[1] == pytest.approx(2.5, abs=0.3)


def test_effects_add_up_without_covariates():
    plain = ConditionEncoder(2, {})
    statistics = ConditionStatistics()
    for labels, value in (([0.0, 0.0], 1.0), ([1.0, 0.0], 2.0), ([0.0, 1.0], 4.0)):
        statistics.add(plain(torch.tensor([labels]), None).expand(1000), torch.full((1000, 1), value))
    pair = MixedModel.fit(plain, statistics)(plain(torch.ones(1, 2), None))
    assert float(pair) > 3


def test_two_covariates_have_effects_of_each_and_of_both_together():
    both = ConditionEncoder(2, {"line": ["a", "b"], "drug": ["x", "y", "z"]})
    conditions = together(
        both(torch.eye(2)[:1], {"line": torch.eye(2)[[i]], "drug": torch.eye(3)[[j]]})
        for i in range(2)
        for j in range(3)
    )
    effects = Effects.fit(both, conditions).similarities(conditions, conditions, torch.float32)
    similarities = torch.stack(list(effects))
    assert similarities.shape == (3 + 3 * 3, 6, 6)
    assert similarities[3, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert similarities[6, 0].tolist() == [1, 0, 0, 1, 0, 0]
    assert similarities[9, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_saved_state_gives_the_same_predictions(tmp_path):
    statistics, _ = screen()
    model = MixedModel.fit(ENCODER, statistics)
    torch.save(model.state(), tmp_path / "means.pt")
    back = MixedModel.from_state(torch.load(tmp_path / "means.pt", weights_only=True))
    assert torch.equal(model(condition("a", "P+Q")), back(condition("a", "P+Q")))
    assert back.effects == model.effects


def test_a_sample_chooses_the_variances_of_many_conditions(monkeypatch):
    monkeypatch.setattr("primeflow_perturbench.calibration.mixed_model.CHOOSING", 10)
    statistics, truth = screen(heldout=[("c", "P+Q")], noise=0.1)
    assert error(MixedModel.fit(ENCODER, statistics), truth, "c", "P+Q") < 0.4


def test_the_scale_of_perturbation_embeddings_does_not_matter():
    """Variances are in units of a cell's variance, for any scale of the embeddings."""
    plain = ConditionEncoder(3, {"line": ["a", "b"]})
    generator = torch.Generator().manual_seed(0)
    embeddings, effect = torch.randn(5, 3, generator=generator), torch.randn(3, GENES, generator=generator)

    def means(scale):
        statistics = ConditionStatistics()
        for line in range(2):
            for row in embeddings[:4]:
                here = plain(scale * row[None], {"line": torch.eye(2)[[line]]})
                statistics.add(here.expand(50), (5 + line + row @ effect).expand(50, -1))
        return MixedModel.fit(plain, statistics)(plain(scale * embeddings[4:], {"line": torch.eye(2)[[0]]}))

    torch.testing.assert_close(means(1.0), means(10.0), rtol=1e-3, atol=1e-3)
    assert (means(1.0) - 5).abs().max() > 0.3
