"""A process that has everything imported and forks a worker for each order, so that many kills do not import torch many times."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

# The end of a server's program: `work` is defined above it, and an order is one line of JSON.
SERVE = """
from forks import serve
serve(work)
"""


def serve(work):
    "Fork for each order on stdin, kill the child after `kill_after` seconds if asked, answer with its exit code and how long it lived."
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        start, pid = time.perf_counter(), os.fork()
        if pid == 0:
            code = 1
            try:
                work(**order)
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        if order.get("kill_after") is not None:
            time.sleep(order["kill_after"])
            os.kill(pid, signal.SIGKILL)  # not yet waited for: the number is still this child's
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, time.perf_counter() - start]), flush=True)


@contextmanager
def forked(program):
    "A function that sends an order to a process that runs `program`; it returns the exit code and the seconds."
    server = subprocess.Popen([sys.executable, "-c", program + SERVE, os.path.dirname(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert server.stdout.readline() == "ready\n"

    def order(**what):
        server.stdin.write(json.dumps({key: str(v) if key in ("path", "log") else v for key, v in what.items()}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    try:
        yield order
    finally:
        server.stdin.close()
        server.wait(30)
