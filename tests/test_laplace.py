"""Curvature against dense oracles and peers, and divergences that cannot be negative."""
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from infotda.curvature import ggn, softmax_column
from infotda.data import load_torchvision
from infotda.jacobian import flatten_jacobian, per_example_jacobian
from infotda.laplace import LaplacePosterior, best_prior_precision, kl_diagonal, kl_divergence, kl_full, kl_kfac, log_likelihood, stein_loss
from infotda.outputs import logit
from infotda.surrogate import posterior_variance

seeds = st.integers(0, 2**31)
quiet = {"progress": False}


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).double()


# closed forms


@given(st.floats(-0.999999, 1e12), st.integers(-18, 0))
@settings(max_examples=150, deadline=None)
def test_stein_loss_has_its_digits_and_its_sign(base, power):
    d = base * 10.0**power
    with mpmath.workdps(60):
        exact = mpmath.mpf(d) - mpmath.log(1 + mpmath.mpf(d)) if abs(d) > 1e-20 else mpmath.mpf(d) ** 2 / 2
    got = stein_loss(torch.tensor(d, dtype=torch.float64)).item()
    assert got >= 0
    assert abs(got - float(exact)) <= 1e-9 * float(exact) + 1e-300


@st.composite
def gaussians(draw):
    "Two precisions with eigenvalues over many orders of magnitude, close to each other or not, and a shift."
    rng, K = np.random.default_rng(draw(seeds)), draw(st.integers(1, 6))
    spread, change, shift = draw(st.integers(0, 4)), draw(st.integers(-12, 3)), draw(st.integers(-8, 2))
    values = 10.0 ** rng.uniform(-spread, spread, K)
    turn = np.linalg.qr(rng.normal(size=(K, K)))[0]
    P = (turn * values) @ turn.T
    root = (turn * values**0.5) @ rng.normal(size=(K, K)) * 10.0 ** (change / 2)
    return [tensor(t) for t in (np.zeros(K), (P + P.T) / 2, 10.0**shift * rng.normal(size=K), (P + P.T) / 2 + root @ root.T)]


def exact_kl(mean_p, P, mean_q, Q):
    with mpmath.workdps(60):
        P, Q, shift = (mpmath.matrix(t.tolist()) for t in (P, Q, mean_q - mean_p))
        ratio = Q * P**-1
        trace = sum(ratio[i, i] for i in range(len(shift)))
        return float((trace - len(shift) - mpmath.log(mpmath.det(Q)) + mpmath.log(mpmath.det(P)) + (shift.T * Q * shift)[0]) / 2)


@given(gaussians())
@settings(max_examples=80, deadline=None)
def test_full_divergence_against_sixty_digits(pair):
    mean_p, P, mean_q, Q = pair
    assert kl_full(mean_p, P, mean_p, P) == 0
    for p, q in ((P, Q), (Q, P)):
        got, exact = kl_full(mean_p, p, mean_q, q).item(), exact_kl(mean_p, p, mean_q, q)
        slack = torch.linalg.cond(p).item() * 1e-15
        assert got >= 0 and exact >= 0
        assert abs(got - exact) <= 1e-9 * exact + slack * exact**0.5 + slack**2


@given(seeds, st.integers(1, 8), st.integers(-12, 4))
@settings(max_examples=80, deadline=None)
def test_diagonal_divergence(seed, K, power):
    rng = np.random.default_rng(seed)
    p, shift = tensor(10.0 ** rng.uniform(-6, 6, K)), tensor(rng.normal(size=K)) * 10.0**power
    q = p * (1 + 10.0**power * tensor(rng.uniform(0, 1, K)))
    for a, b in ((p, q), (q, p)):
        got = kl_diagonal(torch.zeros_like(p), a, shift, b)
        assert_close(got.item(), exact_kl(torch.zeros_like(p), a.diag(), shift, b.diag()), rtol=1e-8, atol=0)
        assert got > 0
    assert_close(kl_diagonal(p, p, p, torch.stack([p, q]))[1], kl_diagonal(p, p, p, q))


