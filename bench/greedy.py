"""Greedy selection: CPU time beside the matrix products that no method can avoid, and beside per-query Sherman-Morrison.

    python bench/greedy.py            all cases, a few minutes, writes bench/results/greedy.json
    python bench/greedy.py --quick    small cases, seconds, writes nothing

Each case runs in a process of its own, on one thread. The floor of a case is the product Phi (n x m) . (m x queries), once
for each step, by the fastest routine at hand. `naive` keeps one m x m inverse per query and reads all features twice a step, once in float32 and once in float64 (the rankings
and nats of infotda are exact in float64). A "tight" case may use a fifth of the features' bytes for its work: chosen rows are
then remembered instead of vectors, and where that is not enough, queries go in smaller groups.
Peak memory counts from just before the features are made.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import aligned, cpu, peak_bytes, run_cases
from infotda.core import fast_product
from infotda.elimination import plan
from infotda.greedy import InfoGain, InfoLoss, ApproxInfoGain

TIGHT = 5  # the work of a "tight" case may take a fifth of the features
CASES = {  # name: rule, n, m, queries, k, pool (None: all rows), memory-mapped, repetitions, queries of the naive method
    "n50k-m512": (InfoGain, 50_000, 512, 100, 100, None, False, 3, 2),
    "n10k-m4096": (InfoGain, 10_000, 4096, 100, 100, None, False, 3, 2),
    "n50k-m512-tight": (InfoGain, 50_000, 512, 100, 100, None, False, 3, 0),
    "n10k-m4096-tight": (InfoGain, 10_000, 4096, 100, 100, None, False, 3, 0),
    "pool5k-m512": (InfoGain, 50_000, 512, 100, 100, 5_000, False, 3, 0),
    "pool5k-m4096": (InfoGain, 10_000, 4096, 100, 100, 5_000, False, 3, 0),
    "approx-n50k-m512": (ApproxInfoGain, 50_000, 512, 100, 100, None, False, 2, 0),
    "loss-n50k-m512": (InfoLoss, 50_000, 512, 100, 100, None, False, 2, 0),
    "n1m-m512-file": (InfoGain, 1_000_000, 512, 100, 100, None, True, 1, 0),
}
QUICK = {
    "n4k-m128": (InfoGain, 4_000, 128, 30, 20, None, False, 2, 2),
    "pool400-m1024": (InfoGain, 4_000, 1024, 60, 20, 400, False, 2, 0),
    "loss-n4k-m128": (InfoLoss, 4_000, 128, 30, 20, None, False, 1, 0),
    "n4k-m128-tight": (InfoGain, 4_000, 128, 30, 20, None, False, 1, 0),
    "n20k-m64-file": (InfoGain, 20_000, 64, 20, 10, None, True, 1, 0),
}


def naive(Phi, phi, noise_var, k, dtype):
    "One query by Sherman-Morrison on an m x m inverse."
    Phi, P_inv = Phi.numpy().astype(dtype, copy=False), np.eye(len(phi), dtype=dtype)
    phi, v, free, S = phi.numpy().astype(dtype), np.einsum("ij,ij->i", Phi, Phi), np.ones(len(Phi), dtype=bool), []
    for _ in range(k):
        c = Phi @ (P_inv @ phi)
        j = int(np.where(free, c * c / (v + noise_var), -1.0).argmax())
        t, d = P_inv @ Phi[j], noise_var + v[j]
        P_inv -= np.outer(t, t / d)
        v -= (Phi @ t) ** 2 / d
        free[j] = False
        S.append(j)
    return S


def features(n, m, path):
    "Gaussian features with unit mean square norm, filled in place; in a file if a path is given."
    Phi = torch.empty(n, m) if path is None else torch.from_file(str(path), shared=True, size=n * m, dtype=torch.float32).view(n, m)
    gen = torch.Generator().manual_seed(0)
    for part in Phi.split(2**14):
        part.normal_(generator=gen).mul_(m**-0.5)
    return Phi


def measure(name, case, path=None):
    "All figures of one case."
    rule, n, m, q, k, pool, _, repetitions, naive_queries = case
    torch.set_num_threads(1)
    InfoGain().fit(torch.ones(200, 8)).select(torch.ones(2, 8), 2)      # lazy imports
    base = peak_bytes()
    Phi = features(n, m, path)
    gen = torch.Generator().manual_seed(1)
    phi = torch.randn(q, m, generator=gen) * m**-0.5 + Phi[:q]
    candidates, rows = None, Phi
    if pool is not None:
        candidates = torch.zeros(n, dtype=torch.bool)
        candidates[torch.randperm(n, generator=gen)[:pool]] = True
    memory = 4 * n * m // TIGHT if name.endswith("tight") else None
    fit_seconds, fitted = cpu(rule().fit, Phi)
    seconds, products, picked = [], [], fitted.select(phi, k, candidates, memory=memory)
    peak = peak_bytes() - base                                           # before any product of the floor
    for _ in range(repetitions):
        products += [cpu(fast_product, phi, rows)[0] for _ in range(5 if n <= 100_000 else 2)]
        spent, picked = cpu(lambda: fitted.select(phi, k, candidates, memory=memory))
        seconds.append(spent)
        products += [cpu(fast_product, phi, rows)[0] for _ in range(5 if n <= 100_000 else 2)]
    floor = k * statistics.median(products)
    result = {
        "case": name, "rule": rule.__name__, "n": n, "m": m, "queries": q, "k": k, "pool": pool, "memory": memory,
        "route": plan(pool or n, fitted.kernel_.rows.shape[1], q, k).route,
        "fit_cpu_s": fit_seconds, "select_cpu_s": statistics.median(seconds), "select_cpu_s_all": seconds,
        "floor_cpu_s": floor, "over_floor": statistics.median(seconds) / floor,
        "features_bytes": 4 * n * m, "peak_bytes": peak, "peak_over_features": peak / (4 * n * m),
        "mean_nats": picked.total.mean().item(),
    }
    if pool is not None:
        own = Phi[candidates]
        result["pool_floor_cpu_s"] = k * statistics.median(cpu(fast_product, phi, own)[0] for _ in range(10))
        result["over_pool_floor"] = result["select_cpu_s"] / result["pool_floor_cpu_s"]
    for dtype in (np.float32, np.float64) if naive_queries else ():
        spent, rankings = cpu(lambda: [naive(Phi, query, fitted.noise_var_, k, dtype) for query in phi[:naive_queries]])
        assert rankings == picked.ranking[:naive_queries].tolist(), "the naive method chose other rows"
        result[f"naive_{dtype.__name__}_cpu_s"] = spent / naive_queries * q
        result[f"speedup_{dtype.__name__}"] = result[f"naive_{dtype.__name__}_cpu_s"] / result["select_cpu_s"]
    return result


def table(results):
    "The figures as a plain table."
    shown = {"select s": "select_cpu_s", "floor s": "floor_cpu_s", "ratio": "over_floor", "pool floor": "over_pool_floor",
             "x naive f32": "speedup_float32", "x naive f64": "speedup_float64", "peak/features": "peak_over_features"}
    head = ["case", "route", *shown, "peak MiB"]
    lines = [[r["case"], r["route"], *(f"{r[key]:.2f}" if key in r else "" for key in shown.values()), f"{r['peak_bytes'] / 2**20:.0f}"] for r in results]
    return aligned(head, lines)


def measure_in_folder(name, case):
    "`measure`, with a file for the features if the case wants one."
    with tempfile.TemporaryDirectory() as folder:
        return measure(name, case, Path(folder) / "features" if case[6] else None)


if __name__ == "__main__":
    run_cases(__file__, __doc__, CASES, QUICK, measure_in_folder, table)
