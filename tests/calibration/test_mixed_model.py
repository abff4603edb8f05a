import pytest
import torch

from primeflow_perturbench.calibration.mixed_model import (
    VARIANCES,
    ConditionMeans,
    ConditionSurvey,
    Layout,
    cell_spread,
    choose_variances,
)
from primeflow_perturbench.conditions.condition import ConditionEncoder

LINES, PERTURBATIONS, GENES = ["a", "b", "c"], ["P", "Q", "R", "S"], 7


def encoder(lines=LINES, **others):
    return ConditionEncoder(len(PERTURBATIONS), {"line": lines, **others})


def vector(line, label):
    """Condition vector (1, C)."""
    multi_hot = torch.tensor([[float(name in label.split("+")) for name in PERTURBATIONS]])
    return encoder()(multi_hot, {"line": torch.tensor([[float(name == line) for name in LINES]])})


def screen(heldout=(("c", "P+Q"),), cells=30, noise=0.0, transfer=True, seed=0):
    """Survey of simulated conditions and their true means: line + perturbation, the latter the line's own or shared."""
    generator = torch.Generator().manual_seed(seed)
    base = {line: 2 + torch.rand(GENES, generator=generator) for line in LINES}
    shared = {name: 0.5 * torch.randn(GENES, generator=generator) for name in PERTURBATIONS}
    own = {(line, name): 0.5 * torch.randn(GENES, generator=generator) for line in LINES for name in PERTURBATIONS}
    truth, survey = {}, ConditionSurvey()
    for line in LINES:
        for label in ["control", *PERTURBATIONS, "P+Q"]:
            parts = [name for name in label.split("+") if name != "control"]
            truth[line, label] = base[line] + sum(shared[name] if transfer else own[line, name] for name in parts)
            if (line, label) not in heldout:
                values = truth[line, label] + noise * torch.randn(cells, GENES, generator=generator)
                survey.add(vector(line, label).expand(cells, -1), values)
    return survey, truth


def error(means, truth, condition):
    return float((means(vector(*condition))[0] - truth[condition]).abs().max())


def test_shared_effects_carry_over_to_a_line_that_lacks_the_perturbation():
    survey, truth = screen(heldout=[("c", "R"), ("c", "P+Q")])
    means = ConditionMeans.fit(encoder(), survey)
    assert error(means, truth, ("c", "R")) < 0.1
    control = float((truth["c", "control"] - truth["c", "R"]).abs().max())
    assert control > 0.5


def test_effects_of_a_pair_add_within_a_line_even_where_lines_share_nothing():
    survey, truth = screen(heldout=[("c", "P+Q")], transfer=False, cells=1000)
    means = ConditionMeans.fit(encoder(), survey)
    assert error(means, truth, ("c", "P+Q")) < 0.2
    assert float((truth["c", "P"] - truth["c", "P+Q"]).abs().max()) > 0.5


def test_what_lines_do_not_share_is_not_carried_over():
    """Where another line's effect says nothing, the best guess is the line without it."""
    far, near = [], []
    for seed in range(5):
        survey, truth = screen(heldout=[("c", "R")], transfer=False, noise=0.3, seed=seed)
        means = ConditionMeans.fit(encoder(), survey)
        guess = means(vector("c", "R"))[0]
        others = (truth["a", "R"] - truth["a", "control"] + truth["b", "R"] - truth["b", "control"]) / 2
        near.append(float((guess - truth["c", "control"]).norm()))
        far.append(float((guess - truth["c", "control"] - others).norm()))
    assert sum(near) < 0.8 * sum(far)


def test_the_posterior_is_the_ridge_regression_on_explicit_effects():
    survey, _ = screen(noise=0.5)
    means = ConditionMeans.fit(encoder(), survey)
    conditions, values, counts = survey.tensors()
    p, line = conditions[:, :4].double(), conditions[:, 4:7].double()
    treated = (p.sum(1, keepdim=True) > 0).double()
    blocks = [
        torch.ones(len(p), 1).double(),
        treated,
        p,
        line,
        line * treated,
        (line[:, :, None] * p[:, None]).flatten(1),
    ]
    kept = [(block, variance) for block, variance in zip(blocks, means.variances[0], strict=True) if variance > 0]
    features = torch.cat([block for block, _ in kept], 1)
    penalty = torch.cat([torch.full((block.shape[1],), 1 / float(v)) for block, v in kept]).double()
    centred = values - values.mean(0)
    spread = cell_spread(means.layout, conditions, survey.scatter(), counts)
    weighted = features.T * counts / spread
    effects = torch.linalg.solve(weighted @ features + torch.diag(penalty), weighted @ centred)
    torch.testing.assert_close(means(conditions).double(), features @ effects + values.mean(0), rtol=0, atol=1e-4)


