"""The exact set functions of infotda.surrogate against references of their own: fifty-digit arithmetic, dense refits, and invariances."""
import mpmath
import numpy as np
import pytest
import torch
from drawn import awkward_rows, condition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from infotda.surrogate import (Posterior, compress, high_noise_limit, info_gain, info_loss, leave_out_variance, leverage,
                               posterior_covariance, posterior_variance, singleton_gain, singleton_loss)

EPS = torch.finfo(torch.float64).eps
many = settings(max_examples=200, deadline=None, derandomize=True)
some = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def cases(draw, smallest=-6, largest=6):
    "Features with duplicates, zero rows and low rank; three queries of different kinds; a subset; sigma^2 relative to kappa."
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    Phi = awkward_rows(draw, rng, n, m)
    phi = rng.normal(size=(3, m))
    phi[1] = Phi[rng.integers(n)] + draw(st.sampled_from([0.0, 1e-3, 1.0])) * phi[1]        # may be a zero query
    phi[2] *= 10.0 ** draw(st.integers(-8, 8))
    kappa = float((Phi**2).sum(axis=1).mean()) or 1.0
    noise_var = kappa * 10.0 ** draw(st.floats(smallest, largest))
    subset = [i for i in range(n) if draw(st.booleans())]
    return torch.from_numpy(Phi), torch.from_numpy(phi), noise_var, subset


def rest(Phi, subset):
    return [i for i in range(len(Phi)) if i not in subset]


def exact_var(Phi, rows, x, noise_var):
    X = mpmath.matrix(x.tolist())
    if not rows:
        return (X.T * X)[0]
    F = mpmath.matrix(Phi[rows].tolist())
    A = F * F.T + mpmath.mpf(noise_var) * mpmath.eye(len(rows))
    k = F * X
    return (X.T * X)[0] - (k.T * mpmath.lu_solve(A, k))[0]


def exact_nats(Phi, kept, subset, x, noise_var):
    with mpmath.workdps(60):
        if not x.any():
            return 0.0
        return float(mpmath.log(exact_var(Phi, kept, x, noise_var) / exact_var(Phi, kept + subset, x, noise_var)) / 2)


def assert_nats(got, Phi, kept, subset, phi, noise_var):
    """Rounding the residual phi - Phi' alpha costs eps |phi|, that is a relative eps sqrt(condition) of sqrt(v); so the
    square root of the information, like a correlation, has an absolute error of a few eps sqrt(condition)."""
    true = torch.tensor([exact_nats(Phi, kept, subset, x, noise_var) for x in phi], dtype=torch.float64)
    tol = 300 * EPS * condition(Phi, noise_var) ** 0.5
    assert got.shape == true.shape and got.dtype == torch.float64
    assert ((got - true).abs() <= tol * (true + true.sqrt()) + tol**2).all(), (got, true)


@many
@given(cases())
def test_set_functions_equal_sixty_digit_arithmetic(case):
    Phi, phi, noise_var, subset = case
    assert_nats(info_gain(Phi, subset, phi, noise_var), Phi, [], subset, phi, noise_var)
    for form in ("primal", "dual", None):
        assert_nats(info_loss(Phi, subset, phi, noise_var, form), Phi, rest(Phi, subset), subset, phi, noise_var)


@many
@given(cases())
def test_posterior_variance_equals_sixty_digit_arithmetic(case):
    Phi, phi, noise_var, _ = case
    with mpmath.workdps(60):
        true = torch.tensor([float(exact_var(Phi, list(range(len(Phi))), x, noise_var)) for x in phi], dtype=torch.float64)
    for form in ("primal", "dual", None):
        assert_close(posterior_variance(Phi, phi, noise_var, form), true, rtol=300 * EPS * condition(Phi, noise_var) ** 0.5, atol=0)


