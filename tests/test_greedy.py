"""The greedy rules against brute force, on drawn cases; precision, routes, pools, files, devices."""
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infotda.elimination import GramKernel, greedy, plan
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.surrogate import info_gain, info_loss

RULES = {"gain": InfoGain, "approx": ApproxInfoGain, "loss": InfoLoss}


def scores_by_definition(rule, Phi, S, phi, noise_var):
    "The score of every row for one query after S has been chosen, (8), (69), (62), from a refit; chosen rows -1."
    n, m = Phi.shape
    out = torch.full((n,), -1.0, dtype=torch.float64)
    R = [i for i in range(n) if i not in S]
    seen = R if rule == "loss" else list(S)
    if rule == "loss" and len(R) < m:                                    # dual: no cancellation at high leverage
        A_inv = torch.linalg.inv(Phi[R] @ Phi[R].T + noise_var * torch.eye(len(R), dtype=torch.float64))
        out[R] = (A_inv @ (Phi[R] @ phi)).square() / A_inv.diagonal()
        return out
    chol = torch.linalg.cholesky(torch.eye(m, dtype=torch.float64) + Phi[seen].T @ Phi[seen] / noise_var)
    white = torch.linalg.solve_triangular(chol, torch.cat([Phi.T, phi[:, None]], dim=1), upper=False)
    c, v = white[:, :-1].T @ white[:, -1], white[:, :-1].square().sum(dim=0)
    den = {"gain": noise_var + v, "approx": torch.ones_like(v), "loss": noise_var - v}[rule]
    out[R] = (c.square() / den)[R]
    return out


def check(rule, Phi, phi, noise_var, k, candidates=None, tol=1e-6):
    "Each choice is the best one by definition (up to rounding), the lowest among copies, and the gains are exact."
    fitted = RULES[rule](noise_var).fit(Phi)
    picked = fitted.select(phi, k, candidates)
    Phi, phi, noise_var = Phi.double(), phi.double(), fitted.noise_var_
    measure = info_loss if rule == "loss" else info_gain
    for i in range(len(phi)):
        allowed = torch.ones(len(Phi), dtype=torch.bool) if candidates is None else candidates.expand(len(phi), -1)[i]
        for t in range(k):
            j = int(picked.ranking[i, t])
            scores = scores_by_definition(rule, Phi, picked.ranking[i, :t].tolist(), phi[i], noise_var)
            free = allowed & (scores >= 0)
            best = scores[free].max()
            assert free[j]
            assert scores[j] >= best * (1 - tol) - 1e-14 * phi[i].square().sum(), (rule, i, t, j, float(scores[j]), float(best))
            same = free & (Phi == Phi[j]).all(dim=1)
            assert j == int(same.nonzero()[0]), (rule, i, t, j)
            clear = scores[free & ~same].max() < best * (1 - 1e-3) if (free & ~same).any() else True
            if clear and best > 1e-12 * phi[i].square().sum():
                assert bool(same[scores.where(free, torch.tensor(-1.0, dtype=torch.float64)).argmax()])
        totals = torch.cat([measure(Phi, picked.ranking[i, :t + 1], phi[i], noise_var) for t in range(k)])
        torch.testing.assert_close(picked.gains[i].cumsum(0), totals, rtol=1e-6, atol=1e-9)
    return picked


