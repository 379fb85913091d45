"""One-pass rules, steps of arbitrary rankings and relative information against the exact set functions."""
import numpy as np
import pytest
import torch
from drawn import awkward_rows, condition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from infotda import onepass
from infotda.attribution import top_k
from infotda.core import mean_kernel_diag
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.noise import NoiseTuning, tune_noise
from infotda.onepass import SingletonInfoLoss, TopCovariance, information_steps, relative_information
from infotda.surrogate import info_gain, info_loss, singleton_loss

EPS = torch.finfo(torch.float64).eps
many = settings(max_examples=200, deadline=None, derandomize=True)
some = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def cases(draw, smallest=-6, largest=6):
    "Features with copies, zero rows and low rank; three queries, the last possibly zero; a ranking; sigma^2."
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    Phi = awkward_rows(draw, rng, n, m)
    phi = rng.normal(size=(3, m))
    phi[1] = Phi[rng.integers(n)] * 10.0 ** draw(st.integers(-8, 8))
    phi[2] *= draw(st.sampled_from([0.0, 1.0]))
    kappa = float((Phi**2).sum(axis=1).mean()) or 1.0
    ranking = np.stack([rng.permutation(n)[: draw(st.integers(1, n))] if n == 1 else rng.permutation(n) for _ in range(3)])
    return torch.from_numpy(Phi), torch.from_numpy(phi), kappa * 10.0 ** draw(st.floats(smallest, largest)), torch.from_numpy(ranking)


def prefixes(measure, Phi, ranking, phi, noise_var):
    return torch.stack([torch.cat([measure(Phi, line[: t + 1], x, noise_var) for t in range(len(line))]) for line, x in zip(ranking, phi)])


@many
@given(cases())
def test_steps_add_up_to_the_set_functions(case):
    Phi, phi, noise_var, ranking = case
    tol = 1e-10 + 300 * EPS * condition(Phi, noise_var)
    for criterion, measure in (("gain", info_gain), ("loss", info_loss)):
        steps = information_steps(Phi, ranking, phi, noise_var, criterion)
        true = prefixes(measure, Phi, ranking, phi, noise_var)
        assert steps.shape == ranking.shape and steps.dtype == torch.float64 and (steps >= 0).all()
        assert ((steps.cumsum(dim=1) - true).abs() <= tol * (true + true.sqrt()) + tol**2).all()


@some
@given(cases(smallest=-2))
def test_primal_and_dual_factors_agree(case):
    Phi, phi, noise_var, ranking = case
    rows = ranking[0][: max(1, len(Phi) // 2)]
    pieces = [onepass._loss_pieces(Phi, phi, noise_var, small) for small in (0, 1024)]
    for a, b in zip(pieces[0][:2], pieces[1][:2]):
        assert_close(a, b, rtol=1e-6, atol=1e-8 * (b.abs().max().item() + 1e-300))
    factors = [piece[2](rows) for piece in pieces]
    assert_close(factors[0] @ factors[0].T * noise_var, factors[1] @ factors[1].T * noise_var, rtol=1e-6, atol=1e-8)
    assert (factors[1].diagonal() > 0).all()


@some
@given(cases(smallest=-3), st.integers(1, 9), st.lists(st.booleans(), min_size=9, max_size=9))
def test_one_pass_rules_take_the_largest_scores(case, k, mask):
    Phi, phi, noise_var, _ = case
    mask = torch.tensor(mask[: len(Phi)])
    for rule, scores in ((SingletonInfoLoss, singleton_loss(Phi, phi, noise_var)), (TopCovariance, (Phi @ phi.T).abs())):
        fitted = rule(noise_var).fit(Phi)
        assert_close(fitted.attribute(phi), scores)
        if int(mask.sum()) < k:
            with pytest.raises(ValueError, match="lower k"):
                fitted.select(phi, k, mask)
            continue
        picked = fitted.select(phi, k, mask)
        assert mask[picked.ranking].all() and all(len(set(line)) == k for line in picked.ranking.tolist())
        for line, score in zip(picked.ranking, scores.T):
            rest = [i for i in range(len(Phi)) if mask[i] and i not in line.tolist()]
            top = score.max().item()
            assert (score[line].diff() <= 1e-9 * top).all()
            assert not rest or score[line].min() >= score[rest].max() - 1e-9 * top
        measure = info_loss if rule is SingletonInfoLoss else info_gain
        tol = 1e-10 + 300 * EPS * condition(Phi, noise_var)
        true = prefixes(measure, Phi, picked.ranking, phi, noise_var)[:, -1]
        assert ((picked.total - true).abs() <= tol * (true + true.sqrt()) + tol**2).all()


@some
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_ties_go_to_the_lowest_row(values, data):
    wobble = torch.tensor([data.draw(st.sampled_from([-1, 0, 1])) for _ in values]) * 1e-14
    scores = torch.tensor(values, dtype=torch.float64)
    got = top_k((scores * (1 + wobble))[:, None], len(values), torch.ones(1, len(values), dtype=torch.bool))[0]
    assert got.tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))