def test_the_chosen_variances_leave_out_best_in_truth():
    """The closed form of leaving one condition out against refitting without it."""
    survey, _ = screen(noise=1.0)
    conditions, values, counts = survey.tensors()
    layout = Layout.of(encoder(), conditions)
    perturbed = conditions[:, :4].sum(1) > 0
    exact, rest = conditions.double(), values - values.mean(0)
    effects = torch.stack(list(layout.effects(exact, exact)))

    def left_out(variances):
        kernel = torch.einsum("k,knm->nm", variances, effects)
        total = 0.0
        for row in range(len(rest)):
            others = torch.arange(len(rest)) != row
            solved = torch.linalg.solve(kernel[others][:, others] + torch.diag(1 / counts[others]), rest[others])
            total += float((kernel[row, others] @ solved - rest[row]).square().sum()) * bool(perturbed[row])
        return total

    chosen, error = choose_variances(effects, rest @ rest.T, 1 / counts, perturbed.double())
    best = left_out(chosen)
    assert error == pytest.approx(best)
    assert (chosen[[0, 1, 3, 4]] >= 0.3).all()
    for effect in range(len(chosen)):
        for value in VARIANCES if effect in (2, 5) else VARIANCES[-4:]:
            other = chosen.clone()
            other[effect] = value
            assert left_out(other) >= best - 1e-9
    assert best < 0.99 * left_out(torch.full_like(chosen, 0.3))


def test_cells_of_a_noisy_line_say_less_of_its_means():
    generator = torch.Generator().manual_seed(0)
    survey, cells = ConditionSurvey(), {}
    for line, noise in (("a", 1.0), ("b", 3.0)):
        for label in ("control", "P"):
            cells[line, label] = 5 + noise * torch.randn(40, GENES, generator=generator, dtype=torch.float64)
            for part in cells[line, label].split(7):
                survey.add(vector(line, label).expand(len(part), -1), part)
    conditions, _, counts = survey.tensors()
    scatter = survey.scatter()
    expected = {key: float(x.var(0, correction=0).sum()) * 40 for key, x in cells.items()}
    assert sorted(scatter.tolist()) == pytest.approx(sorted(expected.values()))
    squares = {line: expected[line, "control"] + expected[line, "P"] for line in "ab"}
    average = sum(squares.values()) / 156
    raw = {line: (squares[line] + 20 * average) / 98 for line in "ab"}
    spread = cell_spread(Layout.of(encoder(), conditions), conditions, scatter, counts)
    ratio = float(spread.max() / spread.min())
    assert ratio == pytest.approx(raw["b"] / raw["a"])
    assert ratio > 4
    assert float(spread.mean()) == pytest.approx(1)
    assert (spread[(conditions == vector("b", "P")).all(1)] > 1).all()


