"""Joint selection for many queries against a refit at every step, for all rules and criteria, on awkward features."""
from contextlib import contextmanager
from functools import partialmethod
from unittest import mock

import numpy as np
import pytest
import torch
from drawn import awkward_rows, condition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from infotda import joint
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.joint import joint_information, query_basis
from infotda.surrogate import Posterior, info_gain, info_loss

EPS = torch.finfo(torch.float64).eps
METHODS, RULES = (InfoGain, ApproxInfoGain, InfoLoss), ("trace", "diag", "exact")
many = settings(max_examples=300, deadline=None, derandomize=True)
some = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def cases(draw, smallest=-6, largest=6):
    "Features with copies, zero rows and low rank; up to four queries of different lengths; sigma^2 relative to kappa."
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    M = draw(st.integers(1, min(m, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    Phi = awkward_rows(draw, rng, n, m)
    phi = rng.normal(size=(M, m)) * 10.0 ** rng.integers(-2, 3, size=(M, 1))
    kappa = float((Phi**2).sum(axis=1).mean()) or 1.0
    return torch.from_numpy(Phi), torch.from_numpy(phi), kappa * 10.0 ** draw(st.floats(smallest, largest))


@contextmanager
def features_form(force):
    "Make InfoLoss use the features form however small the problem is."
    init = joint._Shrinking.__init__
    with mock.patch.object(joint._Shrinking, "__init__", partialmethod(init, small=0) if force else init):
        yield


def refit_moments(Phi, rows, i, phi, noise_var):
    "B, u_i and v_i after observing these rows, from a fresh factor; sums of squares only."
    posterior = Posterior(Phi, noise_var, rows=rows, form="dual")
    (r, alpha), (r_i, alpha_i) = posterior.regress(phi), posterior.regress(Phi[i : i + 1])
    inner = lambda a, b, c, d: a @ c.T + noise_var * b.T @ d
    return inner(r, alpha, r, alpha), inner(r, alpha, r_i, alpha_i)[:, 0], inner(r_i, alpha_i, r_i, alpha_i).item()


def refit_scores(method, rule, Phi, phi, chosen, allowed, noise_var):
    "The score of every row for the next step; -inf where it may not be chosen."
    scores = torch.full((len(Phi),), -torch.inf, dtype=torch.float64)
    for i in allowed:
        observed = [r for r in range(len(Phi)) if r not in (*chosen, i)] if method is InfoLoss else chosen
        B, u, v = refit_moments(Phi, observed, i, phi, noise_var)
        d = noise_var + v
        if rule == "exact":
            share = (u @ torch.linalg.solve(B, u)).item() / d
            scores[i] = share / (1 - share) if method is InfoLoss else share
        else:
            now = B.diagonal() - u.square() / d if method is InfoLoss else B.diagonal()
            scores[i] = (u.square() / d / (now.where(now > 0, 1.0) if rule == "diag" else 1.0)).sum()
        scores[i] *= d if method is ApproxInfoGain else 1.0
    return scores


def check_run(picked, method, rule, Phi, phi, noise_var, allowed_after):
    "Every pick is a best one by refit, and the gains add up to the set functions."
    chosen, tol = [], 1e-9 + 1e4 * EPS * condition(Phi, noise_var)
    first = None
    for j in picked.ranking[0].tolist():
        scores = refit_scores(method, rule, Phi, phi, chosen, allowed_after(chosen), noise_var)
        best = scores.max().item()
        first = best if first is None else first
        assert scores[j] >= best - tol * best - tol**2 * first, (chosen, j, scores)
        chosen.append(j)
        if rule == "exact":
            total = joint_information(Phi, chosen, phi, noise_var, "loss" if method is InfoLoss else "gain")
        else:
            total = (info_loss if method is InfoLoss else info_gain)(Phi, chosen, phi, noise_var).sum().item()
        assert abs(picked.gains[0, : len(chosen)].sum().item() - total) <= tol * (1 + total)
    assert (picked.gains >= 0).all()


@many
@given(cases(), st.sampled_from(METHODS), st.sampled_from(RULES), st.booleans())
def test_every_pick_is_best_by_refit(case, method, rule, force):
    Phi, phi, noise_var = case
    n = len(Phi)
    with features_form(force and noise_var * 1e3 > Phi.square().sum(dim=1).mean()):
        picked = method(noise_var).fit(Phi).select_joint(phi, n, rule)
    assert sorted(picked.ranking[0].tolist()) == list(range(n))
    check_run(picked, method, rule, Phi, phi, noise_var, lambda chosen: [i for i in range(n) if i not in chosen])


@some
@given(cases(smallest=-2, largest=2), st.sampled_from(METHODS), st.sampled_from(RULES), st.data())
def test_quotas_and_candidates(case, method, rule, data):
    Phi, phi, noise_var = case
    n = len(Phi)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    quota = {c: data.draw(st.integers(0, 3)) for c in labels.unique().tolist()}
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    supply = sum(min(q, int((mask & (labels == c)).sum())) for c, q in quota.items())
    fitted = method(noise_var).fit(Phi)
    if supply == 0:
        with pytest.raises(ValueError, match="supply|pool"):
            fitted.select_joint(phi, 1, rule, labels, quota, mask)
        return
    picked = fitted.select_joint(phi, supply, rule, labels, quota, mask)
    count = lambda chosen, c: sum(labels[i] == c for i in chosen)
    open_rows = lambda chosen: [i for i in range(n) if mask[i] and i not in chosen and count(chosen, labels[i]) < quota[int(labels[i])]]
    assert all(mask[i] for i in picked.ranking[0]) and all(count(picked.ranking[0], c) <= q for c, q in quota.items())
    check_run(picked, method, rule, Phi, phi, noise_var, open_rows)
    with pytest.raises(ValueError, match="supply|pool"):
        fitted.select_joint(phi, supply + 1, rule, labels, quota, mask)


@some
@given(cases(smallest=-3), st.sampled_from(METHODS))
def test_one_query_is_select(case, method):
    Phi, phi, noise_var = case
    fitted = method(noise_var).fit(Phi)
    alone = fitted.select(phi[:1], len(Phi))
    tol = 1e-9 + 1e4 * EPS * condition(Phi, noise_var)
    for rule in RULES:
        joined = fitted.select_joint(phi[:1], len(Phi), rule)
        assert_close(joined.gains.sum(), alone.gains.sum(), rtol=tol, atol=tol)        # ties aside, the same run
        if alone.gains[0].diff().abs().min() > 1e-6 * alone.gains.max() if len(Phi) > 1 else True:
            assert joined.ranking.tolist() == alone.ranking.tolist() or (alone.gains < 1e-9 * alone.gains.max()).any()


@some
@given(cases(smallest=-3, largest=3), st.sampled_from(METHODS), st.sampled_from(RULES), st.integers(0, 2**32 - 1))
def test_symmetries(case, method, rule, seed):
    Phi, phi, noise_var = case
    rng = np.random.default_rng(seed)
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(Phi.shape[1],) * 2))).Q
    tol = 1e-8 + 1e4 * EPS * condition(Phi, noise_var)
    base = method(noise_var).fit(Phi).select_joint(phi, 1, rule)
    others = [
        method(noise_var).fit(Phi @ rotation).select_joint(phi @ rotation, 1, rule),
        method(9 * noise_var).fit(3 * Phi).select_joint(phi, 1, rule),
        method(noise_var).fit(Phi).select_joint(-1e-5 * phi.flip(0), 1, rule),
    ]
    if rule == "exact":                                    # only the span matters
        mixed = (torch.eye(len(phi), dtype=phi.dtype) + 0.1 * torch.from_numpy(rng.normal(size=(len(phi),) * 2))) @ (phi / phi.norm(dim=1, keepdim=True))
        others += [method(noise_var).fit(Phi).select_joint(mixed, 1, rule), method(noise_var).fit(Phi).select_joint(query_basis(phi), 1, rule)]
    for other in others:
        if other.ranking.item() != base.ranking.item():    # a tie that rounding breaks: the scores must agree
            scores = refit_scores(method, rule, Phi, phi, [], range(len(Phi)), noise_var)
            assert_close(scores[other.ranking.item()], scores[base.ranking.item()], rtol=tol, atol=tol * scores.max().item())
        else:
            assert_close(other.gains, base.gains, rtol=tol, atol=tol**2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_copies_go_to_the_lowest_row(method, rule):
    rng = np.random.default_rng(1)
    half, phi = torch.from_numpy(rng.normal(size=(30, 6))), torch.from_numpy(rng.normal(size=(3, 6)))
    ranking = method().fit(torch.cat([half, half])).select_joint(phi, 60, rule).ranking[0].tolist()
    assert all(ranking.index(i) < ranking.index(i + 30) for i in range(30))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rho", [1e-6, 1e-3, 1.0, 1e3])
def test_norms_recursion_equals_explicit_covariances_on_a_larger_problem(method, rho):
    "n > 1024 > m, so that InfoLoss takes the features form by itself; 40 queries in 30 columns."
    rng = np.random.default_rng(0)
    Phi = torch.from_numpy(rng.normal(size=(1500, 30)) * np.geomspace(1, 0.05, 30)).float()
    phi = torch.from_numpy(rng.normal(size=(40, 30)))
    fitted = method(rho * Phi.double().square().sum(dim=1).mean().item()).fit(Phi)
    fast = fitted.select_joint(phi, 40)
    with mock.patch.object(joint, "_Norms", joint._Separate):
        plain = fitted.select_joint(phi, 40)
    assert fast.ranking.tolist() == plain.ranking.tolist()
    assert_close(fast.gains, plain.gains, rtol=1e-6, atol=1e-12)
    assert_close(fast.total.item(), (info_loss if method is InfoLoss else info_gain)(Phi, fast.ranking[0], phi, fitted.noise_var_).sum().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_float32_features_are_their_float64_selves(rule):
    rng = np.random.default_rng(2)
    Phi, phi = torch.from_numpy(rng.normal(size=(50, 8))).float(), torch.from_numpy(rng.normal(size=(4, 8))).float()
    for method in METHODS:
        single, double = (method(0.01).fit(F).select_joint(phi, 20, rule) for F in (Phi, Phi.double()))
        assert single.ranking.tolist() == double.ranking.tolist()
        assert_close(single.gains, double.gains, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_dependent_queries_are_refused_by_the_exact_rule_only(method):
    rng = np.random.default_rng(3)
    Phi, phi = torch.from_numpy(rng.normal(size=(20, 5))), torch.from_numpy(rng.normal(size=(7, 5)))
    fitted = method().fit(Phi)
    for bad, words in [(phi, "7 queries of rank 5"), (phi[[0, 1, 1]], "3 queries of rank 2"), (0 * phi[:1], "1 queries of rank 0")]:
        with pytest.raises(ValueError, match=words):
            fitted.select_joint(bad, 2, "exact")
        for rule in ("trace", "diag"):
            assert fitted.select_joint(bad, 2, rule).ranking.shape == (1, 2)
    design = fitted.select_joint(query_basis(phi), 6, "exact")
    assert_close(design.total.item(), joint_information(Phi, design.ranking[0], phi, None, "loss" if method is InfoLoss else "gain"))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_cuda_gives_the_ranking_of_the_cpu(method, rule):
    rng = np.random.default_rng(4)
    Phi, phi = torch.from_numpy(rng.normal(size=(1500, 40))), torch.from_numpy(rng.normal(size=(20, 40)))
    labels = torch.from_numpy(rng.integers(0, 3, 1500))
    here, there = (method().fit(Phi.to(device)).select_joint(phi, 30, rule, labels, 10) for device in ("cpu", "cuda"))
    assert here.ranking.tolist() == there.ranking.tolist()
    assert_close(here.gains, there.gains)