@pytest.mark.parametrize("rho", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("method", [InfoGain, ApproxInfoGain, InfoLoss, SingletonInfoLoss, TopCovariance])
def test_relative_information(rho, method):
    rng = np.random.default_rng(0)
    Phi, phi = torch.from_numpy(rng.normal(size=(80, 12))), torch.from_numpy(rng.normal(size=(4, 12)))
    noise_var = rho * mean_kernel_diag(Phi)
    picked, reference = (rule(noise_var).fit(Phi).select(phi, 9) for rule in (method, InfoLoss))
    ratio = relative_information(Phi, picked, phi, noise_var, reference)
    assert_close(ratio, prefixes(info_loss, Phi, picked.ranking, phi, noise_var) / prefixes(info_loss, Phi, reference.ranking, phi, noise_var))
    assert_close(ratio, relative_information(Phi, picked.ranking, phi, noise_var))
    if method in (InfoLoss, SingletonInfoLoss):
        assert_close(ratio[:, 0], torch.ones(4, dtype=torch.float64))
    if rho == 1e2:
        assert (ratio > 0.8).all()


def test_high_leverage_is_measured_in_the_dual_form():
    "A row that is nearly alone in its direction: 1 - h of 1e-10, with both copies of the truth at hand."
    rng = np.random.default_rng(1)
    Phi = torch.cat([torch.from_numpy(rng.normal(size=(30, 6))), 1e4 * torch.eye(6, dtype=torch.float64)[:2]])
    phi = torch.from_numpy(rng.normal(size=(2, 6)))
    ranking = torch.tensor([[30, 3, 31, 5], [31, 30, 1, 2]])
    assert_close(information_steps(Phi, ranking, phi, 0.01).cumsum(dim=1), prefixes(info_loss, Phi, ranking, phi, 0.01), rtol=1e-6, atol=0)


def test_tuning_looks_every_selection_up_once():
    rng = np.random.default_rng(2)
    Phi, phi = torch.from_numpy(rng.normal(size=(60, 8))), torch.from_numpy(rng.normal(size=(5, 8)))
    calls = []

    def change(removed):
        calls.append(removed.sort(dim=1).values.tolist())
        return torch.stack([removed.double().mean(dim=1), removed.double().amax(dim=1)])

    tuned = tune_noise(InfoGain, Phi, phi, change, 6, ratios=[1e4, 1e-2, 1, 1e3], progress=False)
    assert isinstance(tuned, NoiseTuning) and tuned.ratio.tolist() == [1e-2, 1, 1e3, 1e4]
    assert len(calls) == tuned.retrained == len({str(c) for c in calls}) == len({str(r.sort(dim=1).values.tolist()) for r in tuned.ranking})
    means = (tuned.ranking.double().mean(dim=2) + tuned.ranking.double().amax(dim=2)) / 2
    assert_close(tuned.change, means)
    assert tuned.best == int(means.mean(dim=1).argmax()) and tuned.best_noise_var == tuned.noise_var[tuned.best]
    assert_close(tuned.noise_var, tuned.ratio * mean_kernel_diag(Phi))
    frame = tuned.to_frame()
    assert frame.behind.min() == 0 and (frame.behind >= 0).all()


class FromPass:
    "Stands for the result of a feature pass that measured some output."

    def __init__(self, Phi, output):
        self.Phi, self.output = Phi, output


@pytest.mark.parametrize("verb", ["select", "attribute", "select_joint"])
@pytest.mark.parametrize("method", [InfoGain, ApproxInfoGain, InfoLoss, SingletonInfoLoss, TopCovariance])
def test_queries_of_another_output_are_refused(method, verb):
    if not hasattr(method, verb):
        pytest.skip(f"{method.__name__} has no {verb}")
    rows = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fitted, k = method().fit(FromPass(rows, "logit(3)")), () if verb == "attribute" else (2,)
    getattr(fitted, verb)(FromPass(rows[:3], "logit(3)"), *k)
    with pytest.raises(ValueError, match="logit"):
        getattr(fitted, verb)(FromPass(rows[:3], "logit(4)"), *k)
