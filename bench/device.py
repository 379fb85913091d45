"""What a GPU does, beside what it could do: sketches beside the matrix product and the memory of the same device, greedy steps beside their products.

    python bench/device.py            all cases on the CUDA device, a few minutes, writes bench/results/device.json
    python bench/device.py --quick    small cases on whatever device there is, seconds, writes nothing

Each case runs in a process of its own and reports the median of several runs, synchronised, in wall seconds.
`dense`: the +-1 sketch of ResNet9 gradients; its floor is the same number of multiply-adds in a large bfloat16 product.
`fold`: the default sketch of the same gradients; its floor is one reading of them. `pass`: features of pictures, beside a plain forward and
backward pass. `greedy`: beside the product of its rows with one column for each query, once a step. All are compared with the CPU on a few rows.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time

import torch

from common import aligned, run_cases
from infotda.core import fast_product
from infotda.features import tangent_features
from infotda.greedy import InfoGain, InfoLoss
from infotda.jacobian import param_shapes
from infotda.models import ResNet9
from infotda.outputs import margin
from infotda.sketch import Projector

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # name: kind, sizes
    "dense-4096-b1024": ("dense", dict(m=4096, b=1024, side=8192)),
    "dense-512-b1024": ("dense", dict(m=512, b=1024, side=8192)),
    "fold-4096-b1024": ("fold", dict(m=4096, b=1024)),
    "fold-512-b1024": ("fold", dict(m=512, b=1024)),
    "pass-fold-4096": ("pass", dict(m=4096, n=8192, b=512, proj_type="fold")),
    "pass-rademacher-4096": ("pass", dict(m=4096, n=8192, b=512, proj_type="rademacher")),
    "gain-n50k-m512": ("greedy", dict(rule=InfoGain, n=50_000, m=512, q=100, k=100)),
    "loss-n50k-m512": ("greedy", dict(rule=InfoLoss, n=50_000, m=512, q=100, k=100)),
    "gain-n50k-m4096": ("greedy", dict(rule=InfoGain, n=50_000, m=4096, q=100, k=100)),
}
QUICK = {
    "dense-64": ("dense", dict(m=64, b=4, side=256)),
    "fold-64": ("fold", dict(m=64, b=4)),
    "pass-fold-64": ("pass", dict(m=64, n=32, b=16, proj_type="fold")),
    "gain-n2k-m32": ("greedy", dict(rule=InfoGain, n=2_000, m=32, q=8, k=5)),
}


def synchronize():
    "Wait for the device."
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def spent(call, repetitions=5):
    "Median wall seconds of a call, after one that warms up."
    call()
    seconds = []
    for _ in range(repetitions):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def gradients(b):
    "Random gradients of ResNet9's shapes, and their number p."
    shapes, gen = param_shapes(ResNet9()), torch.Generator(DEVICE).manual_seed(0)
    return {name: torch.randn(b, *shape, device=DEVICE, generator=gen) for name, shape in shapes.items()}, shapes, sum(s.numel() for s in shapes.values())


def off_from_cpu(projector, G, sketched):
    "The largest difference from the CPU's sketch of two rows, relative to a row's norm."
    reference = projector({name: g[:2].cpu() for name, g in G.items()})
    return ((sketched[:2].cpu() - reference).norm(dim=1) / reference.norm(dim=1)).max().item()


def dense(m, b, side):
    "The sketch by signs beside a large product in bfloat16."
    G, shapes, p = gradients(b)
    projector = Projector(shapes, m, "rademacher")
    A = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    seconds, product = spent(lambda: projector(G)), spent(lambda: A @ A)
    rate, peak = 2 * b * m * p / seconds, 2 * side**3 / product
    return dict(m=m, b=b, p=p, seconds=seconds, floor_s=2 * b * m * p / peak, share_of_bf16_rate=rate / peak, tflops=rate / 1e12, bf16_tflops=peak / 1e12,
                off_from_cpu=off_from_cpu(projector, G, projector(G)), form=projector.form(DEVICE))


def fold(m, b):
    "The default sketch beside one reading of the gradients."
    G, shapes, p = gradients(b)
    projector = Projector(shapes, m, "fold")
    seconds, reading = spent(lambda: projector(G)), spent(lambda: [g.sum() for g in G.values()])
    return dict(m=m, b=b, p=p, seconds=seconds, floor_s=reading, off_from_cpu=off_from_cpu(projector, G, projector(G)))


def whole_pass(m, n, b, proj_type):
    "Features of pictures beside a plain forward and backward pass of the same batches."
    model = ResNet9().to(DEVICE).eval()
    gen = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 3, 32, 32, generator=gen), torch.randint(10, (n,), generator=gen)
    data, output = torch.utils.data.TensorDataset(x, y), margin()
    features = lambda rows, on: tangent_features(on, torch.utils.data.TensorDataset(x[:rows], y[:rows]), output, proj_dim=m, proj_type=proj_type, batch_size=min(b, rows), progress=False)

    def plain():
        for lo in range(0, n, b):
            batch = data.tensors[0][lo:lo + b].to(DEVICE), data.tensors[1][lo:lo + b].to(DEVICE)
            torch.autograd.grad(output(model(batch[0]), batch).sum(), list(model.parameters()))

    seconds, floor = spent(lambda: features(n, model), 3), spent(plain, 3)
    few = min(4, n)
    here, there = features(few, model).Phi.cpu(), features(few, ResNet9().eval()).Phi
    return dict(m=m, n=n, b=b, proj_type=proj_type, seconds=seconds, floor_s=floor, off_from_cpu=((here - there).norm() / there.norm()).item())


def greedy(rule, n, m, q, k):
    "A greedy selection beside its products."
    gen = torch.Generator().manual_seed(0)
    Phi = torch.randn(n, m, generator=gen) * m**-0.5
    phi = torch.randn(q, m, generator=gen) * m**-0.5 + Phi[:q]
    fitted, here = rule().fit(Phi.to(DEVICE)), phi.to(DEVICE)
    seconds, product = spent(lambda: fitted.select(here, k), 3), spent(lambda: fast_product(here, fitted.kernel_.rows.float()))
    few, steps = fitted.select(here[:3], min(k, 20)), rule().fit(Phi).select(phi[:3], min(k, 20))
    return dict(rule=rule.__name__, n=n, m=m, q=q, k=k, seconds=seconds, floor_s=k * product, same_as_cpu=few.ranking.tolist() == steps.ranking.tolist())


KINDS = {"dense": dense, "fold": fold, "pass": whole_pass, "greedy": greedy}


def measure(name, case):
    "All figures of one case."
    kind, sizes = case
    return {"case": name, "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"} | KINDS[kind](**sizes)


def table(results):
    "The figures as a plain table."
    same = lambda r: f"{r['off_from_cpu']:.1e}" if "off_from_cpu" in r else str(r["same_as_cpu"])
    lines = [[r["case"], f"{r['seconds']:.4f}", f"{r['floor_s']:.4f}", f"{r['seconds'] / r['floor_s']:.2f}", f"{r.get('share_of_bf16_rate', float('nan')):.2f}", same(r)] for r in results]
    return aligned(["case", "s", "floor s", "ratio", "share of bf16", "off from CPU / same"], lines)


if __name__ == "__main__":
    if DEVICE.type != "cuda" and not {"--quick", "--help", "-h"} & set(sys.argv):
        sys.exit("bench/device.py: torch sees no CUDA device here; --quick tries small cases on the CPU")
    run_cases(__file__, __doc__, CASES, QUICK, measure, table)
