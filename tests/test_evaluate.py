"""Evaluations on drawn cases: definitions as plain loops, ties, sizes, rankings that are known to be perfect or useless, files."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from infotda.core import expect_error
from infotda.data import Data
from infotda.evaluate import (Evaluation, LDSTruth, Retrainer, auroc, average_precision, backdoor_pool, backdoor_retrieval, brittleness, compare,
                              coreset_accuracy, coreset_rows, found_curve, lds, lds_truth, line, load_evaluation, margin_change, margins, mislabel_curve,
                              plant_backdoor, random_subsets, rank_correlation, right_queries, support_size)
from infotda.models import MLP, Recipe
from infotda.retrain import RetrainCacheMismatch

close = torch.testing.assert_close
drawn = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def blobs(n=120, seed=0, images=False):
    "Three classes, well apart."
    gen = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    points = torch.rand(3, 64, generator=torch.Generator().manual_seed(9))
    x = 0.6 * points[y] + 0.4 * torch.rand(n, 64, generator=gen)
    return Data(x.view(n, 1, 8, 8) if images else x, y, torch.arange(n), ("a", "b", "c"))


@pytest.fixture(scope="module")
def trainer():
    return Retrainer(lambda seed: MLP([64, 16, 3], seed=seed), blobs(), blobs(12, seed=1), Recipe(epochs=8, lr=0.05, batch_size=20), seeds=(0, 1, 2))


class Threshold:
    "Stands for a retrainer: query z flips, for `down` of four seeds, once `need[z]` examples are gone."
    seeds, recipe, order = (0, 1, 2, 3), Recipe(), "same"

    def __init__(self, need, down=4, n=200):
        self.need, self.down, q = torch.as_tensor(need), down, len(need)
        self.data, self.queries = range(n), Data(torch.zeros(q, 1), torch.zeros(q, dtype=torch.int64), torch.arange(q), ("a", "b"))
        self.full, self.asked = torch.tensor([1.0, 0.0]).expand(4, q, 2), 0

    def without(self, removed):
        self.asked += len(removed)
        lost = (torch.tensor([len(rows) for rows in removed])[:, None] >= self.need)[None] & (torch.arange(4) < self.down)[:, None, None]
        return torch.stack([~lost, lost], dim=-1).double()


# ---- retrain and look -------------------------------------------------------------------------------
@drawn
@given(st.lists(st.integers(1, 90), min_size=2, max_size=8), st.sets(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 4))
def test_brittleness_finds_the_first_size_that_flips_and_stops_there(need, sizes, down):
    fake, sizes = Threshold(need, down), sorted(sizes)
    found = brittleness(torch.arange(70).expand(len(need), 70), fake, sizes)
    expected = [next((s for s in sizes if s >= d and down >= 2), math.inf) for d in need]
    assert found.values.tolist() == expected
    assert fake.asked == sum(sum(1 for s in sizes if s <= e) for e in expected), "a query that has flipped is not retrained"
    assert [round(one["value"] * len(need)) for one in found.lines] == [sum(e <= s for e in expected) for s in sizes]


@drawn
@given(st.lists(st.integers(1, 90), min_size=2, max_size=8), st.integers(1, 9))
def test_bisection_brackets_the_support(need, budget):
    fake = Threshold(need)
    found = support_size(torch.arange(64).expand(len(need), 64), fake, budget).values
    for d, s in zip(need, found.tolist()):
        if d > 64:
            assert s == math.inf
        else:
            assert d <= s < d + max(1, 64 / 2 ** (budget - 1)) + (1 if budget > 1 else 0)
    assert fake.asked <= budget * len(need)
    if budget >= 8:
        assert found.tolist() == [d if d <= 64 else math.inf for d in need]


def test_removing_what_was_never_used_changes_little_and_everything_flips(trainer):
    same_class = (trainer.queries.y[:, None] == trainer.data.y).double()
    ranking = same_class.argsort(dim=1, descending=True, stable=True)
    whole = brittleness(ranking, trainer, (40,), "all of the class")
    assert whole.lines[0]["value"] == 1.0 and not whole.dropped
    changes = margin_change(ranking, trainer, 40).values
    assert changes.shape == (3, 12) and (changes > 0).all()
    others = margin_change(ranking.flip(1), trainer, 1).values
    assert others.abs().mean() < 0.3 * changes.mean()


def test_queries_that_are_wrong_from_the_start_are_dropped_and_counted(trainer):
    y = trainer.queries.y.clone()
    y[[2, 5]] = (y[[2, 5]] + 1) % 3
    spoilt = replace(trainer, queries=replace(trainer.queries, y=y))
    assert right_queries(spoilt).tolist() == [z for z in range(12) if z not in (2, 5)]
    ranking = torch.arange(30).expand(12, 30)
    for found in (brittleness(ranking, spoilt, (1,)), support_size(ranking, spoilt, 1)):
        assert found.dropped == (2, 5) and len(found.values) == 10 and "2 queries dropped" in repr(found)
    hopeless = replace(trainer, queries=replace(trainer.queries, y=(trainer.queries.y + 1) % 3))
    expect_error(ValueError, lambda: brittleness(ranking, hopeless, (1,)), "none of 12")


@drawn
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_balanced_coresets_take_the_best_of_each_class(per_class, C, seed):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(C).repeat(6)[torch.randperm(6 * C, generator=gen)]
    ranking = torch.randperm(6 * C, generator=gen)
    rows = coreset_rows(ranking, labels, per_class * C, balanced=True)
    place = ranking.argsort()
    for c in range(C):
        best = sorted((labels == c).nonzero().flatten().tolist(), key=lambda i: place[i].item())[:per_class]
        assert set(rows[labels[rows] == c].tolist()) == set(best)
    assert (place[rows].diff() > 0).all(), "the order of the ranking is kept"


def test_a_coreset_of_everything_is_the_full_training(trainer):
    n = len(trainer.data)
    found = coreset_accuracy(torch.arange(n), trainer, (3, n))
    right = trainer.full.argmax(dim=2) == trainer.queries.y
    assert abs(found.lines[1]["value"] - right.double().mean().item()) < 1e-12
    expect_error(ValueError, lambda: coreset_accuracy(trainer.data.y.argsort()[:50], trainer, (30,), balanced=True), "of class 2")


def test_truths_of_other_seeds_are_refused(trainer, tmp_path):
    kept = replace(trainer, cache=tmp_path / "trainings")
    truth = lds_truth(kept, 6)
    truth.save(tmp_path / "truth.npz")
    again = LDSTruth.load(tmp_path / "truth.npz", seeds=(0, 1, 2), mask_seed=0)
    assert torch.equal(again.values, truth.values) and torch.equal(again.masks, truth.masks)
    expect_error(ValueError, lambda: LDSTruth.load(tmp_path / "truth.npz", seeds=(0, 1)), "seeds")
    expect_error(RetrainCacheMismatch, lambda: lds_truth(replace(kept, seeds=(0, 3)), 6), "seed 3")
    expect_error(ValueError, lambda: lds(torch.zeros(120, 11), truth), "(120, 12)")
    expect_error(ValueError, lambda: lds(torch.zeros(7, 12), truth), "(120, 12)")


@drawn
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_rank_correlations_are_those_of_scipy(M, q, seed, ties):
    gen = np.random.default_rng(seed)
    a, b = gen.normal(size=(2, M, q))
    a, b = (np.round(a), b) if ties else (a, b)
    a[0], a[1] = -9, 9  # not constant
    found = rank_correlation(a, b)
    for z in range(q):
        assert abs(found[z].item() - spearmanr(a[:, z], b[:, z])[0]) < 1e-12


def test_an_additive_truth_is_predicted_perfectly():
    masks, gen = random_subsets(40, 25, seed=3), torch.Generator().manual_seed(0)
    scores = torch.randn(40, 6, generator=gen, dtype=torch.float64)
    truth = LDSTruth(masks, (masks.double() @ scores)[None].expm1(), (0,), 3)
    assert masks.sum(dim=1).unique().tolist() == [20]
    assert lds(scores, truth).lines[0]["value"] > 1 - 1e-12 and lds(-scores, truth).lines[0]["value"] < -1 + 1e-12
    close(lds(3 * scores + 5, truth).values, lds(scores, truth).values)  # equal sizes: a constant for every example ranks nothing


@drawn
@given(st.integers(2, 6), st.integers(1, 4), st.floats(0.1, 50))
def test_margins_are_log_odds(C, q, scale):
    logits = scale * torch.randn(3, q, C, generator=torch.Generator().manual_seed(C))
    y = torch.arange(q) % C
    p = logits.double().softmax(-1)[:, torch.arange(q), y]
    found = margins(logits, y)
    inside = (p > 1e-6) & (p < 1 - 1e-6)
    close(found[inside], (p / (1 - p)).log()[inside], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(found).all()


# ---- plant and find ---------------------------------------------------------------------------------
def test_poison_is_found_by_who_knows_and_not_by_who_does_not():
    data = blobs(150, images=True)
    backdoor = plant_backdoor(data, per_class=5, seed=4)
    queries = backdoor.attack(blobs(9, seed=2, images=True))
    pool = backdoor_pool(backdoor, queries)
    assert backdoor.poisoned.sum() == 15 and (torch.bincount(backdoor.data.y) == 50).all()
    source = (queries.y - 1) % 3
    knows = (backdoor.poisoned[:, None] & (backdoor.source[:, None] == source)).double()
    best = backdoor_retrieval(knows, backdoor, queries, 5, "oracle")
    assert torch.equal(best.values, torch.ones(9, 2, dtype=torch.float64))
    worst = backdoor_retrieval(-knows, backdoor, queries, 45, "opposite")
    assert torch.equal(worst.values, torch.zeros(9, 2, dtype=torch.float64))
    late = knows.clone()
    late[(~backdoor.poisoned).nonzero().flatten()] = 2.0  # all clean rows first: rank 46
    close(backdoor_retrieval(late, backdoor, queries, 50).values[:, 1], torch.full((9,), 1 / 46, dtype=torch.float64))
    assert (pool.sum(dim=1) == 50).all()
    assert compare([best, worst]).shape[0] == 4
    expect_error(ValueError, lambda: backdoor_retrieval(knows, replace(backdoor, poisoned=backdoor.poisoned & False), queries, 5), "none for 9")
    wrong_pool = (~pool).double().argsort(dim=1, descending=True)[:, :5]
    expect_error(ValueError, lambda: backdoor_retrieval(wrong_pool, backdoor, queries, 5), "candidates")
    expect_error(ValueError, lambda: plant_backdoor(data.subset(data.y != 1), per_class=2), "0 in class b")


@drawn
@given(st.integers(8, 40), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_the_grid_touches_nothing_but_the_corner(side, channels, per_class, seed):
    gen = torch.Generator().manual_seed(seed)
    data = Data(torch.rand(24, channels, side, side, generator=gen), torch.arange(24) % 4, torch.arange(24), tuple("abcd"))
    backdoor = plant_backdoor(data, per_class=per_class, seed=seed)
    edge = 3 * backdoor.cell
    assert backdoor.cell == max(1, side // 16)
    clean = data.x.clone()
    clean[backdoor.poisoned, :, -edge:, -edge:] = backdoor.data.x[backdoor.poisoned, :, -edge:, -edge:]
    assert torch.equal(clean, backdoor.data.x) and torch.equal(data.x, replace(data).x)
    corner = backdoor.data.x[backdoor.poisoned, :, -edge:, -edge:]
    assert set(corner.unique().tolist()) == {0.0, 1.0}
    by_class = {c: corner[backdoor.source[backdoor.poisoned] == c] for c in range(4)}
    assert all((grids == grids[:1]).all() for grids in by_class.values())
    assert len({tuple(grids[0, 0].flatten().tolist()) for grids in by_class.values()}) == 4
    assert torch.equal(backdoor.data.y[backdoor.poisoned], (backdoor.source[backdoor.poisoned] + 1) % 4)


@drawn
@given(st.integers(3, 40), st.integers(0, 999), st.integers(1, 5))
def test_areas_and_precisions_are_those_of_scikit_learn(n, seed, levels):
    gen = np.random.default_rng(seed)
    scores, wrong = np.round(gen.normal(size=n) * levels), gen.random(n) < 0.4
    wrong[0], wrong[1] = True, False
    assert abs(auroc(scores, wrong) - roc_auc_score(wrong, scores)) < 1e-12
    assert abs(average_precision(scores, wrong) - average_precision_score(wrong, scores)) < 1e-12
    curve = found_curve(torch.tensor(scores), torch.tensor(wrong))
    assert curve[0] == 0 and curve[-1] == 1 and (curve.diff() >= 0).all()
    found = mislabel_curve(torch.tensor(scores), torch.tensor(wrong), resamples=1, inspected=(1.0,)) if n > 30 and 0.2 < wrong.mean() < 0.8 else None
    assert found is None or found.lines[2]["value"] == 1.0


# ---- results ----------------------------------------------------------------------------------------
def test_results_are_strict_json(tmp_path):
    result = Evaluation("support size", "ours", [line([1.0, 2.0], size=3), line([4.0])], torch.tensor([[1.0, math.inf], [2.0, 3.0]]), (0, 1), {"k": 5}, (3,))
    result.save(tmp_path / "a" / "r.json")
    assert "NaN" not in (text := (tmp_path / "a" / "r.json").read_text()) and "Infinity" not in text
    read = json.loads(text)
    assert read["values"] == [[1.0, None], [2.0, 3.0]] and read["environment"]["torch"]
    again = load_evaluation(tmp_path / "a" / "r.json")
    assert torch.equal(again.values, result.values.double()) and again.to_frame().equals(result.to_frame()) and again.settings == {"k": 5}