@many
@given(cases(smallest=-3))
def test_dense_refit_in_float64(case):
    "Plain inverses of P, refitted without the subset; their own error is about eps times the squared condition number."
    Phi, phi, noise_var, subset = case
    phi = phi / phi.norm(dim=1, keepdim=True).where(phi.any(dim=1, keepdim=True), 1.0)
    eye = torch.eye(Phi.shape[1], dtype=torch.float64)
    var = lambda rows: ((phi @ torch.linalg.inv(eye + Phi[rows].T @ Phi[rows] / noise_var)) * phi).sum(dim=1)
    nats = lambda before, after: torch.where(after > 0, 0.5 * (before / after).log(), 0.0)
    atol = 1e3 * EPS * condition(Phi, noise_var) ** 2
    full = list(range(len(Phi)))
    assert_close(info_gain(Phi, subset, phi, noise_var), nats(var([]), var(subset)), rtol=0, atol=atol)
    assert_close(info_loss(Phi, subset, phi, noise_var), nats(var(rest(Phi, subset)), var(full)), rtol=0, atol=atol)
    refit = torch.stack([nats(var(rest(Phi, [j])), var(full)) for j in full])
    assert_close(singleton_loss(Phi, phi, noise_var), refit, rtol=0, atol=atol)


@many
@given(cases())
def test_primal_equals_dual(case):
    Phi, phi, noise_var, _ = case
    primal, dual = (Posterior(Phi, noise_var, form=form) for form in ("primal", "dual"))
    cond = condition(Phi, noise_var)
    scale = phi.norm(dim=1)
    for a, b in zip(primal.regress(phi), dual.regress(phi)):
        size = max(b.abs().max().item(), scale.max().item() * min(1.0, noise_var**-0.5))
        assert_close(a, b, rtol=0, atol=100 * EPS * cond * size)
    cov = [posterior_covariance(Phi, phi, noise_var, form=form) for form in ("primal", "dual")]
    bound = 300 * EPS * cond**0.5 * (cov[1].diagonal()[:, None] * cov[1].diagonal()).sqrt()
    assert ((cov[0] - cov[1]).abs() <= bound).all()
    assert_close(leverage(Phi, noise_var, "primal"), leverage(Phi, noise_var, "dual"), rtol=0, atol=100 * EPS * cond)
    gap = (1 - leverage(Phi, noise_var, "dual")).min().item()
    loss = [singleton_loss(Phi, phi, noise_var, form) for form in ("primal", "dual")]
    tol = 100 * EPS * cond / gap
    assert ((loss[0] - loss[1]).abs() <= tol * (loss[1] + loss[1].sqrt()) + tol**2).all()


@many
@given(cases(smallest=-4))
def test_leave_out_without_refitting(case):
    Phi, phi, noise_var, subset = case
    left = posterior_variance(Phi[rest(Phi, subset)], phi, noise_var) if rest(Phi, subset) else phi.square().sum(dim=1)
    for form in ("primal", "dual"):
        full = Posterior(Phi, noise_var, form=form)
        assert_close(leave_out_variance(full, subset, phi), left, rtol=1e3 * EPS * condition(Phi, noise_var) ** 1.5, atol=0)


@many
@given(cases())
def test_singletons_equal_the_set_functions(case):
    Phi, phi, noise_var, _ = case
    n, cond = len(Phi), condition(Phi, noise_var)
    gains = torch.stack([info_gain(Phi, [j], phi, noise_var) for j in range(n)])
    losses = torch.stack([info_loss(Phi, [j], phi, noise_var) for j in range(n)])
    tol = 100 * EPS * cond
    for got, true in ((singleton_gain(Phi, phi, noise_var), gains), (singleton_loss(Phi, phi, noise_var, "dual"), losses)):
        assert got.shape == (n, len(phi))
        assert ((got - true).abs() <= tol * (true + true.sqrt()) + tol**2).all()