def programmes(seed):
    """Survey and truth of many perturbations in two lines: one programme of genes is shared, the other a line's own."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"P{i}" for i in range(30)]
    encode = ConditionEncoder(len(names), {"line": ["a", "b"]})
    shared, own = torch.randn(30, generator=generator), torch.randn(2, 30, generator=generator)
    programme = torch.zeros(2, 12)
    programme[0, :6] = programme[1, 6:] = 0.5
    survey, heldout = ConditionSurvey(), []
    for line in range(2):
        for row in range(-1, 30):
            hot = torch.eye(30)[[row]] if row >= 0 else torch.zeros(1, 30)
            condition = encode(hot, {"line": torch.eye(2)[[line]]})
            mean = 5 + (shared[row] * programme[0] + own[line, row] * programme[1] if row >= 0 else torch.zeros(12))
            if line == 1 and row >= 20:
                heldout.append((condition, 5 + shared[row] * programme[0]))
            else:
                survey.add(condition.expand(50, -1), mean + 0.3 * torch.randn(50, 12, generator=generator))
    return encode, survey, heldout


def test_programmes_of_genes_share_each_what_it_shares(monkeypatch):
    """One programme is carried over whole, the other not at all: one set of variances for both cannot do that."""

    def error(most):
        monkeypatch.setattr("primeflow_perturbench.calibration.mixed_model.MOST_COMPONENTS", most)
        found = []
        for seed in range(3):
            encode, survey, heldout = programmes(seed)
            means = ConditionMeans.fit(encode, survey)
            found += [float((means(condition)[0] - best).square().mean()) for condition, best in heldout]
        return sum(found), len(means.components)

    parted, components = error(8)
    together, none = error(0)
    assert components >= 1
    assert none == 0
    assert parted < 0.5 * together


def test_the_null_condition_has_the_mean_of_all():
    survey, _ = screen()
    means = ConditionMeans.fit(encoder(), survey)
    null = encoder().null[None]
    torch.testing.assert_close(means(null)[0], survey.tensors()[1].mean(0).float())
    together = means(torch.cat([null, vector("a", "P")]))
    torch.testing.assert_close(together[1:], means(vector("a", "P")))


def test_means_are_never_negative():
    survey = ConditionSurvey()
    for line, label, value in (("a", "control", 1.0), ("a", "P", 0.1), ("a", "Q", 0.1), ("b", "control", 0.5)):
        survey.add(vector(line, label).expand(50, -1), torch.full((50, GENES), value))
    assert (ConditionMeans.fit(encoder(), survey)(vector("b", "P+Q")) >= 0).all()


def test_batches_and_parts_make_the_survey_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([vector(line, label) for line in LINES for label in ("control", "P", "Q+R")])
    conditions = rows[torch.randint(9, (200,), generator=generator)]
    cells = torch.rand(200, GENES, generator=generator)
    whole, parts = ConditionSurvey(), [ConditionSurvey(), ConditionSurvey()]
    whole.add(conditions, cells)
    for part, chosen in zip(parts, torch.arange(200).split(120), strict=True):
        for batch in chosen.split(50):
            part.add(conditions[batch], cells[batch])
    for one, other in zip(whole.tensors(), ConditionSurvey.of_all(parts).tensors(), strict=True):
        torch.testing.assert_close(one, other)
    found, means, counts = whole.tensors()
    assert counts.sum() == 200
    row = (found == vector("b", "Q+R")).all(1).nonzero().item()
    mine = (conditions == vector("b", "Q+R")).all(1)
    torch.testing.assert_close(means[row], cells[mine].double().mean(0))
    assert counts[row] == mine.sum()


def test_a_continuous_covariate_is_like_near_doses():
    doses = ConditionEncoder(1, {"line": ["a"], "dose": None})

    def at(dose):
        return doses(torch.ones(1, 1), {"line": torch.ones(1, 1), "dose": torch.tensor([[dose]])})

    survey = ConditionSurvey()
    for dose in (0.0, 1.0, 2.0, 3.0):
        survey.add(at(dose).expand(100, -1), torch.full((100, 2), 1 + dose))
    means = ConditionMeans.fit(doses, survey)
    found = torch.cat([means(at(dose)) for dose in (0.2, 1.5, 2.8)])[:, 0]
    assert found[0] < found[1] < found[2]
    assert found[1] == pytest.approx(2.5, abs=0.3)


def test_no_covariates():
    plain = ConditionEncoder(2, {})
    survey = ConditionSurvey()
    for labels, value in (([0.0, 0.0], 1.0), ([1.0, 0.0], 2.0), ([0.0, 1.0], 4.0)):
        survey.add(plain(torch.tensor([labels]), None).expand(1000, -1), torch.full((1000, 1), value))
    pair = ConditionMeans.fit(plain, survey)(plain(torch.ones(1, 2), None))
    assert float(pair) > 3


def test_two_covariates_have_effects_of_each_and_of_both():
    both = ConditionEncoder(2, {"line": ["a", "b"], "drug": ["x", "y", "z"]})
    conditions = torch.cat(
        [
            both(torch.eye(2)[:1], {"line": torch.eye(2)[[i]], "drug": torch.eye(3)[[j]]})
            for i in range(2)
            for j in range(3)
        ]
    )
    similarities = torch.stack(list(Layout.of(both, conditions).effects(conditions, conditions)))
    assert similarities.shape == (3 + 3 * 3, 6, 6)
    assert similarities[3, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert similarities[6, 0].tolist() == [1, 0, 0, 1, 0, 0]
    assert similarities[9, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_the_state_gives_the_same_means_back(tmp_path):
    survey, _ = screen()
    means = ConditionMeans.fit(encoder(), survey)
    torch.save(means.state(), tmp_path / "means.pt")
    back = ConditionMeans.from_state(torch.load(tmp_path / "means.pt", weights_only=True))
    assert torch.equal(means(vector("a", "P+Q")), back(vector("a", "P+Q")))
    assert back.layout == means.layout


def test_so_many_conditions_that_some_choose(monkeypatch):
    monkeypatch.setattr("primeflow_perturbench.calibration.mixed_model.CHOOSING", 10)
    survey, truth = screen(heldout=[("c", "P+Q")], noise=0.1)
    assert error(ConditionMeans.fit(encoder(), survey), truth, ("c", "P+Q")) < 0.4


def test_embeddings_of_another_length_change_nothing():
    """Variances are in units of a cell's variance, whatever the scale of the embeddings."""
    plain = ConditionEncoder(3, {"line": ["a", "b"]})
    generator = torch.Generator().manual_seed(0)
    embeddings, effect = torch.randn(5, 3, generator=generator), torch.randn(3, GENES, generator=generator)

    def means(scale):
        survey = ConditionSurvey()
        for line in range(2):
            for row in embeddings[:4]:
                condition = plain(scale * row[None], {"line": torch.eye(2)[[line]]})
                survey.add(condition.expand(50, -1), (5 + line + row @ effect).expand(50, -1))
        return ConditionMeans.fit(plain, survey)(plain(scale * embeddings[4:], {"line": torch.eye(2)[[0]]}))

    torch.testing.assert_close(means(1.0), means(10.0), rtol=1e-3, atol=1e-3)
    assert (means(1.0) - 5).abs().max() > 0.3
