"""Many retrainings at once against one after the other: CPU time (or GPU seconds) for each model, in one run.

    python bench/train_many.py            all cases, some minutes, writes bench/results/train_many.json
    python bench/train_many.py --quick    small cases, seconds, writes nothing

Each case runs in a process of its own, on one thread; on a CUDA device, where there is one, seconds are wall time with the device
synchronised. `loop` is plain PyTorch as one would write it (data in tensors on the device, autograd, torch.optim.SGD, no logging),
`train` the training function of this package, `many` is train_many. A few models are trained by the loops, all by train_many, and
the logits of the same models are compared.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common import aligned, peak_bytes, run_cases
from infotda.data import Data, load_data
from infotda.models import DIGITS_MEAN, DIGITS_RECIPE, DIGITS_STD, MLP, Recipe, paper_mlp, predict, train
from infotda.retrain import train_many

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY = 512 if DEVICE == "cuda" else 48
CASES = {  # name: network, order, share of the data kept, models, of these by the loops
    "digits-64-128-10-halves": ("digits", "own", 0.5, MANY, 6),
    "digits-64-128-10-without-20": ("digits", "same", None, MANY, 4),
    "probe-512-10-halves": ("probe", "own", 0.5, MANY, 6),
    "fashion-784-256-256-10-halves": ("fashion", "own", 0.5, MANY // 4, 2),
}
QUICK = {
    "digits-64-128-10-halves": ("digits", "own", 0.5, 8, 2),
    "probe-512-10-halves": ("probe", "own", 0.5, 8, 2),
}


def spent(call):
    "Seconds (of the CPU, or on a GPU of the wall) and result of a call."
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    result = call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def noise(n, d, seed):
    "Ten classes, each around a random point."
    points = torch.rand(10, d, generator=torch.Generator().manual_seed(99))
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=gen)
    return Data(0.5 * points[y] + 0.5 * torch.rand(n, d, generator=gen), y, torch.arange(n), tuple("0123456789"))


def problem_of(kind):
    "Network, training set, queries, recipe."
    if kind == "digits":
        return MLP([64, 128, 10], mean=DIGITS_MEAN, std=DIGITS_STD), load_data("digits"), load_data("digits", "test"), DIGITS_RECIPE
    if kind == "probe":
        return nn.Linear(512, 10), noise(2_000, 512, 0), noise(500, 512, 1), Recipe(epochs=20, lr=0.01, batch_size=128)
    reshape = lambda data: Data(data.x.view(-1, 1, 28, 28), data.y, data.index, data.classes)
    return paper_mlp(), reshape(noise(3_000, 784, 0)), reshape(noise(500, 784, 1)), Recipe(epochs=5)


def loop(start, data, mask, recipe, order):
    "One training in plain PyTorch."
    model, generator = copy.deepcopy(start).train(), torch.Generator().manual_seed(0)
    x, y, n = data.x, data.y, len(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    rows = mask.nonzero().flatten()
    for _ in range(recipe.epochs):
        if order == "own":
            batches = [rows[part].to(x.device) for part in torch.randperm(len(rows), generator=generator).split(recipe.batch_size)]
        else:
            batches = [part[mask[part]].to(x.device) for part in torch.randperm(n, generator=generator).split(recipe.batch_size)]
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def measure(name, case):
    "All figures of one case."
    kind, order, share, many, few = case
    torch.set_num_threads(1)
    start, data, queries, recipe = problem_of(kind)
    n, generator = len(data), torch.Generator().manual_seed(1)
    kept = n - 20 if share is None else int(share * n)
    masks = torch.stack([torch.randperm(n, generator=generator) < kept for _ in range(many)])
    start = start.to(DEVICE)
    near = Data(data.x.to(DEVICE), data.y.to(DEVICE), data.index, data.classes)
    train_many(start, data, masks[:2], recipe, epochs=1, outputs=queries, order=order, progress=False)
    loop(start, near, masks[0], Recipe(epochs=1), order)
    base = peak_bytes()
    loop_s, models = spent(lambda: [loop(start, near, mask, recipe, order) for mask in masks[:few]])
    train_s = None
    if order == "own":
        train_s, _ = spent(lambda: [train(copy.deepcopy(start), data.subset(mask), recipe, progress=False) for mask in masks[:few]])
    many_s, found = spent(lambda: train_many(start, data, masks, recipe, outputs=queries, order=order, progress=False))
    off = max((found.outputs[j] - predict(model, queries).cpu()).abs().max().item() for j, model in enumerate(models))
    return {
        "case": name, "device": DEVICE, "n": n, "models": many, "loop_s": loop_s / few, "train_s": train_s and train_s / few, "many_s": many_s / many,
        "speedup": loop_s / few / (many_s / many), "largest_difference_of_logits": off, "engine": found.engine, "peak_bytes": peak_bytes(), "base_bytes": base,
    }


def table(results):
    "The figures as a plain table."
    head = ["case", "device", "models", "loop ms", "train ms", "many ms", "x faster", "logits differ by", "peak MiB"]
    ms = lambda seconds: "" if seconds is None else f"{1e3 * seconds:.1f}"
    lines = [[r["case"], r["device"], str(r["models"]), ms(r["loop_s"]), ms(r["train_s"]), ms(r["many_s"]), f"{r['speedup']:.1f}",
              f"{r['largest_difference_of_logits']:.0e}", f"{r['peak_bytes'] / 2**20:.0f}"] for r in results]
    return aligned(head, lines)


if __name__ == "__main__":
    run_cases(__file__, __doc__, CASES, QUICK, measure, table)
