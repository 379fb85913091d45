"""Ratios and certificates of infotda.guarantees against exhaustive search on small instances."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infotda.attribution import Selection
from infotda.greedy import InfoGain, InfoLoss
from infotda.guarantees import certified, gain_upper_bound, greedy_certificate, loss_upper_bound, submodularity_ratio, variance_reduction, weak_submodularity_bound
from infotda.surrogate import info_gain, info_loss

some = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def pools(draw):
    "Seven rows with possible copies and zeros, two queries, sigma^2 relative to kappa, a budget."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m = draw(st.integers(1, 9))
    Phi = rng.normal(size=(7, m)) * rng.lognormal(sigma=draw(st.sampled_from([0.0, 1.0])), size=(7, 1))
    for kind in draw(st.lists(st.sampled_from(["copy", "zero"]), max_size=2)):
        i, j = rng.integers(7, size=2)
        Phi[i] = Phi[j] if kind == "copy" else 0 * Phi[i]
    kappa = (Phi**2).sum(axis=1).mean() or 1.0
    return torch.from_numpy(Phi), torch.from_numpy(rng.normal(size=(2, m))), kappa * 10.0 ** draw(st.floats(-3, 9)), draw(st.integers(1, 4))


def allowed(n, k):
    return [list(T) for T in itertools.combinations(range(n), k)]


@some
@given(pools())
def test_bounds_hold_for_every_set(pool):
    Phi, phi, noise_var, k = pool
    for rule, score, upper, criterion in ((InfoGain, info_gain, gain_upper_bound, "gain"), (InfoLoss, info_loss, loss_upper_bound, "loss")):
        selection = rule(noise_var=noise_var).fit(Phi).select(phi, k)
        best = torch.stack([score(Phi, T, phi, noise_var) for T in allowed(7, k)]).amax(dim=0)
        bound = upper(Phi, selection.ranking, phi, noise_var)
        assert bound.shape == (2,) and (best <= bound * (1 + 1e-8)).all(), (criterion, best, bound)
        share = greedy_certificate(Phi, selection, phi)
        assert (share <= 1 + 1e-8).all() and (share >= 0).all()
        assert (share <= selection.total / best.where(best > 0, 1.0) + 1e-8)[best > 0].all()


@some
@given(pools())
def test_bounds_hold_for_bad_sets_and_small_pools(pool):
    "The bound may be computed from any set; a certificate does not rest on greedy being good."
    Phi, phi, noise_var, k = pool
    mask = torch.arange(7) < 5
    ranking = torch.arange(k).expand(2, k)
    best_gain = torch.stack([info_gain(Phi, T, phi, noise_var) for T in allowed(5, k)]).amax(dim=0)
    best_loss = torch.stack([info_loss(Phi, T, phi, noise_var) for T in allowed(5, k)]).amax(dim=0)
    assert (best_gain <= gain_upper_bound(Phi, ranking, phi, noise_var, mask) * (1 + 1e-8)).all()
    assert (best_loss <= loss_upper_bound(Phi, ranking, phi, noise_var, mask) * (1 + 1e-8)).all()


@some
@given(pools())
def test_ratio_is_above_its_bound_and_greedy_above_its_guarantee(pool):
    Phi, phi, noise_var, k = pool
    gamma = weak_submodularity_bound(Phi, noise_var)
    for L, T in (([], [0, 1, 2]), ([0], [1, 2]), ([3, 4], [0, 5, 6])):
        assert (submodularity_ratio(Phi, phi, L, T, noise_var) >= gamma * (1 - 1e-9)).all()
    best = torch.stack([variance_reduction(Phi, T, phi, noise_var) for T in allowed(7, k)]).amax(dim=0)
    ranking = InfoGain(noise_var=noise_var).fit(Phi).select(phi, k).ranking
    reached = torch.cat([variance_reduction(Phi, S, x, noise_var) for S, x in zip(ranking, phi)])
    assert (reached >= (1 - math.exp(-gamma)) * best * (1 - 1e-9)).all()


@some
@given(pools())
def test_loss_ratio_for_small_sets(pool):
    "W of at most k rows, given any deleted rows, against the bound for k."
    Phi, phi, noise_var, k = pool
    gamma = weak_submodularity_bound(Phi, noise_var, "loss", k=k)
    assert weak_submodularity_bound(Phi, noise_var, "loss") <= gamma <= 1
    added = lambda rows: torch.expm1(2 * info_loss(Phi, rows, phi, noise_var))
    for L in ([], [5], [5, 6]):
        for T in allowed(5, k):
            single = sum(added(L + [i]) - added(L) for i in T)
            joint = added(L + T) - added(L)
            assert (single >= gamma * joint * (1 - 1e-6) - 1e-9 * added(L + T)).all()


@pytest.mark.parametrize("rule", [InfoGain, InfoLoss])
def test_one_noise_for_each_query(rule):
    generator = torch.Generator().manual_seed(0)
    Phi, phi = torch.randn(20, 5, generator=generator), torch.randn(3, 5, generator=generator)
    noise_var = torch.tensor([0.5, 2.0, 0.5])
    runs = [rule(noise_var=s2).fit(Phi).select(x, k=3) for s2, x in zip(noise_var.tolist(), phi)]
    both = Selection(torch.cat([run.ranking for run in runs]), torch.cat([run.gains for run in runs]), rule.__name__, noise_var)
    apart = torch.cat([greedy_certificate(Phi, run, x) for run, x in zip(runs, phi)])
    torch.testing.assert_close(certified(both, Phi, phi).bound, apart)


def test_meaningless_certificates_are_refused():
    Phi, phi = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5)
    selection = InfoLoss().fit(Phi).select(phi, k=3)
    for words, arguments in (("selection by InfoLoss", (Phi, selection, phi, "gain")), ("computed from these", (2 * Phi, selection, phi)), ("ranking", (Phi, selection, torch.ones(2, 5)))):
        with pytest.raises(ValueError, match=words):
            greedy_certificate(*arguments)


def test_not_submodular():
    Phi, phi = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    for noise_var in (1e-3, 1.0, 1e3):
        one, two, both = (info_gain(Phi, S, phi, noise_var).item() for S in ([0], [1], [0, 1]))
        assert two == 0 and both > one
        excess = 1 / ((2 + noise_var) * (1 + 3 * noise_var + noise_var**2))
        assert math.expm1(-2 * one) - math.expm1(-2 * both) == pytest.approx(excess, rel=1e-9)


def test_bad_input():
    Phi = torch.eye(3)
    with pytest.raises(ValueError, match="none of them in given"):
        submodularity_ratio(Phi, torch.ones(3), [0], [0])
    with pytest.raises(ValueError, match="criterion"):
        weak_submodularity_bound(Phi, 1.0, "gains")
    with pytest.raises(ValueError, match="noise_var"):
        weak_submodularity_bound(Phi, -1.0)
