"""Pointwise sliced mutual information against the literal definition, on drawn cases."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.naive_bayes import GaussianNB
from torch.testing import assert_close

from infotda.core import expect_error
from infotda.psmi import PSMI, log_ratios, low_end_moved, merge_portion, sphere


@st.composite
def cases(draw):
    "Features (n, d), labels with at least two different examples of each class, number of classes."
    d, C, each = draw(st.integers(1, 6)), draw(st.integers(2, 4)), draw(st.integers(3, 9))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    y = torch.arange(C * each) % C
    X = torch.randn(C * each, d, dtype=torch.float64, generator=gen) + draw(st.sampled_from([0.0, 1.0, 5.0])) * y[:, None]
    return X * 10.0 ** draw(st.integers(-3, 3)), y, C


few = settings(max_examples=30, deadline=None)
fit = lambda X, y, r=16, **how: PSMI(r, progress=False, **how).fit(X, y)


@few
@given(cases(), st.integers(2, 20), st.integers(0, 2**40))
def test_is_the_mean_of_naive_bayes_log_odds(case, r, seed):
    X, y, C = case
    slices = []
    for u in sphere(0, r, X.shape[1], seed):
        z = (X @ u).numpy()[:, None]
        log_p = GaussianNB(var_smoothing=0).fit(z, y).predict_log_proba(z)
        slices.append(torch.from_numpy(log_p)[torch.arange(len(y)), y] + math.log(C))
    assert_close(fit(X, y, r, seed=seed).scores_, torch.stack(slices).mean(dim=0), rtol=1e-6, atol=1e-8)


@few
@given(cases(), st.floats(0.01, 100), st.floats(-10, 10))
def test_bounded_and_blind_to_units_order_and_names_of_classes(case, scale, shift):
    X, y, C = case
    scores = fit(X, y).scores_
    assert (scores <= math.log(C) + 1e-12).all()
    how = {"rtol": 1e-6, "atol": 1e-7}
    assert_close(fit(scale * X + shift * X.std(), y).scores_, scores, **how)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    assert_close(fit(X[order], y[order]).scores_, scores[order], **how)
    assert_close(fit(X, C - 1 - y).scores_, scores, **how)
    assert_close(fit(torch.cat([X, X]), torch.cat([y, y])).scores_, scores.repeat(2), **how)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 100))
def test_portions_merge_to_mean_and_variance(sizes, seed):
    gen = torch.Generator().manual_seed(seed)
    parts = [1e6 + torch.randn(5, b, dtype=torch.float64, generator=gen) for b in sizes]
    state = (0, torch.zeros(5).double(), torch.zeros(5).double())
    for part in parts:
        state = merge_portion(*state, part)
    whole = torch.cat(parts, dim=1)
    assert state[0] == whole.shape[1]
    assert_close(state[1], whole.mean(dim=1))
    assert_close(state[2], (whole - whole.mean(dim=1, keepdim=True)).square().sum(dim=1), rtol=1e-6, atol=1e-7)


def test_portions_do_not_change_scores():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(60_000) % 7
    X = torch.randn(60_000, 3, dtype=torch.float64, generator=gen) + y[:, None] % 3
    together = fit(X, y, 90)  # 39 directions at a time
    assert_close(together.scores_[:50], log_ratios(X @ sphere(0, 90, 3, 0).T, y, 7)[:50].mean(dim=1))


def test_one_dimension_has_no_error_of_slicing():
    X, y = torch.tensor([[0.0], [1.0], [2.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1, 1])
    psmi = fit(X, y, 10)
    assert psmi.converged_ and psmi.moved_ < 1e-12 and psmi.std_error_.max() < 1e-12


def test_doubling_stops_where_a_fixed_number_agrees():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    X = torch.randn(300, 8, generator=gen) + 2 * torch.eye(3, 8)[y]
    auto = fit(X, y, "auto")
    assert auto.converged_ and auto.count_ >= 500
    fixed, half = fit(X, y, auto.count_), fit(X, y, auto.count_ // 2)
    assert_close(auto.scores_, fixed.scores_)
    assert auto.moved_ == pytest.approx(fixed.moved_) == pytest.approx(low_end_moved(half.scores_, fixed.scores_))
    if auto.count_ > 500:
        assert half.moved_ >= 0.05
    with pytest.warns(UserWarning, match="raise max_directions"):
        assert not fit(X, y, "auto", tol=1e-6, max_directions=500).converged_


def test_refusals():
    X, y = torch.eye(4).repeat(2, 1), torch.arange(8) % 2
    expect_error(ValueError, lambda: fit(X, y, 1), "at least 2")
    expect_error(ValueError, lambda: fit(X[:3], torch.tensor([0, 0, 1])), "1 example(s) of class 1")
    expect_error(ValueError, lambda: fit(X, y, classes=3), "0 example(s) of class 2")
    expect_error(ValueError, lambda: fit(X * torch.nan, y), "finite")
    expect_error(TypeError, lambda: fit(X, y.float()), "integer class labels")
