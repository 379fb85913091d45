"""The linear response of infotda.response against the exact set functions."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from infotda.response import candidate_moments, exact_response, linear_response, residual_query, response_bound, response_error
from infotda.surrogate import info_gain, posterior_variance


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    Phi = torch.randn(n, m, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        Phi[0] = Phi[-1]
    phi = torch.randn(draw(st.integers(1, 3)), m, dtype=torch.float64, generator=generator)
    noise_var = Phi.square().sum(dim=1).mean().item() * 10.0 ** draw(st.floats(-4, 6))
    return Phi, phi, noise_var, [i for i in range(n) if draw(st.booleans())]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_one_more_example(case):
    Phi, phi, noise_var, S = case
    condition = 1 + torch.linalg.matrix_norm(Phi, 2).item() ** 2 / noise_var
    tol = 1e3 * torch.finfo(torch.float64).eps * condition**0.5
    var, cov, candidate_var = candidate_moments(Phi, S, phi, noise_var)
    assert_close(Phi @ residual_query(Phi, S, phi, noise_var).T, cov, rtol=0, atol=tol * condition**0.5 * phi.norm().item() * Phi.norm().item())
    exact, linear = exact_response(var, cov, candidate_var, noise_var), linear_response(var, cov, noise_var)
    for i in range(len(Phi)):                                           # observing i once more, also where i is in S already
        again = torch.cat([Phi[S], Phi[[i]]])
        assert_close(exact[i], posterior_variance(again, phi, noise_var), rtol=tol * condition, atol=0)
    error, bound = response_error(cov, candidate_var, noise_var), response_bound(cov, candidate_var, noise_var)
    assert (linear <= exact).all() and (error >= 0).all() and (error <= bound * (1 + 1e-12)).all()
    assert_close(exact - linear, error, rtol=1e-9, atol=1e-12 * (var.max() + cov.square().max() / noise_var).item())


def test_nats_come_from_the_exact_response():
    Phi = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = Phi[:2] * 1.5
    var, cov, candidate_var = candidate_moments(Phi, [4, 9], phi, 0.1)
    assert (linear_response(var, cov, 0.1) < 0).any()
    exact = exact_response(var, cov, candidate_var, 0.1)
    gains = torch.stack([info_gain(Phi, [4, 9, i], phi, 0.1) for i in range(30) if i not in (4, 9)])
    assert_close(0.5 * (phi.square().sum(dim=1) / exact[[i for i in range(30) if i not in (4, 9)]]).log(), gains)


def test_float32_in_blocks_and_default_noise():
    Phi = torch.randn(500, 2**14, generator=torch.Generator().manual_seed(1))
    phi = Phi[:2] + 1
    blocks, whole = candidate_moments(Phi, [3, 5], phi), candidate_moments(Phi.double(), [3, 5], phi.double(), Phi.double().square().sum(dim=1).mean().item())
    for a, b in zip(blocks, whole):
        assert_close(a, b, rtol=1e-9, atol=1e-6)


def test_bad_input():
    Phi = torch.eye(3, dtype=torch.float64)
    var, cov, candidate_var = candidate_moments(Phi, [0], torch.ones(2, 3), 1.0)
    for call in (lambda s2: linear_response(var, cov, s2), lambda s2: exact_response(var, cov, candidate_var, s2), lambda s2: response_error(cov, candidate_var, s2), lambda s2: response_bound(cov, candidate_var, s2)):
        for noise_var in (0.0, -1.0, float("nan"), None):
            with pytest.raises(ValueError, match="noise_var"):
                call(noise_var)
    for call in (lambda: linear_response(candidate_var, cov, 1.0), lambda: exact_response(var, cov, var, 1.0), lambda: response_error(cov, var, 1.0), lambda: response_bound(cov[:, 0], candidate_var, 1.0)):
        with pytest.raises(ValueError, match="shapes"):
            call()
    for call in (candidate_moments, residual_query):
        with pytest.raises(TypeError, match="subset"):
            call(Phi, None, torch.ones(3))