@some
@given(cases(), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_invariances(case, exponent, seed):
    Phi, phi, noise_var, subset = case
    n, m = Phi.shape
    rng = np.random.default_rng(seed)
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(m, m)))).Q
    order = rng.permutation(n)
    place = np.argsort(order)
    scale = 10.0**exponent
    tol = 1e3 * EPS * condition(Phi, noise_var) ** 0.5
    for score in (info_gain, info_loss):
        base = score(Phi, subset, phi, noise_var)
        others = {
            "rotation": score(Phi @ rotation, subset, phi @ rotation, noise_var),
            "permutation": score(Phi[order], [int(place[i]) for i in subset], phi, noise_var),
            "joint scaling": score(scale * Phi, subset, phi, scale**2 * noise_var),
            "query scaling": score(Phi, subset, -7 * phi, noise_var),
            "subset order": score(Phi, subset[::-1], phi, noise_var),
            "mask": score(Phi, torch.tensor([i in subset for i in range(n)]), phi, noise_var),
        }
        for name, other in others.items():
            assert ((other - base).abs() <= tol * (base + base.sqrt()) + tol**2).all(), (name, base, other)
        one = torch.cat([score(Phi, subset, x, noise_var) for x in phi])
        assert_close(one, base, rtol=tol, atol=tol**2)


@some
@given(cases())
def test_monotone_dual_and_bounded(case):
    Phi, phi, noise_var, subset = case
    full = list(range(len(Phi)))
    gain, loss = info_gain(Phi, subset, phi, noise_var), info_loss(Phi, subset, phi, noise_var)
    total, others = info_gain(Phi, full, phi, noise_var), info_gain(Phi, rest(Phi, subset), phi, noise_var)
    tol = 1e3 * EPS * condition(Phi, noise_var) ** 0.5
    assert (gain >= 0).all() and (loss >= 0).all()
    assert (gain <= total * (1 + tol) + tol).all() and (loss <= total * (1 + tol) + tol).all()
    assert_close(loss, total - others, rtol=tol, atol=tol)                     # duality: InfoLoss(S) = G(D) - G(D minus S)
    for size in range(len(subset)):
        assert (info_gain(Phi, subset[:size], phi, noise_var) <= gain * (1 + tol) + tol).all()
        assert (info_loss(Phi, subset[:size], phi, noise_var) <= loss * (1 + tol) + tol).all()
    if subset:                                                                 # InfoLoss(S) <= -1/2 logdet(I - H_SS)
        M = noise_var * torch.eye(len(subset), dtype=torch.float64)
        rows = rest(Phi, subset)
        M += posterior_covariance(Phi[rows], Phi[subset], noise_var) if rows else Phi[subset] @ Phi[subset].T
        bound = 0.5 * (torch.logdet(M) - len(subset) * np.log(noise_var))      # I - H_SS = sigma^2 M^{-1}
        assert (loss <= bound + 1e3 * EPS * condition(Phi, noise_var)).all()


def oracle():
    "A fixed case: forty examples, twelve features, one query, drawn by numpy's default_rng(0)."
    rng = np.random.default_rng(0)
    Phi, q = rng.normal(size=(40, 12)), rng.normal(size=12)
    return Phi, q, 0.7, [3, 7, 11, 20]


def test_oracle_case():
    Phi, q, s2, S = oracle()
    D, K, j = list(range(40)), Phi @ Phi.T, 5
    R = [i for i in D if i not in S]

    def v(rows, x=q):
        k = Phi[rows] @ x
        return x @ x - k @ np.linalg.solve(K[np.ix_(rows, rows)] + s2 * np.eye(len(rows)), k)

    same = lambda got, want: np.testing.assert_allclose(got.numpy(), np.atleast_1d(want), rtol=1e-10)
    same(posterior_variance(Phi, q, s2), v(D))
    same(posterior_variance(Phi[S], q, s2), v(S))
    same(posterior_variance(Phi, Phi[[j]], s2) / s2, leverage(Phi, s2)[[j]].numpy())
    same(info_gain(Phi, S, q, s2), 0.5 * np.log(q @ q / v(S)))
    same(info_loss(Phi, S, q, s2), 0.5 * np.log(v(R) / v(D)))
    same(info_loss(Phi, [j], q, s2), 0.5 * np.log(v([i for i in D if i != j]) / v(D)))
    same(singleton_loss(Phi, q, s2)[j], info_loss(Phi, [j], q, s2).numpy())
    same(leave_out_variance(Posterior(Phi, s2), S, q), v(R))
    P_inv = np.linalg.inv(np.eye(12) + Phi[S].T @ Phi[S] / s2)
    np.testing.assert_allclose(Posterior(Phi, s2, S).regress(q)[0].numpy()[0], P_inv @ q, rtol=1e-10)
    for noise_var in (1e4, 1e5, 1e6):                                          # the lemma and its next order
        gain, loss = info_gain(Phi, S, q, noise_var).item(), info_loss(Phi, S, q, noise_var).item()
        k_S, k_R, k_qq = Phi[S] @ q, Phi[R] @ q, q @ q
        gap = 0.5 * (2 * k_R @ K[np.ix_(R, S)] @ k_S / k_qq - (k_S @ k_S) * (k_R @ k_R) / k_qq**2)
        assert noise_var * gain == pytest.approx(k_S @ k_S / (2 * k_qq), rel=20 / noise_var**0.5)
        assert high_noise_limit(Phi, S, q, noise_var).item() == pytest.approx(k_S @ k_S / (2 * k_qq * noise_var))
        assert noise_var**2 * (gain - loss) == pytest.approx(gap, rel=200 / noise_var)
    # the figures themselves, so that a change of the reference cannot go unnoticed
    assert info_gain(Phi, S, q, s2).item() == pytest.approx(0.148341, abs=1e-6)
    assert info_loss(Phi, S, q, s2).item() == pytest.approx(0.035882, abs=1e-6)


