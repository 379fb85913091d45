"""What Hypothesis draws for several test files."""
import torch
from hypothesis import strategies as st


def awkward_rows(draw, rng, n, m):
    "An (n, m) numpy matrix of any rank and scale, some rows copies of others, zero, or of very different length."
    rank = draw(st.integers(1, m))
    Phi = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, m)) * 10.0 ** draw(st.integers(-3, 3))
    for kind in draw(st.lists(st.sampled_from(["copy", "zero", "long", "short"]), max_size=3)):
        i, j = rng.integers(n, size=2)
        Phi[i] = {"copy": Phi[j], "zero": 0 * Phi[j], "long": 30 * Phi[j], "short": Phi[j] / 30}[kind]
    return Phi


def condition(Phi, noise_var):
    "1 + lambda_max / sigma^2, the condition number of P and of A."
    return 1 + torch.linalg.matrix_norm(Phi, 2).item() ** 2 / noise_var
