"""What the benchmarks share: CPU time, peak memory, a plain table, and one process for each case."""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from infotda.core import environment, onednn_works


def peak_bytes() -> int:
    "Largest resident size of this process so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu(call, *args):
    "CPU seconds and result of a call."
    start = time.process_time()
    result = call(*args)
    return time.process_time() - start, result


def aligned(head, lines):
    "Rows of text in columns, to the right."
    widths = [max(len(line[i]) for line in [head] + lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in [head] + lines)


def write_record(path, **measured):
    "Write what a run measured beside what it was measured with."
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment() | {"onednn": onednn_works()}} | measured, indent=1) + "\n")


def run_cases(script, doc, cases, quick, measure, table):
    "The command line of a benchmark: `measure(name, case)` in a process of its own for each case, then `table(results)` and a record."
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases, nothing written")
    parser.add_argument("--only", action="append", help="only this case (may be repeated); nothing written")
    parser.add_argument("--out", type=Path, default=Path(script).parent / "results" / f"{Path(script).stem}.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = quick if args.quick else cases
    if args.one:
        print(json.dumps(measure(args.one, cases[args.one])))
        return
    results = []
    for name in args.only or cases:
        command = [sys.executable, script, "--one", name] + (["--quick"] if args.quick else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name} done", file=sys.stderr)
    print(table(results))
    if not args.quick and not args.only:
        write_record(args.out, cases=results)