@pytest.mark.parametrize("shape", [(6000, 1024), (300, 20000)])
def test_float32_in_several_blocks(shape):
    "Enough numbers for more than one block in rows and in columns; float32 features, exact in float64."
    generator = torch.Generator().manual_seed(0)
    Phi = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    phi = torch.randn(3, shape[1], generator=generator)
    F, x, noise_var = Phi.double(), phi.double(), 1.0
    small = F @ F.T + noise_var * torch.eye(len(F)) if len(F) < F.shape[1] else None
    if small is not None:
        k = F @ x.T
        var = x.square().sum(dim=1) - (k * torch.linalg.solve(small, k)).sum(dim=0)
    else:
        var = (x.T * torch.linalg.solve(torch.eye(F.shape[1]) + F.T @ F / noise_var, x.T)).sum(dim=0)
    assert_close(posterior_variance(Phi, phi, noise_var), var, rtol=1e-9, atol=0)
    assert_close(info_gain(Phi, range(len(Phi)), phi, noise_var), 0.5 * (x.square().sum(dim=1) / var).log(), rtol=1e-9, atol=0)
    even, odd = range(0, len(Phi), 2), range(1, len(Phi), 2)
    total = info_gain(Phi, range(len(Phi)), phi, noise_var)
    assert_close(info_loss(Phi, even, phi, noise_var), total - info_gain(Phi, odd, phi, noise_var), rtol=1e-8, atol=0)


def test_compressed_rows_keep_the_gram_matrix():
    F = torch.randn(5000, 1000, generator=torch.Generator().manual_seed(1))
    triangle = compress(F)
    assert triangle.shape == (1000, 1000) and triangle.dtype == torch.float64
    assert_close(triangle.T @ triangle, F.double().T @ F.double(), rtol=1e-10, atol=1e-8)


def test_high_leverage_from_float32_features():
    generator = torch.Generator().manual_seed(0)
    Phi, phi = torch.randn(60, 200, generator=generator), torch.randn(2, 200, generator=generator)
    noise_var = 1e-5 * Phi.double().square().sum(dim=1).mean().item()
    assert leverage(Phi, noise_var).max() > 0.99998
    exact = torch.stack([info_loss(Phi, [j], phi, noise_var) for j in range(60)])
    for form in ("primal", "dual"):
        assert_close(singleton_loss(Phi, phi, noise_var, form), exact, rtol=1e-6, atol=1e-12)


def test_zero_variance_queries_have_zero_nats():
    Phi = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = torch.zeros(2, 4, dtype=torch.float64)
    phi[1, 0] = 1e-300                                                         # tiny is not zero
    for nats in (info_gain(Phi, [0, 1], phi), info_loss(Phi, [0, 1], phi), singleton_gain(Phi, phi)[2], singleton_loss(Phi, phi)[2], high_noise_limit(Phi, [0], phi)):
        assert nats[0] == 0 and nats[1] > 0


