"""Indexes: building, searching and selecting against the number of rows, for each engine.

    python bench/index.py            all cases, writes bench/results/index.json after each one; started again it goes on
    python bench/index.py --quick    small cases, a minute, writes nothing
    python bench/index.py --only exact-1000000-512

Each case runs in a process of its own on at most two cores, within 8 GiB (RLIMIT_AS is not used: mapped files count there; the peak is
measured and checked). Rows are synthetic: normal, multiplied row by row by the norms of real gradients of a small network on
digits. They are written once per size into a float32 file that is mapped, as a feature store's rows
are. `search` is one batch of one query (two directions), `step` one greedy step of 20 queries. CPU seconds are the honest figure on a busy
machine; wall times are the best of some repetitions. Recall is recall@1 of greedy steps by `step_recall`.
A server's own CPU time and memory are counted with /proc.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import aligned, peak_bytes, write_record

from infotda.data import load_data
from infotda.features import tangent_features
from infotda.greedy import ApproxInfoGain
from infotda.index import build_index, step_recall
from infotda.models import DIGITS_RECIPE, digits_mlp, train
from infotda.outputs import logit

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from milvus_server import MilvusProcess

GIB, LIMIT = 2**30, 8 * 2**30
M = 512
SIZES = {  # engine: numbers of rows
    "exact": (10_000, 30_000, 100_000, 300_000, 1_000_000),
    "faiss": (10_000, 30_000, 100_000, 300_000, 1_000_000),
    "faiss-hnsw": (10_000, 30_000, 100_000, 300_000, 1_000_000),
    "milvus-lite": (10_000, 30_000, 100_000),
    "milvus-server": (10_000, 30_000, 100_000, 300_000, 1_000_000),
}
QUICK = {kind: (2_000,) for kind in SIZES}
QUERIES, BUDGET = 20, 10


def gradient_norms():
    "Norms of tangent features of a small network on digits, over their mean."
    data, net = load_data("digits"), digits_mlp()
    train(net, data, DIGITS_RECIPE, epochs=5, progress=False)
    norms = tangent_features(net, data, logit(3), proj_dim=256, progress=False).Phi.norm(dim=1)
    return norms / norms.mean()


def rows_file(folder, n, m):
    "n x m float32 rows in a file, made once for each size."
    path = folder / f"rows-{n}-{m}.f32"
    if not path.exists():
        gen, norms = torch.Generator().manual_seed(0), gradient_norms()
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            for start in range(0, n, 2**13):
                size = min(2**13, n - start)
                scale = norms[torch.randint(len(norms), (size, 1), generator=gen)]
                file.write((torch.randn(size, m, generator=gen) * scale * m**-0.5).numpy().tobytes())
        temporary.rename(path)
    return np.memmap(path, dtype=np.float32, mode="r", shape=(n, m))


class Meter:
    "CPU seconds of this process and of a server's."

    def __init__(self, server=None):
        self.server = server

    def server_stat(self):
        "CPU seconds and resident bytes of the server."
        if self.server is None:
            return 0.0, 0
        fields = Path(f"/proc/{self.server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), peak

    def __call__(self, call, repeats=1):
        "CPU seconds (mean), best wall seconds, and the last result."
        walls, cpu = [], time.process_time() + self.server_stat()[0]
        for _ in range(repeats):
            start = time.perf_counter()
            result = call()
            walls.append(time.perf_counter() - start)
        return (time.process_time() + self.server_stat()[0] - cpu) / repeats, min(walls), result


def folder_bytes(folder):
    "What a folder holds on disk."
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(engine, n, folder):
    "All figures of one case."
    import warnings
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(2)
    Phi = rows_file(folder, n, M)
    gen = torch.Generator().manual_seed(1)
    phi = torch.randn(QUERIES, M, generator=gen) * M**-0.5 + torch.from_numpy(np.array(Phi[: QUERIES * 7 : 7]))
    build_index(torch.randn(64, 8, generator=gen), "faiss", progress=False).select(torch.randn(1, 8, generator=gen), 1, 1.0)  # lazy imports
    base, server, options = peak_bytes(), None, {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place = Path(place)
        try:
            if engine == "milvus-server":
                (place / "server").mkdir()
                server = MilvusProcess(place / "server")
                server.start()
                options = {"uri": server.uri, "timeout": 120.0}
            meter = Meter(server)
            before = folder_bytes(place)
            kind = engine.split("-")[0] if engine.startswith("milvus") else engine
            build_cpu, build_wall, index = meter(lambda: build_index(Phi, kind, place / "index", progress=False, **options))
            disk = folder_bytes(place) - before
            index.nearest(phi[:1].double(), 64)                          # the first search starts threads and reads pages
            search_cpu, search_wall, _ = meter(lambda: index.nearest(phi[:1].double(), 64), 5)
            step_cpu, step_wall, _ = meter(lambda: index.nearest(phi.double(), 64), 3)
            few = 5
            select_cpu, select_wall, picked = meter(lambda: ApproxInfoGain(index.engine.record["kappa"], index).fit(Phi).select(phi[:few], BUDGET))
            memory = peak_bytes() - base
            server_memory = meter.server_stat()[1]
            right = step_recall(picked, Phi, phi[:few]).double()
            index.close()
        finally:
            if server is not None:
                server.remove()
    return {
        "engine": engine, "n": n, "m": M, "build_cpu_s": build_cpu, "build_wall_s": build_wall, "search_cpu_s": search_cpu, "search_wall_s": search_wall,
        "step_cpu_s": step_cpu, "step_wall_s": step_wall, "select_cpu_s": select_cpu, "select_wall_s": select_wall, "queries": QUERIES, "selected": [few, BUDGET],
        "disk_bytes": disk, "peak_bytes": memory, "server_peak_bytes": server_memory, "recall_first": right[:, 0].mean().item(), "recall_later": right[:, 1:].mean().item(),
        "rankings_right": right.bool().all(dim=1).double().mean().item(), "proved": picked.proved.double().mean().item(), "rows_bytes": 4 * n * M,
    }


def table(results):
    "The figures as a plain table."
    head = ["engine", "n", "build c", "build w", "search ms c", "search ms w", "step ms/query c", "recall 1st", "later", "rankings", "proved", "disk MiB", "peak MiB"]
    lines = [[r["engine"], str(r["n"]), f"{r['build_cpu_s']:.1f}", f"{r['build_wall_s']:.1f}", f"{1e3 * r['search_cpu_s']:.1f}", f"{1e3 * r['search_wall_s']:.1f}", f"{1e3 * r['step_cpu_s'] / r['queries']:.1f}",
              f"{r['recall_first']:.2f}", f"{r['recall_later']:.2f}", f"{r['rankings_right']:.2f}", f"{r['proved']:.2f}", f"{r['disk_bytes'] / 2**20:.0f}", f"{(r['peak_bytes'] + r['server_peak_bytes']) / 2**20:.0f}"] for r in results]
    return aligned(head, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases, nothing written")
    parser.add_argument("--only", action="append", help="only this case, such as faiss-100000-512 (may be repeated); nothing written")
    parser.add_argument("--again", action="store_true", help="measure every case again, also those in the record")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "index.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where rows and indexes lie meanwhile; kept if given (default: a temporary folder)")
    args = parser.parse_args()
    cases = {f"{engine}-{n}-{M}": (engine, n) for engine, sizes in (QUICK if args.quick else SIZES).items() for n in sizes}
    if args.one:
        return print(json.dumps(measure(*cases[args.one], args.folder)))
    writes = not (args.quick or args.only)
    done = {f"{r['engine']}-{r['n']}-{r['m']}": r for r in json.loads(args.out.read_text())["cases"]} if writes and args.out.exists() and not args.again else {}
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in sorted(args.only or cases, key=lambda name: (cases[name][0] not in ("exact", "faiss"), cases[name][1])):
            if name in done:
                continue
            command = [sys.executable, __file__, "--one", name, "--folder", str(folder)] + (["--quick"] if args.quick else [])
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                sys.exit(f"{name} failed:\n{ran.stderr[-3000:]}")
            done[name] = json.loads(ran.stdout.splitlines()[-1])
            used = done[name]["peak_bytes"] + done[name]["server_peak_bytes"]
            assert used < LIMIT, f"{name} took {used / GIB:.1f} GiB"
            print(f"{name} done", file=sys.stderr)
            if writes:
                write_record(args.out, cases=[done[key] for key in cases if key in done])
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table([done[key] for key in cases if key in done]))


if __name__ == "__main__":
    main()