@st.composite
def problems(draw):
    n, m, q = draw(st.integers(1, 14)), draw(st.integers(1, 18)), draw(st.integers(1, 3))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    Phi, phi = torch.randn(n, m, dtype=torch.float64, generator=gen), torch.randn(q, m, dtype=torch.float64, generator=gen)
    for _ in range(draw(st.integers(0, 3))):                            # copies, zero rows, low rank
        Phi[draw(st.integers(0, n - 1))] = Phi[draw(st.integers(0, n - 1))]
    if draw(st.booleans()):
        Phi[draw(st.integers(0, n - 1))] = 0
    if draw(st.booleans()):
        Phi[:, m // 2:] = 0
    if draw(st.booleans()):
        phi[0] = Phi[draw(st.integers(0, n - 1))]
    if draw(st.booleans()):
        Phi, phi = Phi.float(), phi.float()
    if Phi.abs().max() == 0:
        Phi[0, 0] = 1.0
    noise_var = 10.0 ** draw(st.floats(-6, 6)) * Phi.double().square().sum(dim=1).mean().item()
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(q, n, generator=gen) < 0.6
        mask[:, draw(st.integers(0, n - 1))] = True
    smallest = n if mask is None else int(mask.sum(dim=1).min())
    return Phi, phi, noise_var, draw(st.integers(1, min(smallest, 6))), mask


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=problems())
def test_equals_brute_force(rule, case):
    check(rule, *case)


