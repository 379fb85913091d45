"""Leaving one out by short cuts and by retraining, on drawn cases; information in three structures; devices."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infotda.core import expect_error
from infotda.data import has_data, load_data
from infotda.laplace import kl_diagonal, kl_full, kl_kfac
from infotda.lsi import LSI, STRUCTURES, FullInformation, KFACInformation, lsi_gaussian
from infotda.probe import as_classes, contrasts, fit_probe, initial_probe, newton_loo, path_segments, residuals, retrain_loo, tangent_loo, train_steps, with_bias

close = torch.testing.assert_close
gather = lambda blocks: torch.cat([delta for _, delta in blocks])
relative = lambda a, b: (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


def spearman(a, b):
    "Rank correlation."
    ranks = lambda v: v.argsort().argsort().double()
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@st.composite
def problems(draw):
    "A small classification problem: features with bias, labels, number of classes, weight decay."
    n, d, C = draw(st.integers(4, 30)), draw(st.integers(1, 12)), draw(st.integers(2, 5))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = 10.0 ** draw(st.integers(-2, 1))
    X = scale * torch.randn(n, d, dtype=torch.float64, generator=gen)
    if draw(st.booleans()):
        X[1] = X[0]
    y = torch.randint(C, (n,), generator=gen)
    y[:min(C, n)] = torch.arange(C)[:n]
    return with_bias(X), y, C, 10.0 ** draw(st.integers(-5, 0))


slow = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@slow
@given(problems())
def test_newton_is_retraining(case):
    X, y, C, w = case
    fit = fit_probe(X, y, C, w)
    assert fit.converged
    found = gather(newton_loo(X, y, fit.theta, w, accuracy=0, progress=False))
    for i, moved in enumerate(found):
        keep = torch.arange(len(X)) != i
        refit = fit_probe(X[keep], y[keep], C, w, tol=1e-14)
        _, resid = residuals(X[keep], y[keep], fit.theta + moved)
        grad = (resid.T @ X[keep] / (len(X) - 1) + w * (fit.theta + moved)).norm().item()
        assert grad <= 1e-7 * X.square().sum(dim=1).mean().sqrt().item()
        off = 2 * (grad + refit.grad_norm) / w  # the objective is at least w-convex: so far may both be from the optimum
        close(moved, refit.theta - fit.theta, rtol=1e-5, atol=1e-6 * float(found.abs().max()) + off)


@slow
@given(problems())
def test_newton_keeps_its_accuracy(case):
    X, y, C, w = case
    fit = fit_probe(X, y, C, w)
    exact, found = (gather(newton_loo(X, y, fit.theta, w, accuracy=a, progress=False)) for a in (0, 1e-3))
    assert relative(found, exact).max() < 1e-3 * (1 + 1e-6)


@slow
@given(problems(), st.integers(1, 60))
def test_tangent_is_second_order(case, steps):
    X, y, C, w = case
    X = X / X.norm(dim=1).max()
    start = 0.1 * initial_probe(C, X.shape[1])
    truth = gather(retrain_loo(X, y, C, w, steps=steps, start=start, lr=0.1, progress=False))
    pieces = path_segments(X, y, start, w, steps, lr=0.1, segments=10 * steps, progress=False)[1]
    found = gather(tangent_loo(X, y, pieces, progress=False))
    lengths = truth.flatten(1).norm(dim=1)
    assert ((found - truth).flatten(1).norm(dim=1) <= 2 * lengths.square() + 1e-9).all()


@slow
@given(problems())
def test_structures_against_dense(case):
    X, y, C, w = case
    fit, tau = fit_probe(X, y, C, w), 0.3
    rows = torch.arange(3)
    delta = gather(newton_loo(X, y, fit.theta, w, rows, accuracy=0, progress=False))
    found = {name: make(X, fit.theta, tau, "exact") for name, make in STRUCTURES.items()}
    mean = torch.cat([fit.theta[:, :-1].flatten(), fit.theta[:, -1]])
    for k in rows.tolist():
        kept = torch.arange(len(X)) != k
        moved = fit.theta + delta[k]
        after = torch.cat([moved[:, :-1].flatten(), moved[:, -1]])
        for name, make in STRUCTURES.items():
            p, q = found[name].curvature(), make(X[kept], moved, tau, "exact").curvature()
            eye = tau * torch.eye(len(mean), dtype=torch.float64)
            if name == "diag":
                truth = kl_diagonal(mean, p.diag + tau, after, q.diag + tau)
            elif name == "full":
                truth = kl_full(mean, p.matrix + eye, after, q.matrix + eye)
            else:
                split = lambda t: {"weight": t[:, :-1], "bias": t[:, -1]}
                truth = kl_kfac(split(fit.theta), p.factors, split(moved), q.factors, tau)
            nats = found[name](rows, delta)[k]
            close(nats, truth, rtol=1e-6, atol=1e-9)
            assert nats > -1e-12


@slow
@given(problems())
def test_no_displacement_no_shift(case):
    X, y, C, w = case
    fit = fit_probe(X, y, C, w)
    zero = torch.zeros(len(X), C, X.shape[1], dtype=torch.float64)
    for name, make in STRUCTURES.items():
        nats = make(X, fit.theta, 1.0, "fixed")(torch.arange(len(X)), zero)
        assert (nats > -1e-12).all(), name


@slow
@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 10_000), st.integers(-6, 4))
def test_gaussian_is_refitting(n, d, seed, exponent):
    gen = torch.Generator().manual_seed(seed)
    X, y = torch.randn(n, d, dtype=torch.float64, generator=gen), torch.randn(n, dtype=torch.float64, generator=gen)
    s2, tau = 10.0**exponent, 1.0

    def posterior(kept):
        precision = tau * torch.eye(d, dtype=torch.float64) + X[kept].T @ X[kept] / s2
        return torch.linalg.solve(precision, X[kept].T @ y[kept] / s2), precision

    truth = torch.stack([kl_full(*posterior(torch.ones(n, dtype=torch.bool)), *posterior(torch.arange(n) != i)) for i in range(n)])
    close(lsi_gaussian(X, y, s2, tau), truth, rtol=1e-10 if exponent > -3 else 1e-6, atol=1e-10 if exponent > -3 else 1e-6)


def test_steps_with_one_example_removed_by_weight():
    "A sum over n - 1 examples with the same weight decay, and not the same sum over n."
    X, y = with_bias(torch.randn(20, 3, generator=torch.Generator().manual_seed(0))), torch.arange(20) % 2
    start, kept = initial_probe(2, 4), torch.arange(20) != 5
    truth = train_steps(X[kept], y[kept], start, 0.1, 30)[0].theta - train_steps(X, y, start, 0.1, 30)[0].theta
    close(next(retrain_loo(X, y, 2, 0.1, torch.tensor([5]), steps=30, start=start, progress=False))[1][0], truth)


def test_contrasts():
    for C in range(2, 9):
        Q = contrasts(C)
        close(Q.T @ Q, torch.eye(C - 1, dtype=torch.float64))
        assert Q.sum(dim=0).abs().max() < 1e-14


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits")
    return data.x.flatten(1), data.y


def test_inputs_are_equal(digits):
    "float32, float64 and numpy; a permutation; a part of the rows."
    X, y = digits[0][:150], digits[1][:150]
    scores = LSI(progress=False).fit(X, y).scores_
    assert scores.shape == (150,) and scores.dtype == torch.float64 and (scores > 0).all()
    close(LSI(progress=False).fit(X.double().numpy(), y.numpy().astype(np.int32)).scores_, scores)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    close(LSI(accuracy=0, progress=False).fit(X[order], y[order]).scores_, LSI(accuracy=0, progress=False).fit(X, y).scores_[order], rtol=1e-6, atol=1e-12)
    close(LSI(accuracy=0, progress=False).fit(X, y, rows=[7, 3]).scores_, LSI(accuracy=0, progress=False).fit(X, y).scores_[[7, 3]], rtol=1e-7, atol=1e-12)


def test_digits_newton(digits):
    X, y = digits
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))[:60]
    found = LSI(progress=False).fit(X, y)
    truth = LSI(loo="retrain", loo_curvature="exact", progress=False).fit(X, y, rows=rows)
    assert found.converged_ and truth.converged_
    assert (found.scores_[rows] / truth.scores_ - 1).abs().median() < 1e-3
    assert spearman(found.scores_[rows], truth.scores_) > 0.9999


def test_digits_tangent(digits):
    X, y = digits[0][:400], digits[1][:400]
    with pytest.warns(UserWarning, match="gradient has length"):
        found = LSI(loo="tangent", progress=False).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = LSI(loo="retrain", steps=1000, progress=False).fit(X, y, rows=range(0, 400, 5))
    assert not found.converged_ and found.grad_norm_ > 1e-3
    assert spearman(found.scores_[::5], truth.scores_) > 0.999


@pytest.mark.skipif(not has_data("cifar10"), reason="CIFAR-10 not found")
def test_cifar_newton():
    "2,000 pictures, 512 rectified and averaged responses of patches: a convolution that was not trained."
    data = load_data("cifar10").sample(2000, seed=0)
    gen = torch.Generator().manual_seed(0)
    x = (data.x - data.x.mean(dim=(0, 2, 3), keepdim=True)) / data.x.std(dim=(0, 2, 3), keepdim=True)
    filters = torch.stack([x[i, :, r:r + 6, c:c + 6] for i, r, c in zip(*(torch.randint(high, (512,), generator=gen).tolist() for high in (2000, 27, 27)))])
    filters = filters - filters.mean(dim=(1, 2, 3), keepdim=True)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    X = torch.cat([torch.relu(torch.conv2d(part, filters, stride=2) - 1).mean(dim=(2, 3)) for part in x.split(200)])
    rows = torch.randperm(2000, generator=gen)[:5]
    found = LSI(progress=False).fit(X, data.y, rows=rows)
    truth = LSI(loo="retrain", loo_curvature="exact", progress=False).fit(X, data.y, rows=rows)
    assert found.converged_
    assert (found.scores_ / truth.scores_ - 1).abs().max() < 0.01
    assert found.scores_.argsort().equal(truth.scores_.argsort())


def test_bad_input():
    X, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    expect_error(ValueError, lambda: LSI().fit(X.index_fill(0, torch.tensor([2]), float("inf")), y), "first [2]")
    expect_error(ValueError, lambda: LSI().fit(X, y - 1), "labels from 0")
    expect_error(TypeError, lambda: LSI().fit(X, y.double()), "integer")
    expect_error(ValueError, lambda: LSI().fit(X, y[:5]), "12 examples")
    expect_error(ValueError, lambda: LSI(prior_precision=0).fit(X, y), "prior_precision")
    expect_error(TypeError, lambda: LSI(prior_precision="1").fit(X, y), "prior_precision")
    expect_error(ValueError, lambda: as_classes(torch.tensor([0, 1]), 2, classes=1), "two classes")
    expect_error(ValueError, lambda: LSI(weight_decay=0, prior_precision=1.0, progress=False).fit(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])), "no finite optimum")


def test_unpenalised_probe_that_has_an_optimum():
    "Without weight decay the optimum is finite if the classes overlap."
    X = torch.tensor([[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0], [0.1], [-0.2]])
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    found = LSI(weight_decay=0.0, prior_precision=1.0, accuracy=0, progress=False).fit(X, y)
    truth = LSI(weight_decay=0.0, prior_precision=1.0, loo="retrain", progress=False).fit(X, y)
    assert found.converged_
    close(found.scores_, truth.scores_, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("loo", ["newton", "tangent", "retrain"])
def test_cuda(digits, loo):
    X, y = digits[0][:200], digits[1][:200]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for curvature in STRUCTURES:
            here, there = (LSI(loo=loo, curvature=curvature, progress=False).fit(X.to(d), y.to(d), rows=range(0, 200, 20)) for d in ("cpu", "cuda"))
            assert there.scores_.device.type == "cuda"
            close(there.scores_.cpu(), here.scores_, rtol=1e-4, atol=1e-9)
            assert there.posterior_.mean_.device.type == "cuda"
    assert KFACInformation is STRUCTURES["kfac"] and FullInformation is STRUCTURES["full"]
