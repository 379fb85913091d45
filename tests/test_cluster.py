"""A pass and a search on many processes: killed workers, killed drivers, the bits and the ranks of one machine."""
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from drawn import awkward_rows
from infotda.cluster import RULES, ClusterRule, ShardScan, cluster_features, knock, ray_cluster
from infotda.features import tangent_features
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.outputs import logit, true_logit
from infotda.sketch import Projector
from infotda.store import FeatureStore, FeatureStoreMismatch, StoreSpec

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported, here and in all processes that are started here
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
pytest.importorskip("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see this folder
N, ROWS, GREEDY = 640, 16, {rule.__name__: rule for rule in (InfoGain, ApproxInfoGain, InfoLoss)}

HEAD = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"
import ray
from infotda.cluster import local_cluster
with local_cluster(workers=2, object_memory=80 * 2**20):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def head():
    "The address of a cluster of two workers that another process has started."
    process = subprocess.Popen([sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def cluster(head):
    with ray_cluster(head):
        yield


# ---- a pass -----------------------------------------------------------------------------------------
class Noted(TensorDataset):
    "Examples that are read one by one, slowly if asked; the first of each shard is noted with the process that reads it."

    def __init__(self, log, pause=0.0):
        gen = torch.Generator().manual_seed(1)
        super().__init__(torch.rand(N, 1, 6, 6, generator=gen), torch.randint(0, 5, (N,), generator=gen))
        self.log, self.pause = str(log), pause

    @property
    def index(self):
        return 1000 + torch.arange(N)

    def __getitem__(self, i):
        if i % ROWS == 0:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {i}\n")
            time.sleep(self.pause)
        return super().__getitem__(i)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.ReLU(), nn.Linear(12, 5)).eval()


@contextmanager
def small_shards():
    "Shards of sixteen rows, wherever they are made."
    from infotda import features

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(features, "shard_rows", lambda *_: ROWS)
        yield


def begun(path, data, **options):
    "A store of sixteen rows a shard whose pass was interrupted at its first example."
    class Broken(Noted):
        def __getitem__(self, i):
            if i == ROWS:
                raise ConnectionError("gone")
            return super().__getitem__(i)

    broken = Broken(os.devnull)
    with small_shards(), pytest.raises(ConnectionError):
        tangent_features(net(), broken, logit(2), save_dir=path, progress=False, **{"proj_dim": 32, "batch_size": 8, **options})
    assert len(FeatureStore.open(path).manifest["shards"]) == 1
    return path


def spread(data, path, **options):
    with redirect_stdout(StringIO()):  # Ray tells of dead workers
        return cluster_features(net(), data, logit(2), save_dir=path, progress=False, **{"proj_dim": 32, "batch_size": 8, **options})


def read_log(path):
    return [tuple(map(int, line.split())) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The pass on one machine, with the shards of the others."
    path, data = tmp_path_factory.mktemp("one") / "s", Noted(os.devnull)
    begun(path, data)
    return tangent_features(net(), data, logit(2), save_dir=path, progress=False, proj_dim=32, batch_size=8), FeatureStore.open(path)


def test_a_real_cluster_answers_the_knock(head):
    knock(head)


@pytest.mark.parametrize("options", [dict(), dict(dtype="float16"), dict(proj_type="rademacher", ntk={"4.weight": 0.5}), dict(engine="func", proj_dim=16, params="6.*")])
def test_the_store_of_a_cluster_is_that_of_one_machine_file_for_file(tmp_path, cluster, options):
    data, made = Noted(tmp_path / "log"), dict(proj_dim=32, batch_size=8) | options
    there = spread(data, begun(tmp_path / "cluster", data, **made), **made)
    begun(tmp_path / "one", data, **made)
    here = tangent_features(net(), data, logit(2), save_dir=tmp_path / "one", progress=False, **made)
    for name in ("Phi", "residual", "labels", "index"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    assert (here.dtype, here.residual_note, here.output, here.params, here.ntk) == (there.dtype, there.residual_note, there.output, there.params, there.ntk)
    assert FeatureStore.open(tmp_path / "one").manifest["shards"] == FeatureStore.open(tmp_path / "cluster").manifest["shards"]


def test_a_fresh_store_in_any_batch_and_queries_like_it(tmp_path, cluster):
    data = Noted(os.devnull)
    train = cluster_features(net(), data, true_logit(), save_dir=tmp_path / "s", proj_dim=32, progress=False)
    assert_close(train.Phi, tangent_features(net(), data, true_logit(), proj_dim=32, progress=False).Phi, rtol=1e-4, atol=1e-5)
    query = cluster_features(net(), data.tensors, true_logit(), save_dir=tmp_path / "q", like=tmp_path / "s", progress=False)
    assert_close(query.Phi, train.Phi, rtol=1e-4, atol=1e-5)
    with pytest.raises(FeatureStoreMismatch, match="weights.selected"):
        cluster_features(net(1), data, true_logit(), save_dir=tmp_path / "s", proj_dim=32, progress=False)


def test_workers_killed_at_random_moments(tmp_path, cluster, straight):
    log, rng, stop, killed = tmp_path / "log", random.Random(0), threading.Event(), []
    log.touch()

    def killer():
        while len(killed) < 3 and not stop.wait(rng.uniform(0.1, 0.8)):
            alive = {pid for pid, _ in read_log(log)} - {os.getpid(), *killed}  # this process has looked at the first example
            if len(read_log(log)) > 4 and alive:
                killed.append(rng.choice(sorted(alive)))
                os.kill(killed[-1], signal.SIGKILL)

    data = Noted(log, pause=0.15)
    path = begun(tmp_path / "s", data)
    thread = threading.Thread(target=killer)
    thread.start()
    try:
        features = spread(data, path, retries=10)
    finally:
        stop.set()
        thread.join()
    store, made = FeatureStore.open(path), [row for _, row in read_log(log)]
    assert len(killed) == 3 and torch.equal(features.Phi, straight[0].Phi)
    assert store.manifest["shards"].keys() == straight[1].manifest["shards"].keys() and store.verify() == N // ROWS
    assert {name: entry["sha256"] for name, entry in store.manifest["shards"].items()} == {name: entry["sha256"] for name, entry in straight[1].manifest["shards"].items()}
    assert not list(path.glob("*.tmp")) and {p.name for p in path.glob("rows-*")} == set(store.manifest["shards"])
    again = [row for row in set(made) if row >= ROWS and made.count(row) > 1]
    assert len(again) <= len(killed), "only what a killed worker had begun is made again"


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_cluster import Noted, ray_cluster, spread
with ray_cluster(sys.argv[2]):
    spread(Noted(sys.argv[4], pause=0.1), sys.argv[3])
"""


def test_a_killed_driver_loses_nothing_and_the_next_one_goes_on(tmp_path, head, cluster, straight):
    path = begun(tmp_path / "s", None)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, os.path.dirname(__file__), head, str(path), str(tmp_path / "first")])
    while len(FeatureStore.open(path).manifest["shards"]) < 6:
        assert driver.poll() is None, "the driver died by itself"
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    entered = [start for start, _ in FeatureStore.open(path).spans() if FeatureStore.open(path).has(start)]
    assert 6 <= len(entered) < N // ROWS and FeatureStore.open(path).verify() == len(entered)
    features = spread(Noted(tmp_path / "second"), path)
    assert torch.equal(features.Phi, straight[0].Phi) and not list(path.glob("*.tmp"))
    made = [row for _, row in read_log(tmp_path / "second")]
    assert all(made.count(start) == 1 for start in entered[1:]), "what was entered is read again, to compare, and not made again"
    workers, deadline = {pid for pid, _ in read_log(tmp_path / "first")}, time.time() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers of a dead driver end"


# ---- a search ---------------------------------------------------------------------------------------
class Here(ClusterRule):
    "The rule of a cluster whose actors live in this process."
    _count = lambda self: 2
    _hand = lambda self, value: value
    _hire = lambda self, store, groups: [ShardScan(store.path, spans) for spans in groups]

    def _ask(self, what, *args):
        if what != "after":
            return [getattr(scan, what)(*args) for scan in self.actors_]
        _, [start], steps = args
        for scan in self.actors_:
            if scan.start is not start:
                scan.begin(start)
            for step in steps[scan.done:]:
                scan.apply(step)
        return [scan.best() for scan in self.actors_]


def stored(path, Phi, rows):
    store = FeatureStore.create(path, StoreSpec(len(Phi), Projector(Phi.shape[1], Phi.shape[1]), "f", {}), rows)
    with store.writing():
        for a, b in store.spans():
            store.write(a, {"Phi": Phi[a:b]})
    return store


@given(data=st.data(), name=st.sampled_from(list(RULES)), kappas=st.sampled_from([None, 0.1, 1.0, 30.0]), rows=st.integers(1, 9), actors=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_ranks_and_nats_are_those_of_the_greedy_rules(tmp_path_factory, data, name, kappas, rows, actors):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    m = data.draw(st.integers(2, 8))
    n = data.draw(st.integers(m + 1, 30))
    Phi = torch.as_tensor(awkward_rows(data.draw, rng, n, m)).float()
    if not Phi.any():
        return
    phi, k = torch.as_tensor(rng.normal(size=(3, m))) * Phi.norm(dim=1).max(), data.draw(st.integers(1, min(n, 6)))
    noise_var = None if kappas is None else kappas * Phi.double().square().sum(dim=1).mean().item()
    mask = torch.as_tensor(rng.random((3, n)) < 0.7)
    candidates = mask if data.draw(st.booleans()) and mask.sum(dim=1).min() >= k else None
    store = stored(tmp_path_factory.mktemp("drawn") / "s", Phi, rows)
    found = Here(name, noise_var, actors).fit(store).select(phi, k, candidates, progress=False)
    wanted = GREEDY[name](noise_var).fit(store).select(phi, k, candidates)
    assert torch.equal(found.ranking, wanted.ranking)
    assert_close(found.gains, wanted.gains, rtol=1e-6, atol=1e-12)
    assert_close(found.noise_var, wanted.noise_var)


@pytest.fixture(scope="module")
def hired(straight, cluster):
    return ClusterRule("InfoGain").fit(straight[1])


@pytest.mark.parametrize("rule", [InfoGain(), ApproxInfoGain(2.0), InfoLoss()])
def test_actors_choose_what_one_machine_chooses(straight, cluster, hired, rule):
    features, store = straight
    spread_rule, query = ClusterRule(rule).fit(hired), features.Phi[[3, 77]] + 0.1
    for candidates in (None, features.labels == 2):
        found, wanted = spread_rule.select(query, 8, candidates, progress=False), rule.fit(store).select(query, 8, candidates)
        assert torch.equal(found.ranking, wanted.ranking) and found.method == wanted.method
        assert_close(found.gains, wanted.gains, rtol=1e-8, atol=1e-12)
    assert len(spread_rule.actors_) == 2
