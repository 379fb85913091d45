"""Leave-one-out engines of LSI: CPU time for each example beside retraining, in one run.

    python bench/lsi.py            all cases, about half an hour, writes bench/results/lsi.json
    python bench/lsi.py --quick    small cases, seconds, writes nothing

Each case runs in a process of its own, on one thread. `newton` and `tangent` score every example, nats included; the sequential
loop that they replace is timed on a few examples and scaled. For `newton` that loop is this package's own Newton-CG training
(the fastest training to the optimum at hand), for `tangent` and `stacked` plain PyTorch: a linear layer (or a small network),
autograd and torch.optim.SGD. The scores of the retrained examples are compared with the engine's. Features are synthetic:
512 (or fewer) rectified random functions of a 64-dimensional mixture of ten classes, with one label in twenty wrong.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common import aligned, peak_bytes, run_cases
from infotda.lsi import LSI, DiagInformation, train_modules
from infotda.probe import fit_probe, initial_probe, retrain_loo, train_steps, with_bias

CASES = {  # name: engine, n, d, classes, steps, examples of the sequential loop
    "newton-n50k-d512": ("newton", 50_000, 512, 10, None, 2),
    "newton-n2k-d512": ("newton", 2_000, 512, 10, None, 20),
    "tangent-n10k-d256": ("tangent", 10_000, 256, 10, 1000, 2),
    "tangent-n2k-d128": ("tangent", 2_000, 128, 10, 1000, 20),
    "stacked-linear-n500-d64": ("stacked-linear", 500, 64, 10, 200, 16),
    "stacked-mlp-n500-d64": ("stacked-mlp", 500, 64, 10, 200, 8),
}
QUICK = {
    "newton-n1k-d64": ("newton", 1_000, 64, 5, None, 10),
    "tangent-n1k-d32": ("tangent", 1_000, 32, 5, 300, 10),
    "stacked-linear-n300-d32": ("stacked-linear", 300, 32, 5, 50, 8),
    "stacked-mlp-n300-d32": ("stacked-mlp", 300, 32, 5, 50, 8),
}
WEIGHT_DECAY, LR, MOMENTUM = 5e-4, 0.004, 0.9


def cpu(call):
    "CPU seconds, wall seconds and result of a call."
    start, clock = time.process_time(), time.perf_counter()
    result = call()
    return time.process_time() - start, time.perf_counter() - clock, result


def features(n, d, classes):
    "Rectified random functions of a mixture, and labels, one in twenty wrong."
    gen = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=gen)
    latent = torch.randn(n, 64, generator=gen) + 0.7 * torch.randn(classes, 64, generator=gen)[y]
    X = torch.relu(latent @ torch.randn(64, d, generator=gen) / 8 + 0.3 * torch.randn(d, generator=gen))
    wrong = torch.rand(n, generator=gen) < 0.05
    y[wrong] = torch.randint(classes, (int(wrong.sum()),), generator=gen)
    y[:classes] = torch.arange(classes)
    return X, y


def sequential(model, X, y, i, steps, momentum=MOMENTUM):
    "One retraining in plain PyTorch, without example i (or with all, i = -1)."
    keep = torch.arange(len(X)) != i
    X, y = X[keep], y[keep]
    optimiser = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, nesterov=True, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(X), y).backward()
        optimiser.step()
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def measure_scores(engine, X, y, C, steps, few):
    "Newton or tangent for all examples, against retraining a few."
    seconds, wall, lsi = cpu(lambda: LSI(loo=engine, steps=steps, progress=False).fit(X, y))
    peak, Xb = peak_bytes(), with_bias(X)
    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))[:few]
    truth, spent = [], 0.0
    base = fit_probe(Xb, y, C, WEIGHT_DECAY).theta if steps is None else train_steps(Xb, y, initial_probe(C, Xb.shape[1]), WEIGHT_DECAY, steps, LR, MOMENTUM)[0].theta
    information = DiagInformation(Xb, base, lsi.prior_precision_, "exact")
    for i in rows.tolist():
        keep = torch.arange(len(X)) != i
        if steps is None:
            used, _, theta = cpu(lambda: fit_probe(Xb[keep], y[keep], C, WEIGHT_DECAY).theta)
        else:
            layer = nn.Linear(Xb.shape[1], C, bias=False, dtype=torch.float64)
            layer.weight.data.copy_(initial_probe(C, Xb.shape[1]))
            used, _, theta = cpu(lambda: sequential(layer, Xb, y, i, steps).view_as(base))
        spent += used
        truth.append(information(torch.tensor([i]), (theta - base)[None]))
    off = (lsi.scores_[rows] / torch.cat(truth) - 1).abs()
    ranks = lambda v: v.argsort().argsort().double()
    return {
        "cpu_s": seconds, "wall_s": wall, "per_example_s": seconds / len(X), "retrain_per_example_s": spent / few, "speedup": spent / few / (seconds / len(X)),
        "loo_curvature": lsi.loo_curvature_, "converged": lsi.converged_, "median_relative_error": off.median().item(), "max_relative_error": off.max().item(),
        "spearman": torch.corrcoef(torch.stack([ranks(lsi.scores_[rows]), ranks(torch.cat(truth))]))[0, 1].item() if few > 9 else None, "peak_bytes": peak,
    }


def measure_stacked(kind, X, y, C, steps, few):
    "Many small models at once against one after the other."
    X, rows, d = X.double(), torch.arange(16 * few), X.shape[1]
    torch.manual_seed(0)
    if kind == "linear":
        make = lambda: nn.Linear(d, C, dtype=torch.float64)
    else:
        make = lambda: nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, C)).double()
    start = make()

    def one(i):
        model = make()
        model.load_state_dict(start.state_dict())
        return sequential(model, X, y, i, steps)

    def stacked():
        if kind == "linear":
            theta = torch.cat([start.weight.detach(), start.bias.detach()[:, None]], dim=1)
            return torch.cat([delta for _, delta in retrain_loo(with_bias(X), y, C, WEIGHT_DECAY, rows, steps, theta, LR, MOMENTUM, progress=False)])
        blocks = torch.cat([torch.tensor([-1]), rows]).split(64)
        ends = [train_modules(start, X, y, block, WEIGHT_DECAY, steps, LR, MOMENTUM)[0] for block in blocks]
        ends = torch.cat([torch.cat([w.flatten(1) for w in part.values()], dim=1) for part in ends])
        return ends[1:] - ends[0]

    train_modules(start, X[:8], y[:8], rows[:2], WEIGHT_DECAY, 1)  # lazy imports of vmap
    whole = one(-1)
    loop_seconds, _, ends = cpu(lambda: torch.stack([one(i) for i in rows[:few].tolist()]))
    seconds, wall, delta = cpu(stacked)
    lengths, truth = delta.flatten(1).norm(dim=1)[:few], (ends - whole).norm(dim=1)
    torch.testing.assert_close(lengths, truth, rtol=1e-5, atol=1e-9)
    return {"cpu_s": seconds, "wall_s": wall, "per_example_s": seconds / len(rows), "retrain_per_example_s": loop_seconds / few, "speedup": loop_seconds / few / (seconds / len(rows)), "peak_bytes": peak_bytes()}


def measure(name, case):
    "All figures of one case."
    engine, n, d, C, steps, few = case
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the probe of a tangent case is not converged on purpose
    X, y = features(n, d, C)
    base = peak_bytes()
    how = measure_stacked if engine.startswith("stacked") else measure_scores
    result = how(engine.removeprefix("stacked-"), X, y, C, steps, few)
    return {"case": name, "engine": engine, "n": n, "d": d, "classes": C, "steps": steps, "retrained": few, "base_bytes": base} | result


def table(results):
    "The figures as a plain table."
    head = ["case", "ms/example", "retrain ms", "x faster", "median error", "Spearman", "peak MiB", "wall s"]
    lines = [[r["case"], f"{1e3 * r['per_example_s']:.2f}", f"{1e3 * r['retrain_per_example_s']:.0f}", f"{r['speedup']:.0f}" if r["speedup"] > 10 else f"{r['speedup']:.1f}",
              f"{r['median_relative_error']:.1e}" if "median_relative_error" in r else "", f"{r['spearman']:.4f}" if r.get("spearman") else "",
              f"{r['peak_bytes'] / 2**20:.0f}", f"{r['wall_s']:.0f}"] for r in results]
    return aligned(head, lines)


if __name__ == "__main__":
    run_cases(__file__, __doc__, CASES, QUICK, measure, table)