def test_shapes_and_inputs():
    Phi = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert info_gain(Phi, [0], Phi[0]).shape == (1,) and info_loss(Phi, [0], Phi[:3]).shape == (3,)
    assert_close(info_gain(Phi.numpy(), np.array([0, 2]), Phi[0].numpy()), info_gain(Phi, [0, 2], Phi[0]))
    assert_close(info_loss(Phi, [1], Phi), info_loss(Phi, [1], Phi, Phi.double().square().sum(dim=1).mean().item()))
    pool_of_one = Phi[:1]
    assert_close(info_loss(pool_of_one, [0], Phi), info_gain(pool_of_one, [0], Phi))


NAN = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])


@pytest.mark.parametrize("function", [info_gain, info_loss])
@pytest.mark.parametrize("arguments, error, words", [
    ((torch.eye(3), [0, 0], torch.ones(3)), ValueError, "at most once"),
    ((torch.eye(3), [3], torch.ones(3)), ValueError, "from 0 to 2"),
    ((torch.eye(3), [-1], torch.ones(3)), ValueError, "from 0 to 2"),
    ((torch.eye(3), [0], torch.ones(4)), ValueError, "3 columns"),
    ((torch.eye(3), [0], torch.ones(1, 1, 3)), ValueError, "matrix"),
    ((torch.ones(3), [0], torch.ones(3)), ValueError, "matrix"),
    ((NAN, [1], torch.ones(2)), ValueError, "finite"),
    ((torch.eye(2), [1], NAN), ValueError, "finite"),
    ((torch.eye(3).int(), [0], torch.ones(3)), TypeError, "floating"),
    ((torch.eye(3), [0], torch.ones(3), 0.0), ValueError, "noise_var"),
    ((torch.eye(3), [0], torch.ones(3), -2.0), ValueError, "noise_var"),
    ((torch.eye(3), [0], torch.ones(3), float("nan")), ValueError, "noise_var"),
    ((torch.zeros(3, 3), [0], torch.ones(3)), ValueError, "not all zero"),
])
def test_bad_input(function, arguments, error, words):
    with pytest.raises(error, match=words):
        function(*arguments)


def test_noise_below_float64_is_refused():
    "A long common direction: at 1e-6 kappa 50,000 rows still pass, and just below the limit the nats are right."
    generator = torch.Generator().manual_seed(0)
    Phi = torch.randn(50_000, 4, dtype=torch.float64, generator=generator)
    kappa = Phi.square().sum(dim=1).mean().item()
    posterior_variance(Phi, Phi[:1], 1e-6 * kappa)
    for call in (lambda: posterior_variance(Phi, Phi[:1], 1e-7 * kappa), lambda: info_loss(Phi, [0], Phi[:1], 1e-8 * kappa)):
        with pytest.raises(ValueError, match="loses the digits"):
            call()
    with pytest.raises(ValueError, match="form"):
        Posterior(Phi[:5], 1.0, form="")


def test_singleton_gain_of_nearly_parallel_rows():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(2, 30, dtype=torch.float64, generator=generator)
    Phi = torch.cat([phi * scale + tilt * torch.randn(2, 30, dtype=torch.float64, generator=generator) for scale in (1.0, 7.0) for tilt in (0.0, 1e-8, 1e-4, 0.05)])
    for noise_var in (1e-12, 1e-6, 1.0):
        true = torch.stack([info_gain(Phi, [j], phi, noise_var) for j in range(len(Phi))])
        assert_close(singleton_gain(Phi, phi, noise_var), true, rtol=1e-7, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_numbers_on_the_gpu():
    generator = torch.Generator().manual_seed(0)
    Phi, phi = torch.randn(200, 30, generator=generator), torch.randn(4, 30, generator=generator)
    for call in (lambda F, x: info_gain(F, range(0, 200, 3), x), lambda F, x: info_loss(F, [1, 5, 7], x), singleton_gain, singleton_loss, posterior_variance):
        on_gpu = call(Phi.cuda(), phi.cuda())
        assert on_gpu.is_cuda
        assert_close(on_gpu.cpu(), call(Phi, phi), rtol=1e-9, atol=1e-14)
