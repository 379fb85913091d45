"""Tangent features: CPU time per example beside one plain training pass of the same batch, beside naive code and beside peers.

    python bench/features.py                 all cases, about 21 minutes of CPU time, writes bench/results/features.json
    python bench/features.py --quick         few examples, m = 512 only, nothing written
    python bench/features.py --only mlp-512  one case, or mlp-512-fold: one row of it; may be repeated; nothing written

A case is a network and a sketch dimension m: the MLP 784-512-512-10 on Fashion-MNIST, ResNet9 on CIFAR-10 (found as by `load_data`),
and there a ResNet-9 of the older pattern with 6.57 million parameters, all trained for a moment. A peer that multiplies by a dense
matrix pays for parameters, a training pass for parameters times pixels, so the ratio of the two depends on the network. Every contender sketches the gradient of the margin with respect to all parameters. Each row
is a process of its own, on one thread, and times the floor itself: forward and backward pass of the summed margins, batch by batch.
`ms` is the steady cost of one example; what a call does before its first batch (checks, trials, a matrix that is kept) is `setup s`.
`error` is the root mean square, over pairs of examples, of (<Sx,Sy> - <x,y>) / (|x||y|), once squared norms agree on average; `/dense`
divides it by what a dense +-1 matrix has on these pairs, in expectation and in closed form (so two dense draws differ by a few per cent);
`fold` and `sjlt` also get the mean over seeds. A row with ~ is estimated: this peer's cost is linear in its blocks of 100 columns, and
was measured for 2 and 6 of them.

Peers are optional. Installed into folders of their own, apart from the package's environment, they are taken from PYTHONPATH:

    pip install --no-deps --target peers/trak traker==0.3.2
    pip install --no-deps --target peers/dattri dattri==0.3.0 pretty_midi mido
    pip install --no-deps --target peers/logix --ignore-requires-python logix-ai==0.1.1 einops
    PYTHONPATH=peers/trak:peers/dattri:peers/logix python bench/features.py
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import inspect
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from common import cpu, peak_bytes, write_record
from infotda.data import load_data
from infotda.features import tangent_features
from infotda.models import MLP, ResNet9, Scale, train
from infotda.outputs import margin
from infotda.sketch import Projector

DATA = {"mlp": "fashion_mnist", "resnet9": "cifar10", "resnet9large": "cifar10"}
DIMS = (512, 4096)


def by_kind(mlp, resnet9):
    "A number for the MLP, and one for both ResNets."
    return {kind: mlp if kind == "mlp" else resnet9 for kind in DATA}


EVAL = by_kind(200, 64)                         # examples whose inner products are compared
FULL = by_kind(15_000, 160)                     # examples of the cheap contenders
QUICK = by_kind(2_048, 64)
DENSE = by_kind(500, 64)                        # of the dear ones
BATCH = by_kind(None, 32)                       # of infotda and of the floor; None: the default, 256
DENSE_BATCH = by_kind(500, 32)                  # of naive code and of peers: large batches are kind to those who redraw a matrix for each
SEEDS = {"fold": 16, "sjlt": 2}


# ---------------------------------------------------------------- networks and exact inner products

class Plus(nn.Sequential):
    "x + f(x)."

    def forward(self, x):
        return x + super().forward(x)


def brick(a, b, *more):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *more)


def large_resnet9():
    "Four doublings of the channels, each after the first with a halving of the picture, and two residuals: 6,573,120 parameters."
    normalize = nn.BatchNorm2d(3, affine=False, momentum=None)  # its averages are those of the pictures it was trained on
    return nn.Sequential(
        normalize, brick(3, 64), brick(64, 128, nn.MaxPool2d(2)), Plus(brick(128, 128), brick(128, 128)), brick(128, 256, nn.MaxPool2d(2)),
        brick(256, 512, nn.MaxPool2d(2)), Plus(brick(512, 512), brick(512, 512)), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10, bias=False), Scale(0.125))


def network(kind):
    "An untrained network."
    if kind == "mlp":
        return MLP([784, 512, 512, 10], bias=True, mean=(0.2860,), std=(0.3530,))
    return ResNet9() if kind == "resnet9" else large_resnet9()


def margins(logits, y):
    "log p_y / (1 - p_y) of each example."
    own = y[..., None] == torch.arange(logits.shape[-1])
    return (logits * own).sum(-1) - logits.masked_fill(own, -math.inf).logsumexp(-1)


def jacobian(model, x, y):
    "Per-example gradients by vmap over grad, name by name."
    weights, buffers = ({k: t.detach() for k, t in pairs} for pairs in (model.named_parameters(), model.named_buffers()))
    f = lambda w, x, y: margins(functional_call(model, (w, buffers), x[None])[0], y)
    return vmap(grad(f), (None, 0, 0))(weights, x, y)


def flat(gradients):
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def rms_error(K, sketch):
    "Root mean square error of the inner products of pairs, once squared norms agree on average."
    K, A = K[: len(sketch), : len(sketch)], sketch.double() @ sketch.double().T
    A *= K.trace() / A.trace()
    norms = K.diagonal().sqrt()
    E = ((A - K) / norms / norms[:, None])[tuple(torch.triu_indices(len(K), len(K), 1))]
    return E.square().mean().sqrt().item()


def dense_error(K, fourth, m):
    "What a dense matrix of independent signs has in expectation: its variance is (|x|^2 |y|^2 + <x,y>^2 - 2 sum x_i^2 y_i^2) / m."
    square = K.diagonal() * K.diagonal()[:, None]
    V = ((square + K.square() - 2 * fourth) / square)[tuple(torch.triu_indices(len(K), len(K), 1))]
    return (V.mean() / m).sqrt().item()


def prepare(kind, folder):
    "Train a network for a moment; exact inner products of its gradients; errors of infotda's sketches over seeds."
    torch.set_num_threads(1)
    n, data = EVAL[kind], load_data(DATA[kind])
    model = network(kind)
    few = data.subset(torch.arange(15_000, 25_000) if kind == "mlp" else torch.arange(1_000, 2_024))
    train(model, few, epochs=1, lr=0.03, batch_size=64, progress=False)
    model.eval()
    torch.save((model.state_dict(), data.x[: FULL[kind]].clone(), data.y[: FULL[kind]].clone()), folder / f"{kind}.pt")
    parts = [jacobian(model, data.x[i : i + 32], data.y[i : i + 32]) for i in range(0, n, 32)]
    G = {name: torch.cat([part.pop(name) for part in parts])[:n] for name in list(parts[0])}
    K, fourth = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for g in G.values():
        for part in g.flatten(1).split(2**18, dim=1):
            part = part.double()
            K += part @ part.T
            fourth += part.square() @ part.square().T
    torch.save(K, folder / f"{kind}-K.pt")
    result = {"p": sum(g[0].numel() for g in G.values())}
    for m in DIMS:
        error = {"dense": dense_error(K, fourth, m)}
        for proj_type, seeds in SEEDS.items():
            try:
                error[proj_type] = [rms_error(K, Projector({k: g.shape[1:] for k, g in G.items()}, m, proj_type, s)(G)) for s in range(seeds)]
            except ValueError:
                error[proj_type] = []            # a type that this version does not have
        result[f"error-{m}"] = error
    return result


# ---------------------------------------------------------------- contenders

@dataclass
class Task:
    "What a contender is given."
    kind: str
    m: int
    model: torch.nn.Module
    x: torch.Tensor
    y: torch.Tensor
    n: int                                      # examples for cheap contenders
    dense: int                                  # for dear ones
    repetitions: int

    def batches(self, n, size):
        return [(self.x[i : min(i + size, n)], self.y[i : min(i + size, n)]) for i in range(0, n, size)]


class Skip(Exception):
    "Why a row has no figures."


def floor(task, backward=True, size=None, n=None):
    "CPU seconds per example of plain passes over a few batches."
    batches = task.batches(n or min(task.n, 4_096 if task.kind == "mlp" else 64), size or BATCH[task.kind] or 256)

    def run():
        for x, y in batches:
            with torch.set_grad_enabled(backward):
                loss = margins(task.model(x), y).sum()
            if backward:
                task.model.zero_grad(set_to_none=True)
                loss.backward()

    return cpu(run)[0] / sum(len(x) for x, _ in batches)


class Clocked(torch.utils.data.Dataset):
    "Remembers when its first example was last read, which is when the pass began."

    def __init__(self, x, y):
        self.x, self.y, self.begin = x, y, 0.0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == 0:
            self.begin = time.process_time()
        return self.x[i], self.y[i]


def infotda(task, n=None, **options):
    "The public call; slow forms in one call on few examples, fast ones from the difference of a long and a short call."
    accepted = inspect.signature(tangent_features).parameters
    if missing := [name for name in options if name not in accepted]:
        raise Skip(f"no argument {missing[0]}")
    options = {"proj_dim": task.m, "batch_size": BATCH[task.kind], "progress": False} | options
    call = lambda data: tangent_features(task.model, data, margin(), **options)
    size, e = BATCH[task.kind] or 256, EVAL[task.kind]
    try:
        if n is not None:
            data = Clocked(task.x[:n], task.y[:n])
            total, found = cpu(call, data)
            spent = time.process_time() - data.begin
            return {"n": n, "cpu": spent / n, "setup": total - spent, "Phi": found.Phi[:e]}
        found = call((task.x[:e], task.y[:e])).Phi
        few, many = (task.x[:size], task.y[:size]), (task.x[: task.n], task.y[: task.n])
        pairs = [(cpu(call, few)[0], cpu(call, many)[0]) for _ in range(task.repetitions)]
    except ValueError as error:
        raise Skip(str(error)[:100]) from error
    steady = [(b - a) / (task.n - size) for a, b in pairs]
    first = statistics.median(a for a, _ in pairs) - size * statistics.median(steady)
    return {"n": task.n, "cpu": statistics.median(steady), "all": steady, "setup": first, "whole": statistics.median(b for _, b in pairs) / task.n, "Phi": found}


def signs(rng, m, width):
    "Some columns of a +-1 matrix, int8."
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-m * width // 8)), dtype=np.uint8), count=m * width)
    return torch.from_numpy(bits.view(np.int8)).view(m, width).mul_(2).sub_(1)


def naive(task, held):
    "vmap over grad, all gradients in one matrix, times one dense matrix of signs, eight bits each."
    p, m = sum(w.numel() for w in task.model.parameters()), task.m
    width = 2**23 // m
    if held and p * m > 6 * 2**30:
        raise Skip(f"the matrix takes {p * m / 2**30:.0f} GiB at one byte an entry")
    n = min(task.dense, DENSE_BATCH[task.kind]) if m > 1024 else task.dense
    n = n // 2 if m > 1024 and task.kind == "mlp" else n
    widths = [min(width, p - start) for start in range(0, p, width)]
    draw = lambda: (lambda rng: (signs(rng, m, w) for w in widths))(np.random.default_rng(0))
    jacobian(task.model, task.x[:2], task.y[:2])
    setup, S = cpu(lambda: list(draw())) if held else (0.0, None)

    def run():
        rows = []
        for x, y in task.batches(n, min(n, DENSE_BATCH[task.kind])):
            G, out = flat(jacobian(task.model, x, y)), torch.zeros(len(x), m)
            for g, block in zip(G.split(width, dim=1), S or draw()):
                out.addmm_(g, block.float().T)
            rows.append(out)
        return torch.cat(rows)

    spent, Phi = cpu(run)
    return {"n": n, "cpu": spent / n, "setup": setup, "Phi": Phi * m**-0.5}


def by_blocks(task, run, n):
    "CPU seconds per example for task.m columns, from 2 and 6 blocks of 100 columns."
    two, six = run(200)[0], run(600)[0]
    return {"n": n, "cpu": (two + (six - two) / 4 * (math.ceil(task.m / 100) - 2)) / n, "setup": 0.0, "estimated": True}


def trak(task):
    "traker's own TRAKer.featurize with its default on a CPU, BasicProjector."
    from trak import TRAKer

    def run(m, n=None, size=None):
        n = n or task.dense
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(model=task.model, task="image_classification", train_set_size=n, save_dir=folder, device="cpu", proj_dim=m, use_half_precision=False, logging_level=40)
            traker.load_checkpoint(task.model.state_dict(), model_id=0)
            spent, _ = cpu(lambda: [traker.featurize(batch=batch, num_samples=len(batch[0])) for batch in task.batches(n, size or DENSE_BATCH[task.kind])])
            return spent, torch.tensor(np.array(traker.saver.current_store["grads"]))

    run(4, 2)
    if task.kind != "mlp" and task.m > 1024:
        return by_blocks(task, lambda m: run(m, 32), 32)
    spent, Phi = run(task.m)
    return {"n": task.dense, "cpu": spent / task.dense, "setup": 0.0, "Phi": Phi}


def dattri(task):
    "The gradients and the projector of dattri's TRAKAttributor.cache, step by step as there, without its linear solve."
    from dattri.func.projection import random_project
    from dattri.task import AttributionTask

    def f(params, data):
        x, y = data
        return margins(functional_call(task.model, params, x[None])[0], y)

    job = AttributionTask(loss_func=f, model=task.model, checkpoints=task.model.state_dict())
    gradients, scale = job.get_grad_loss_func(in_dims=(None, 0)), sum(w.numel() for w in task.model.parameters()) ** 0.5
    params, _ = job.get_param(ckpt_idx=0)

    def run(m, n=None):
        n, rows = n or task.dense, []

        def passes():
            for batch in task.batches(n, DENSE_BATCH[task.kind]):
                G = torch.nan_to_num(gradients(params, batch))
                G /= scale
                rows.append(random_project(G, len(G), proj_dim=m, proj_max_batch_size=32, proj_seed=0, device="cpu")(G, ensemble_id=0).clone().detach())

        return cpu(passes)[0], torch.cat(rows)

    run(4, 2)
    if task.m > 1024:
        n = task.dense if task.kind == "mlp" else 32
        return by_blocks(task, lambda m: run(m, n), n)
    n = task.dense if task.kind == "mlp" else 32
    spent, Phi = run(task.m, n)
    return {"n": n, "cpu": spent / n, "setup": 0.0, "Phi": Phi}


def logix(task):
    "LogIX's random LoRA projection of Linear and Conv2d weights: as many columns as fit into m, split evenly over the layers."
    import logix as package

    layers = [module for module in task.model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    back = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)                        # it keeps its files in the current folder
        try:
            Path("config.yaml").write_text(f"root_dir: ./logs\nlora:\n  rank: {math.isqrt(task.m // len(layers))}\n")
            run = package.init(project="bench", config="config.yaml")
            run.watch(task.model)
            run.add_lora()
            run.setup({"grad": ["log"]})

            def one(x, y, start):
                with run(data_id=[str(i) for i in range(start, start + len(x))]):
                    task.model.zero_grad()
                    margins(task.model(x), y).sum().backward()
                return torch.cat([log["grad"].flatten(1) for log in run.get_log()[1].values()], dim=1)

            one(task.x[:2], task.y[:2], 0)
            batches, rows = task.batches(task.n, DENSE_BATCH[task.kind]), []

            def passes():
                rows.clear()
                rows.extend(one(x, y, DENSE_BATCH[task.kind] * i) for i, (x, y) in enumerate(batches))

            spent = [cpu(passes)[0] / task.n for _ in range(task.repetitions)]
        finally:
            os.chdir(back)
    return {"n": task.n, "cpu": statistics.median(spent), "all": spent, "setup": 0.0, "Phi": torch.cat(rows)}


def forward_only(task):
    return {"n": task.n, "cpu": statistics.median(floor(task, backward=False) for _ in range(5)), "setup": 0.0}


def slow(task, mlp, resnet9):
    "How many examples a slow form of infotda gets."
    return by_kind(mlp, resnet9)[task.kind]


CONTENDERS = {
    "forward only": forward_only,
    "fold": infotda,
    "fold, hooks": lambda t: infotda(t, engine="hooks"),
    "fold, func": lambda t: infotda(t, n=slow(t, 1_024, 64), engine="func"),
    "sjlt": lambda t: infotda(t, n=slow(t, 1_024, 64), proj_type="sjlt"),
    "rademacher": lambda t: infotda(t, n=slow(t, 256, 32), proj_type="rademacher", batch_size=slow(t, 256, 32)),  # trials of batch sizes draw the matrix, too
    "naive, held": lambda t: naive(t, True),
    "naive, redrawn": lambda t: naive(t, False),
    "trak": trak,
    "dattri": dattri,
    "logix": logix,
}
PEERS = ("trak", "dattri", "logix")


def measure(kind, m, name, folder, quick):
    "One row."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if name in PEERS and importlib.util.find_spec(name) is None:
        return {"skipped": "not installed"}
    if m > 1024 and (name == "fold, hooks" or (name == "rademacher" and kind != "mlp")):
        return {"skipped": "see m = 512: " + ("the same engine as above" if name != "rademacher" else "eight times that cost")}
    n, model = (QUICK if quick else FULL)[kind], network(kind)
    state, x, y = torch.load(folder / f"{kind}.pt")
    model.load_state_dict(state)
    model.eval()
    task = Task(kind, m, model, x[:n], y[:n], n, 32 if quick else DENSE[kind], 1 if quick else 3)
    floor(task, n=64)
    floors = [floor(task) for _ in range(2)]
    try:
        found = CONTENDERS[name](task)
    except Skip as why:
        return {"skipped": str(why)}
    fresh = task if name != "logix" else Task(kind, m, network(kind).eval(), task.x, task.y, n, 0, 1)
    floors += [floor(fresh) for _ in range(2)]
    Phi = found.pop("Phi", None)
    if Phi is not None:
        found |= {"dims": Phi.shape[1], "error": rms_error(torch.load(folder / f"{kind}-K.pt"), Phi[: EVAL[kind]]), "pairs_of": min(EVAL[kind], len(Phi))}
    peak = peak_bytes()
    return found | {"floor": statistics.median(floors), "floor_all": floors, "over_floor": found["cpu"] / statistics.median(floors), "peak_bytes": peak}


# ---------------------------------------------------------------- table

def table(results):
    "The figures as a plain table."
    head = ["case", "contender", "n", "ms", "floor ms", "x floor", "TRAK / it", "setup s", "error", "/dense", "seeds", "peak MiB"]
    lines = []
    for r in results:
        if "skipped" in r:
            lines.append([r["case"], r["contender"], r["skipped"]] + [""] * (len(head) - 3))
            continue
        number = lambda key, form: format(r[key], form) if key in r else ""
        lines.append([
            r["case"], r["contender"], str(r["n"]), ("~" if r.get("estimated") else "") + f"{1e3 * r['cpu']:.4g}", f"{1e3 * r['floor']:.4g}", f"{r['over_floor']:.2f}",
            number("trak_over", ".0f") if r.get("trak_over", 0) >= 10 else number("trak_over", ".1f"), f"{r['setup']:.2f}", number("error", ".4f"), number("over_dense", ".2f"),
            number("over_dense_seeds", ".3f"), f"{r['peak_bytes'] / 2**20:.0f}"])
    widths = [max(len(line[i]) for line in [head] + [x for x in lines if x[4]]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in [head] + lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few examples, m = 512, no peers' long runs, nothing written")
    parser.add_argument("--only", action="append", help="only this case (mlp-512) or row (mlp-512-fold); may be repeated; nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "features.json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, m, name, folder = args.one
        print("\n" + json.dumps(prepare(kind, Path(folder)) if name == "prepare" else measure(kind, int(m), name, Path(folder), args.quick)))
        return
    rows = [(kind, m, name) for kind in DATA for m in DIMS for name in CONTENDERS if not (args.quick and m != DIMS[0])]
    wanted = lambda kind, m, name: not args.only or any(o in (kind, f"{kind}-{m}", f"{kind}-{m}-{name}") for o in args.only)
    rows = [row for row in rows if wanted(*row)]

    def one(*row):
        command = [sys.executable, __file__, "--one", *map(str, row), folder] + (["--quick"] if args.quick else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{row} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
            return {"skipped": "failed: " + done.stderr.strip().splitlines()[-1][:100]}
        return json.loads(done.stdout.splitlines()[-1])

    results, begin = [], resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: one(kind, 0, "prepare") for kind in dict.fromkeys(kind for kind, _, _ in rows)}
        if any("skipped" in found for found in made.values()):
            sys.exit(1)
        for kind, m, name in rows:
            results.append({"case": f"{kind}-{m}", "contender": name} | one(kind, m, name))
            print(f"{kind}-{m} {name} done", file=sys.stderr)
    for r in results:
        kind, m = r["case"].split("-")
        error = made[kind][f"error-{m}"]
        rival = next((t for t in results if t["case"] == r["case"] and t["contender"] == "trak" and "cpu" in t), None)
        if rival and "cpu" in r:
            r["trak_over"] = rival["cpu"] / r["cpu"]
        if "error" in r:
            r["over_dense"] = r["error"] / error["dense"]
        if seeds := error.get(r["contender"].split(",")[0]):
            r["over_dense_seeds"] = statistics.mean(e**2 for e in seeds) ** 0.5 / error["dense"]
    print(table(results))
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    print(f"{spent / 60:.1f} minutes of CPU time")
    if any(r.get("skipped", "").startswith("failed") for r in results):
        sys.exit("some rows failed: nothing is written")
    if not args.quick and not args.only:
        write_record(args.out, cpu_minutes=spent / 60, networks=made, rows=results)


if __name__ == "__main__":
    main()