def dense(factors, tau):
    matrix = torch.kron(*factors)
    return matrix + tau * torch.eye(len(matrix), dtype=matrix.dtype)


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(-10, 1), st.floats(-3, 3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_kronecker_divergence_is_that_of_the_dense_product(seed, d_out, d_in, power, log_tau, deficient):
    rng, tau = np.random.default_rng(seed), 10.0**log_tau
    rank = (lambda d: max(1, d - 1)) if deficient else (lambda d: d + 1)
    roots = [rng.normal(size=(d, rank(d))) for d in (d_out, d_in)]
    moved = [root + 10.0**power * rng.normal(size=root.shape) for root in roots]
    first, second = ([tensor(r @ r.T) for r in pair] for pair in (roots, moved))
    W, V = (tensor(10.0**power * rng.normal(size=(d_out, d_in))) for _ in range(2))
    for p, q in ((first, second), (second, first)):
        got, true = kl_kfac(W, p, V, q, tau), kl_full(W.flatten(), dense(p, tau), V.flatten(), dense(q, tau))
        assert got >= 0
        assert_close(got, true, rtol=1e-8, atol=1e-20)
    assert 0 <= kl_kfac(W, first, W, first, tau) < 1e-20


def test_separated_and_pairwise_forms_meet():
    rng = np.random.default_rng(0)
    root, move = rng.normal(size=(40, 60)), rng.normal(size=(40, 60))
    B, W = torch.eye(5).double(), torch.zeros(5, 40).double()
    for size in 10.0 ** np.arange(-9, 0):
        A, A2 = tensor(root @ root.T), tensor((root + size * move) @ (root + size * move).T)
        got = kl_kfac(W, (B, A), W, (B, A2), 0.5)
        assert got > 0
        assert_close(got, kl_full(W.flatten(), dense((B, A), 0.5), W.flatten(), dense((B, A2), 0.5)), rtol=1e-3, atol=0)


# curvature


def naive_ggn(model, x, loss="classification", noise_var=1.0, params=None):
    C = model(x).shape[1]
    J = torch.stack([flatten_jacobian(per_example_jacobian(model, x, logit(c), params=params, engine="func")) for c in range(C)], dim=1)
    if loss == "regression":
        return torch.einsum("ncp,ncq->pq", J, J) / noise_var
    probs = model(x).detach().softmax(dim=1)
    return torch.einsum("ncp,ncd,ndq->pq", J, probs.diag_embed() - probs[:, :, None] * probs[:, None], J)


class Shared(nn.Module):
    "One matrix used twice, a normalisation layer, tokens."

    def __init__(self, d=3):
        super().__init__()
        self.norm, self.twice, self.head = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, 2, bias=False)

    def forward(self, x):
        h = torch.tanh(self.twice(self.norm(x)))
        return self.head(torch.tanh(self.twice(h)).mean(dim=1))


def networks():
    torch.manual_seed(1)
    return {
        "probe": (nn.Linear(4, 3), torch.randn(7, 4)),
        "mlp": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), torch.randn(7, 4)),
        "conv": (nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)), torch.randn(6, 2, 4, 4)),
        "shared": (Shared(), torch.randn(5, 4, 3)),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_exact_structures(name, loss):
    model, x = networks()[name]
    model, x = model.double().eval(), x.double()
    G = naive_ggn(model, x, loss, 0.3)
    for size in (None, 2):
        options = {"loss": loss, "noise_var": 0.3, "batch_size": size, **quiet}
        full = ggn(model, x, "full", **options)
        assert_close(full.matrix, G)
        assert_close(ggn(model, x, "diag", **options).diag, G.diagonal())
        last = ggn(model, x, "last_layer", **options)
        assert_close(last.matrix, G[-last.p :, -last.p :])
        kfac = ggn(model, x, "kfac", **options)
        assert list(kfac.factors) == list(full.shapes) == [n for n, _ in model.named_parameters()]
        assert torch.linalg.eigvalsh(kfac.dense())[0] > -1e-10 * G.abs().max()
        basis, v = kfac.eigenbasis(), torch.randn(3, full.p, dtype=torch.float64)
        assert_close(basis.back(basis.values * basis.into(v)), v @ kfac.dense())


