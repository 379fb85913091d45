"""Leave-one-out engines of LSI: CPU time for each example beside retraining, in one run.

    python bench/lsi.py            all cases, about an hour, writes bench/results/lsi.json
    python bench/lsi.py --quick    small cases, seconds, writes nothing

Each case runs in a process of its own, on one thread. `newton` and `tangent` score every example, nats included; the sequential
loop that they replace is timed on a few examples and scaled. For `newton` that loop is this package's own Newton-CG training
(the fastest training to the optimum at hand), for `tangent` and `stacked` plain PyTorch: a linear layer (or a small network),
autograd and torch.optim.SGD. The scores of the retrained examples are compared with the engine's. Features are synthetic:
512 (or fewer) rectified random functions of a 64-dimensional mixture of ten classes, with one label in twenty wrong.

The `all` cases compare the scores of ALL examples with retraining, on real features. For `newton` retraining to the optimum is done for
many examples side by side, by descent with the inverse Hessian of all data as preconditioner. That matrix only makes the descent
short: each refit is stopped by its own leave-one-out gradient, which autograd confirms on a few of them. For `tangent` it is the
stacked 1000 steps of `LSI(loo="retrain")`. Seconds of the refits are recorded for what they are; no speed is claimed from them.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common import aligned, peak_bytes, run_cases
from infotda.data import load_data
from infotda.extractors import extract_features, image_extractor
from infotda.lsi import LSI, STRUCTURES, DiagInformation, train_modules
from infotda.probe import contrasts, fit_probe, hessian, initial_probe, retrain_loo, train_steps, with_bias
from infotda.record import cache_root

CASES = {  # name: engine, n, d, classes, steps, examples of the sequential loop
    "newton-n50k-d512": ("newton", 50_000, 512, 10, None, 2),
    "newton-n2k-d512": ("newton", 2_000, 512, 10, None, 20),
    "tangent-n10k-d256": ("tangent", 10_000, 256, 10, 1000, 2),
    "tangent-n2k-d128": ("tangent", 2_000, 128, 10, 1000, 20),
    "stacked-linear-n500-d64": ("stacked-linear", 500, 64, 10, 200, 16),
    "stacked-mlp-n500-d64": ("stacked-mlp", 500, 64, 10, 200, 8),
    "newton-all-cifar10-n2k-d512": ("all-newton", 2_000, 512, 10, None, 2_000),
    "newton-all-digits": ("all-newton", 1_797, 64, 10, None, 1_797),
    "tangent-all-digits": ("all-tangent", 1_797, 64, 10, 1000, 1_797),
}
QUICK = {
    "newton-n1k-d64": ("newton", 1_000, 64, 5, None, 10),
    "tangent-n1k-d32": ("tangent", 1_000, 32, 5, 300, 10),
    "stacked-linear-n300-d32": ("stacked-linear", 300, 32, 5, 50, 8),
    "stacked-mlp-n300-d32": ("stacked-mlp", 300, 32, 5, 50, 8),
    "newton-all-digits": ("all-newton", 400, 64, 10, None, 400),
    "tangent-all-digits": ("all-tangent", 100, 64, 10, 1000, 100),
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
    return {
        "cpu_s": seconds, "wall_s": wall, "per_example_s": seconds / len(X), "retrain_per_example_s": spent / few, "speedup": spent / few / (seconds / len(X)),
        "loo_curvature": lsi.loo_curvature_, "converged": lsi.converged_, **agreement(lsi.scores_[rows], torch.cat(truth)), "peak_bytes": peak,
    }


def agreement(found, truth):
    "Relative errors, and rank correlation where there are ranks to speak of."
    off = (found / truth - 1).abs()
    ranks = lambda v: v.argsort().argsort().double()
    rho = torch.corrcoef(torch.stack([ranks(found), ranks(truth)]))[0, 1].item() if len(truth) > 9 else None
    return {"median_relative_error": off.median().item(), "max_relative_error": off.max().item(), "spearman": rho}


def real_features(name, n, d):
    "Digits' pixels (both splits), or principal components of a network's responses to the first pictures of CIFAR-10."
    if name == "digits":
        parts = [load_data("digits", split) for split in ("train", "test")]
        return torch.cat([part.x.flatten(1) for part in parts])[:n].double(), torch.cat([part.y for part in parts])[:n]
    data = load_data("cifar10").subset(range(n))
    X = extract_features(image_extractor(head=True), data, cache=cache_root(), progress=False).double()
    X = X - X.mean(dim=0)
    return X @ torch.linalg.svd(X, full_matrices=False).Vh[:d].T, data.y


def own_gradients(X, y, theta, rows, ridge):
    "Gradient of the sum over the others, for each of many models (b, C, m); the penalty's is ridge * theta."
    probs = torch.softmax(theta @ X.T, dim=1)
    probs -= torch.nn.functional.one_hot(y, theta.shape[1]).T.to(probs)
    probs[torch.arange(len(rows)), :, rows] = 0
    return probs @ X + ridge * theta


def refits(X, y, theta, tol=1e-10, side_by_side=200, max_iter=1000):
    "The optimum without each example: preconditioned descent from the common optimum, until each own gradient is tol times its first."
    n, (C, m) = len(X), theta.shape
    Q, ridge = contrasts(C), (n - 1) * WEIGHT_DECAY
    H_inv = torch.cholesky_inverse(torch.linalg.cholesky(hessian(X, (X @ theta.T).softmax(dim=1), Q, n * WEIGHT_DECAY)))
    delta, left_norm, products = torch.zeros(n, C, m, dtype=torch.float64), torch.zeros(n), 0
    for rows in torch.arange(n).split(side_by_side):
        beta = theta.expand(len(rows), -1, -1).clone()
        g = own_gradients(X, y, beta, rows, ridge)
        first, active = g.flatten(1).norm(dim=1), torch.arange(len(rows))
        length = torch.ones(len(rows), dtype=torch.float64)
        for _ in range(max_iter):
            z = Q @ ((Q.T @ g).flatten(1) @ H_inv).view(len(active), C - 1, m)
            beta[active] -= length[:, None, None] * z
            before, g = g, own_gradients(X, y, beta[active], rows[active], ridge)
            products += len(active)
            norm = g.flatten(1).norm(dim=1) / first[active]
            left_norm[rows[active]] = norm.float()
            length = (z * before).sum(dim=(1, 2)) / (z * (before - g)).sum(dim=(1, 2)) * length # Barzilai-Borwein, metric H
            going = norm > tol
            active, g, length = active[going], g[going], length[going]
            if not len(active):
                break
        delta[rows] = beta - theta
    return delta, left_norm.max().item(), products / n


def autograd_norm(X, y, theta, delta, i):
    "Length of the gradient of the mean loss without example i, by autograd, as a fraction of that before the refit."
    keep, norms = torch.arange(len(X)) != i, []
    for w in (theta + delta[i], theta.clone()):
        w.requires_grad_(True)
        (cross_entropy(X[keep] @ w.T, y[keep]) + WEIGHT_DECAY / 2 * w.square().sum()).backward()
        norms.append(w.grad.norm().item())
    return norms[0] / norms[1]


def measure_all(engine, X, y, C, steps):
    "Scores of all examples against retraining of all."
    Xb, rows = with_bias(X), torch.arange(len(X))
    scored = {structure: cpu(lambda: LSI(curvature=structure, loo=engine, steps=steps, progress=False).fit(X, y)) for structure in ("diag", "kfac")}
    if steps is None:
        theta = fit_probe(Xb, y, C, WEIGHT_DECAY, tol=1e-14).theta
        spent, _, (delta, worst, products) = cpu(lambda: refits(Xb, y, theta))
        confirmed = max(autograd_norm(Xb, y, theta, delta, i) for i in range(0, len(X), len(X) // 5))
        oracle = {"refit_gradient": worst, "refit_gradient_autograd": confirmed, "refit_iterations": products}
    else:
        start = initial_probe(C, Xb.shape[1])
        theta = train_steps(Xb, y, start, WEIGHT_DECAY, steps, LR, MOMENTUM)[0].theta
        spent, _, delta = cpu(lambda: torch.cat([d for _, d in retrain_loo(Xb, y, C, WEIGHT_DECAY, rows, steps, start, LR, MOMENTUM, progress=False)]))
        oracle = {}
    result = {}
    for structure, (_, _, lsi) in scored.items():
        information = STRUCTURES[structure](Xb, theta, lsi.prior_precision_, "exact")
        truth = torch.cat([information(part, delta[part]) for part in rows.split(100)])
        result |= {f"{structure}_{key}": value for key, value in agreement(lsi.scores_, truth).items()} | {f"{structure}_loo_curvature": lsi.loo_curvature_}
    seconds, wall, lsi = scored["diag"]
    plain = {key: result.pop(f"diag_{key}") for key in ("loo_curvature", "median_relative_error", "max_relative_error", "spearman")}
    return {"cpu_s": seconds, "wall_s": wall, "per_example_s": seconds / len(X), "retrain_per_example_s": spent / len(X), "speedup": None,
            "converged": lsi.converged_} | plain | result | oracle | {"peak_bytes": peak_bytes()}


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
    kind, _, inner = engine.rpartition("-")
    X, y = real_features("cifar10" if "cifar10" in name else "digits", n, d) if kind == "all" else features(n, d, C)
    base = peak_bytes()
    if kind == "all":
        result = measure_all(inner, X, y, C, steps)
    else:
        result = (measure_stacked if kind else measure_scores)(inner, X, y, C, steps, few)
    return {"case": name, "engine": engine, "n": n, "d": d, "classes": C, "steps": steps, "retrained": few, "base_bytes": base} | result


def table(results):
    "The figures as a plain table."
    head = ["case", "ms/example", "retrain ms", "x faster", "median error", "Spearman", "peak MiB", "wall s"]
    lines = [[r["case"], f"{1e3 * r['per_example_s']:.2f}", f"{1e3 * r['retrain_per_example_s']:.0f}", "" if r["speedup"] is None else f"{r['speedup']:.0f}" if r["speedup"] > 10 else f"{r['speedup']:.1f}",
              f"{r['median_relative_error']:.1e}" if "median_relative_error" in r else "", f"{r['spearman']:.4f}" if r.get("spearman") else "",
              f"{r['peak_bytes'] / 2**20:.0f}", f"{r['wall_s']:.0f}"] for r in results]
    return aligned(head, lines)


if __name__ == "__main__":
    run_cases(__file__, __doc__, CASES, QUICK, measure, table)