@pytest.mark.parametrize("rule", RULES)
def test_lowest_of_copies_at_extreme_leverage(rule):
    "Two copies as the whole training set: the dual form computes their scores with different rounding."
    gen = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.tensor([[0.6614, 0.2669]]), torch.randn(300, 2, generator=gen)])
    asks = torch.cat([torch.tensor([[-0.4519, -0.1661]]), torch.randn(300, 2, generator=gen)])
    for row, ask in zip(rows, asks):
        noise_var = 1e-5 * row.double().square().sum().item()
        for dtype in (torch.float32, torch.float64):
            rule_ = RULES[rule](noise_var).fit(row.expand(2, 2).to(dtype).contiguous())
            assert rule_.select(ask[None].to(dtype), 2).ranking.tolist() == [[0, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_float32_equals_float64(rule):
    gen = torch.Generator().manual_seed(0)
    for n, m, rho in [(3000, 64, 1.0), (3000, 64, 0.01), (500, 300, 0.1), (100, 300, 1.0)]:
        Phi, phi = torch.randn(n, m, generator=gen), torch.randn(12, m, generator=gen)
        Phi[n // 2:n // 2 + 20] = Phi[:20]
        single = RULES[rule](rho * m).fit(Phi).select(phi, 20)
        double = RULES[rule](rho * m).fit(Phi.double()).select(phi.double(), 20)
        assert torch.equal(single.ranking, double.ranking)
        torch.testing.assert_close(single.gains, double.gains, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("n, m", [(60, 200), (260, 200)])
def test_high_leverage_in_float32(n, m):
    gen = torch.Generator().manual_seed(0)
    Phi, phi = torch.randn(n, m, generator=gen) / m**0.5, torch.randn(6, m, generator=gen) / m**0.5
    if n > m:
        Phi[50:] *= 1e-4                                                 # fifty rows that nothing else can replace
    noise_var = 1e-5 / 4
    A = Phi.double() @ Phi.double().T + noise_var * torch.eye(n, dtype=torch.float64)
    leverage = 1 - noise_var * torch.linalg.inv(A).diagonal()
    assert leverage.max() > 0.99999
    single = InfoLoss(noise_var).fit(Phi).select(phi, 20)
    double = InfoLoss(noise_var).fit(Phi.double()).select(phi.double(), 20)
    assert torch.equal(single.ranking, double.ranking)
    torch.testing.assert_close(single.gains, double.gains, rtol=1e-6, atol=1e-10)
    check("loss", Phi, phi[:2], noise_var, 6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n, m", [(80, 10), (20, 40)])
def test_gram_route(rule, n, m):
    gen = torch.Generator().manual_seed(1)
    Phi, phi = torch.randn(n, m, dtype=torch.float64, generator=gen), torch.randn(5, m, dtype=torch.float64, generator=gen)
    mask = torch.rand(5, n, generator=gen) < 0.4
    mask[:, :8] = True
    for noise_var in (0.01, 10.0):
        for candidates in (None, mask):
            a = RULES[rule](noise_var).fit(Phi)
            b = RULES[rule](noise_var).fit_gram((Phi @ Phi.T).numpy())
            cross, query_var = phi @ Phi.T, phi.square().sum(dim=1)
            one, two = a.select(phi, 8, candidates), b.select(cross, 8, candidates, query_var=query_var)
            assert torch.equal(one.ranking, two.ranking)
            torch.testing.assert_close(one.gains, two.gains, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(a.attribute(phi), b.attribute(cross, query_var), rtol=1e-6, atol=1e-12)


def test_gram_plan_changes_nothing():
    gen = torch.Generator().manual_seed(2)
    Phi, phi = torch.randn(150, 2000, generator=gen), torch.randn(120, 2000, generator=gen)
    assert plan(150, 2000, 120, 10).route == "gram"
    fitted = InfoGain().fit(Phi)
    by_rows, decided = greedy(fitted.kernel_, *fitted._queries(phi), 10, dtype=torch.float32)
    assert decided.all() and not isinstance(fitted.kernel_, GramKernel)
    assert torch.equal(by_rows, fitted.select(phi, 10).ranking)


def test_one_query_at_a_time():
    gen = torch.Generator().manual_seed(3)
    Phi, phi = torch.randn(700, 30, generator=gen), torch.randn(9, 30, generator=gen)
    for rule in RULES.values():
        fitted = rule().fit(Phi)
        together = fitted.select(phi, 7)
        alone = [fitted.select(query, 7) for query in phi]
        assert torch.equal(together.ranking, torch.cat([s.ranking for s in alone]))
        torch.testing.assert_close(together.gains, torch.cat([s.gains for s in alone]), rtol=1e-10, atol=0)


def test_candidate_forms():
    gen = torch.Generator().manual_seed(4)
    Phi, phi = torch.randn(50, 8, generator=gen), torch.randn(4, 8, generator=gen)
    lists = [[1, 5, 9, 30], list(range(10, 40)), [1, 5, 9, 30], list(range(50))]
    mask = torch.zeros(4, 50, dtype=torch.bool)
    for row, pool in zip(mask, lists):
        row[pool] = True
    for rule in RULES.values():
        fitted = rule().fit(Phi)
        assert torch.equal(fitted.select(phi, 4, mask).ranking, fitted.select(phi, 4, lists).ranking)
        assert torch.equal(fitted.select(phi, 4, mask[1]).ranking, fitted.select(phi, 4, [lists[1]] * 4).ranking)
        assert torch.equal(fitted.select(phi, 4, mask.numpy()).ranking, fitted.select(phi, 4, mask).ranking)
        for i, pool in enumerate(lists):
            assert set(fitted.select(phi, 4, mask).ranking[i].tolist()) <= set(pool)


def test_memory_mapped(tmp_path):
    gen = torch.Generator().manual_seed(5)
    Phi, phi = torch.randn(5000, 24, generator=gen), torch.randn(4, 24, generator=gen)
    np.save(tmp_path / "Phi.npy", Phi.numpy())
    for rule in RULES.values():
        expected = rule().fit(Phi).select(phi, 10)
        for mode in ("r", "c"):
            found = rule().fit(np.load(tmp_path / "Phi.npy", mmap_mode=mode)).select(phi, 10)
            assert torch.equal(found.ranking, expected.ranking) and torch.equal(found.gains, expected.gains)
    shared = torch.from_file(str(tmp_path / "raw"), shared=True, size=Phi.numel(), dtype=torch.float32).view(5000, 24)
    shared.copy_(Phi)
    assert torch.equal(InfoGain().fit(shared).select(phi, 10).ranking, InfoGain().fit(Phi).select(phi, 10).ranking)


@pytest.mark.parametrize("dominant", [1, 3])
def test_features_with_a_dominant_direction(dominant):
    "Rounding is at its worst here (19_elimination shows by how much); the rankings are those of float64, with room for vectors and without."
    gen = torch.Generator().manual_seed(dominant)
    n, m, k = 1500, 128, 40
    Phi = torch.randn(n, dominant, generator=gen) @ torch.randn(dominant, m, generator=gen) / 4 + 1e-3 * torch.randn(n, m, generator=gen)
    phi = torch.cat([torch.randn(5, m, generator=gen) / m**0.5, Phi[:5] + 1e-3 * torch.randn(5, m, generator=gen)])
    kappa, lean = Phi.double().square().sum(dim=1).mean().item(), 4 * n * m // 4
    assert plan(n, m, len(phi), k, memory=lean, route="rows").lean
    for ratio in (1e-6, 1e-5, 1e-4, 1e-2):
        for rule in RULES.values():
            fitted = rule(ratio * kappa).fit(Phi)
            expected = rule(ratio * kappa).fit(Phi.double()).select(phi.double(), k).ranking
            assert torch.equal(fitted.select(phi, k).ranking, expected)
            assert torch.equal(fitted.select(phi, k, memory=lean).ranking, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_less_memory_gives_the_same_selection(kind):
    gen = torch.Generator().manual_seed(11)
    Phi, phi, k = torch.randn(900, 48, generator=gen).to(kind), torch.randn(7, 48, generator=gen).to(kind), 30
    for rule in RULES.values():
        fitted = rule().fit(Phi)
        whole = fitted.select(phi, k)
        for memory in (1, 100_000, 300_000):
            assert plan(900, 48, 7, k, 8 if kind == torch.float64 else 4, memory).lean
            less = fitted.select(phi, k, memory=memory)
            assert torch.equal(less.ranking, whole.ranking) and torch.equal(less.gains, whole.gains)


@pytest.mark.parametrize("m", [12, 90])
def test_a_fitted_rule_survives_a_pickle(m):
    gen = torch.Generator().manual_seed(12)
    Phi, phi = torch.randn(60, m, generator=gen), torch.randn(3, m, generator=gen)
    for rule in RULES.values():
        fitted = rule().fit(Phi)
        assert torch.equal(pickle.loads(pickle.dumps(fitted)).select(phi, 5).gains, fitted.select(phi, 5).gains)
        by_gram = pickle.loads(pickle.dumps(rule().fit_gram(Phi @ Phi.T)))
        assert torch.equal(by_gram.select(phi @ Phi.T, 5, query_var=phi.square().sum(dim=1)).ranking, fitted.select(phi, 5).ranking)


def test_half_precision_features():
    gen = torch.Generator().manual_seed(6)
    Phi, phi = torch.randn(200, 16, generator=gen).bfloat16(), torch.randn(3, 16, generator=gen)
    for rule in RULES.values():
        assert torch.equal(rule().fit(Phi).select(phi, 8).ranking, rule().fit(Phi.double()).select(phi, 8).ranking)


def test_low_precision_products_do_not_change_the_ranking():
    gen = torch.Generator().manual_seed(7)
    Phi, phi = torch.randn(2000, 64, generator=gen), torch.randn(5, 64, generator=gen)
    expected = InfoGain().fit(Phi).select(phi, 10).ranking
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(InfoGain().fit(Phi).select(phi, 10).ranking, expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
def test_gpu_equals_cpu(rule):
    gen = torch.Generator().manual_seed(8)
    for n, m in [(5000, 64), (300, 400), (900, 2048)]:
        Phi, phi = torch.randn(n, m, generator=gen), torch.randn(30, m, generator=gen)
        Phi[100:120] = Phi[:20]
        mask = torch.rand(30, n, generator=gen) < 0.3
        for candidates in (None, mask):
            cpu = RULES[rule]().fit(Phi).select(phi, 15, candidates)
            gpu = RULES[rule]().fit(Phi.cuda()).select(phi.cuda(), 15, candidates)
            assert torch.equal(cpu.ranking, gpu.ranking)
            torch.testing.assert_close(cpu.gains, gpu.gains, rtol=1e-8, atol=1e-12)