@given(seeds, st.integers(2, 5), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_softmax_root(seed, C, b, power):
    z = 10.0**power * tensor(np.random.default_rng(seed).normal(size=(b, C)))
    S = torch.stack([softmax_column(z, c) for c in range(C)], dim=2)
    probs = z.softmax(dim=1)
    assert_close(S @ S.mT, probs.diag_embed() - probs[:, :, None] * probs[:, None], rtol=1e-10, atol=1e-14)
    rivals = (probs[:, None] * (1 - torch.eye(C, dtype=z.dtype))).sum(dim=2)
    assert_close((S @ S.mT).diagonal(dim1=1, dim2=2), probs * rivals, rtol=1e-10, atol=1e-300)


def test_kfac_in_half_the_precision_and_shuffled_batches():
    model, x = networks()["conv"]
    reference = ggn(model.double().eval(), x.double(), "kfac", batch_size=4, **quiet)
    single = ggn(model.float(), x.float(), "kfac", batch_size=1, **quiet)
    for name, pair in reference.factors.items():
        assert single.factors[name][0].dtype == torch.float64
        assert_close(single.factors[name], pair, rtol=1e-4, atol=1e-5)


def test_gradient_that_is_not_finite():
    class Root(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs().sqrt()

    model = Root(1, 2, bias=False).double()
    model.weight.data.fill_(1.0)
    x = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    for structure in ("diag", "kfac", "full"):
        with pytest.raises(ValueError, match="gradients: expected finite"):
            ggn(model, x, structure, **quiet)


# posteriors


def trained(n=30, d=3, C=3, tau=0.5, seed=0):
    torch.manual_seed(seed)
    y = torch.arange(n) % C
    x = torch.randn(n, d).double() + torch.randn(C, d).double()[y]
    model = nn.Linear(d, C).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") + tau / 2 * sum(w.square().sum() for w in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval(), x, y


@given(seeds, st.sampled_from(["diag", "kfac", "full", "last_layer"]), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_posterior_against_its_dense_precision(seed, kind, log_tau):
    torch.manual_seed(seed)
    model, x, y = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double(), torch.randn(9, 3).double(), torch.randint(0, 3, (9,))
    posterior = LaplacePosterior(kind, 10.0**log_tau, **quiet).fit(model, (x, y))
    P, phi = posterior.precision(), torch.randn(2, len(posterior.mean_)).double()
    assert_close(posterior.log_det_precision_, torch.logdet(P).item(), rtol=1e-9, atol=1e-9)
    assert_close(posterior.variance(phi), (phi @ torch.linalg.inv(P) * phi).sum(dim=1), rtol=1e-8, atol=0)
    whitened = (posterior.sample(4, seed=3) - posterior.mean_).square()
    assert torch.equal(posterior.sample(4, seed=3), posterior.sample(4, seed=3)) and whitened.min() > 0
    assert_close(log_likelihood(model, (x, y)), -nn.functional.cross_entropy(model(x), y, reduction="sum").detach())
    other = posterior.with_prior(10.0**log_tau * 1.7)
    assert other is not posterior and posterior.prior_precision_ == 10.0**log_tau
    assert kl_divergence(posterior, other) > 0 and 0 <= kl_divergence(posterior, posterior) < 1e-18


@given(seeds, st.integers(1, 12), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_evidence_has_one_peak(seed, p, spread):
    rng = np.random.default_rng(seed)
    values, mean = tensor(10.0 ** rng.uniform(-spread, spread, p)), tensor(rng.normal(size=p) * 10.0 ** rng.uniform(-3, 3))
    tau = best_prior_precision(values, mean)
    slopes = [((values / (values + t)).sum() - t * mean.square().sum()).item() for t in tau * 10.0 ** np.linspace(-6, 6, 25)]
    assert all(s > 0 for s in slopes[:12]) and all(s < 0 for s in slopes[13:])


@given(seeds, st.integers(1, 10), st.integers(1, 6), st.floats(-3, 3), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_variance_is_that_of_the_surrogate(seed, n, m, log_noise, log_tau):
    rng, noise_var, tau = np.random.default_rng(seed), 10.0**log_noise, 10.0**log_tau
    Phi, phi = tensor(rng.normal(size=(n, m))), tensor(rng.normal(size=(3, m)))
    model = nn.Linear(m, 1, bias=False).double()
    posterior = LaplacePosterior("full", tau, "regression", noise_var=noise_var, **quiet).fit(model, (Phi, tensor(rng.normal(size=n))))
    assert_close(posterior.variance(phi), posterior_variance(Phi / tau**0.5, phi / tau**0.5, noise_var), rtol=1e-9, atol=0)


def test_leaving_out_any_example_is_worth_something():
    model, x, y = trained()
    for kind in ("diag", "kfac", "full"):
        whole = LaplacePosterior(kind, 0.5, **quiet).fit(model, (x, y))
        for i in range(6):
            rest = [j for j in range(30) if j != i]
            part = LaplacePosterior(kind, 0.5, **quiet).fit(model, (x[rest], y[rest]))
            assert kl_divergence(whole, part) > 0


def test_one_class_has_one_example_and_another_none():
    model, x, _ = trained()
    y = torch.tensor([0] * 29 + [1])
    assert np.isfinite(LaplacePosterior("kfac", **quiet).fit(model, (x, y)).log_marginal_likelihood_)


# peers


@pytest.fixture(scope="module")
def laplace():
    pytest.importorskip("curvlinops")
    load_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("laplace")


PEER = {"diag": "diag", "kfac": "kron", "full": "full"}


@pytest.mark.parametrize("kind", PEER)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_against_laplace_torch(laplace, kind, likelihood):
    if likelihood == "classification":
        model, x, y = trained(tau=0.5)
    else:
        torch.manual_seed(0)
        model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(20, 3).double(), torch.randn(20, 2).double()
    ours = LaplacePosterior(kind, 0.75, likelihood, noise_var=0.25, **quiet).fit(model, (x, y))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    extra = {} if likelihood == "classification" else {"sigma_noise": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = laplace.Laplace(model, likelihood, subset_of_weights="all", hessian_structure=PEER[kind], prior_precision=0.75, **extra)
        theirs.fit(loader)
        close = {"rtol": 1e-6, "atol": 1e-6} if kind == "full" else {"rtol": 1e-8, "atol": 1e-8}  # its full matrix has a step in float32
        assert_close(ours.log_det_precision_, theirs.log_det_posterior_precision.item(), **close)
        assert_close(ours.log_marginal_likelihood_, theirs.log_marginal_likelihood().item(), **close)
        if kind == "full":
            assert_close(ours.precision(), theirs.posterior_precision.detach(), **close)
    assert_close(ours.mean_, theirs.mean.detach())


def test_convolutions_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias=False)).double().eval()
    x, y = torch.randn(6, 2, 4, 4).double(), torch.randint(0, 3, (6,))
    ours = ggn(model, x, "kfac", **quiet).dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linop = curvlinops.KFACLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), [(x, y)], fisher_type="type-2", kfac_approx="expand")
        theirs = linop @ torch.eye(len(ours), dtype=torch.float64)
        exact = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), [(x, y)])
        assert_close(ggn(model, x, "full", **quiet).matrix, exact @ torch.eye(len(ours), dtype=torch.float64), rtol=1e-8, atol=1e-10)
    assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["diag", "kfac", "full", "last_layer"])
def test_same_on_a_gpu(kind):
    model, x = networks()["conv"]
    model, data = model.double().eval(), (x.double(), torch.arange(6) % 2)
    here = LaplacePosterior(kind, 0.5, **quiet).fit(model, data)
    there = LaplacePosterior(kind, 0.5, **quiet).fit(model.cuda(), data)
    assert there.mean_.is_cuda
    assert_close(there.precision().cpu(), here.precision(), rtol=1e-8, atol=1e-10)
    assert_close(there.log_marginal_likelihood_, here.log_marginal_likelihood_, rtol=1e-8, atol=0)
    assert there.sample(3).is_cuda and 0 <= kl_divergence(there, there) < 1e-18
    assert_close(kl_divergence(there, there.with_prior(2.0)).cpu(), kl_divergence(here, here.with_prior(2.0)), rtol=1e-8, atol=0)
