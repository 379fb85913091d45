"""Indexes against the scan in memory: drawn rows, filters, bounds, kept and killed builds, a Milvus file and a real Milvus server that is killed."""
import json
import os
import threading

import faiss
import numpy as np
import pytest
import torch
from drawn import awkward_rows
from forks import forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from milvus_server import MilvusProcess

from infotda.greedy import ApproxInfoGain
from infotda.index import MilvusEngine, build_index, open_index, step_recall
from infotda.sketch import Projector
from infotda.store import FeatureStore, FeatureStoreMismatch, StoreSpec
from infotda.surrogate import info_gain

FLAT = ("exact", "faiss")


def rows_and_queries(n=400, m=16, q=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=gen), torch.randn(q, m, generator=gen), torch.arange(n) % 4


def same(index, Phi, phi, k, noise_var=None, candidates=None):
    "The rule with this index chooses what the rule without chooses, and proves it if the engine can."
    want = ApproxInfoGain(noise_var).fit(Phi).select(phi, k, candidates)
    got = ApproxInfoGain(noise_var, index).fit(Phi).select(phi, k, candidates)
    assert torch.equal(got.ranking, want.ranking), (got.ranking.tolist(), want.ranking.tolist())
    torch.testing.assert_close(got.gains, want.gains, rtol=1e-9, atol=1e-12)
    assert got.proved.all() == index.engine.certified and (got.bound == 0).all() == index.engine.certified
    return got


@st.composite
def problems(draw):
    n, m, q = draw(st.integers(1, 24)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    Phi = torch.tensor(awkward_rows(draw, rng, n, m))
    phi = torch.tensor(rng.normal(size=(q, m)))
    if draw(st.booleans()):
        phi[0] = Phi[rng.integers(n)]
    scale = 10.0 ** draw(st.integers(-12, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    Phi, phi = (Phi * scale).to(dtype), (phi * scale).to(dtype)
    if Phi.abs().max() == 0:
        Phi[0, 0] = scale
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor(rng.random((q, n)) < 0.6)
        mask[:, rng.integers(n)] = True
    smallest = n if mask is None else int(mask.sum(dim=1).min())
    noise_var = 10.0 ** draw(st.floats(-2, 3)) * Phi.double().square().sum(dim=1).mean().item()
    return Phi, phi, noise_var, draw(st.integers(1, min(smallest, 6))), mask, draw(st.integers(1, 5))


@pytest.mark.parametrize("kind", FLAT)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=problems())
def test_equals_the_scan(kind, case):
    Phi, phi, noise_var, k, mask, fetch = case
    index = build_index(Phi, kind, fetch=fetch, progress=False)
    got = same(index, Phi, phi, k, noise_var, mask)
    live = phi.double().square().sum(dim=1) > 0
    assert step_recall(got, Phi, phi, mask, rtol=1e-6)[live].all() or noise_var < 1e-1 * Phi.double().square().sum(dim=1).max()


@pytest.mark.parametrize("kind", FLAT)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=problems())
def test_bound_holds(kind, case):
    Phi, phi, _, _, _, limit = case
    found, missed = build_index(Phi, kind, progress=False).nearest(phi.double(), limit)
    for x, rows, bound in zip(phi.double(), found, missed):
        inner = (Phi.double() * x).sum(dim=1).abs()
        inner[rows] = -1
        assert inner.max() <= bound or len(rows) == len(Phi)


@pytest.mark.parametrize("kind", FLAT + ("faiss-hnsw", "milvus"))
def test_search_filters(kind, tmp_path):
    Phi, phi, labels = rows_and_queries()
    Phi[8:16] = Phi[:8]                                                  # ties: the lowest row first
    index = build_index(Phi, kind, tmp_path / "index", labels=labels, progress=False)
    inner = Phi.double() @ phi.double().T
    for label, exclude, candidates in [(None, None, None), (2, None, None), (2, [2, 6, 10], None), (None, torch.arange(400) < 50, None), (1, [5], list(range(40)))]:
        allowed = torch.ones(400, dtype=torch.bool)
        if candidates is not None:
            allowed = torch.isin(torch.arange(400), torch.tensor(candidates))
        if label is not None:
            allowed &= labels == label
        if exclude is not None:
            allowed[exclude] = False
        hits = index.search(phi, 7, label=label, exclude=exclude, candidates=candidates)
        for i in range(len(phi)):
            score = inner[:, i].abs().where(allowed, torch.tensor(-1.0, dtype=torch.float64))
            want = score.sort(descending=True, stable=True).indices[:7]
            assert hits.rows[i].tolist() == want.tolist()
            torch.testing.assert_close(hits.inner[i], inner[want, i])
            score[want] = -1
            assert score.max() <= hits.missed[i] * (1 + 1e-12)               # the last bits depend on the order of a sum
    index.close()


@pytest.mark.parametrize("kind", FLAT + ("milvus",))
def test_duplicates_and_ties(kind, tmp_path):
    "Thirty copies of every row, more than a step fetches: the lowest ones are found, and proved, by fetching on."
    Phi, phi, _ = rows_and_queries(10, 16, 2)
    copies = Phi.repeat(30, 1)[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    index = build_index(copies, kind, tmp_path / "index", fetch=4, progress=False)
    got = same(index, copies, torch.cat([phi, torch.zeros(1, 16)]), 8)
    assert got.fetched[:2].min() >= 22 and got.ranking[2].tolist() == list(range(8))
    index.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_store_is_searched_in_its_shards(dtype, tmp_path):
    Phi, phi, labels = rows_and_queries()
    Phi = Phi * 1e-7
    store = FeatureStore.create(tmp_path / "store", StoreSpec(400, Projector(16, 16, "identity"), "logit(0)", {"selected": "", "all": ""}, dtype=dtype), rows_per_shard=90)
    with pytest.raises(ValueError, match="nothing there yet"):
        build_index(store, "exact")
    with store.writing():
        for start, stop in store.spans():
            store.write(start, {"Phi": Phi[start:stop], "labels": labels[start:stop]})
    for kind in FLAT:
        index = build_index(store, kind, tmp_path / kind, progress=False)
        same(index, store, phi, 6)
        ApproxInfoGain(index=index).fit(store.Phi)                       # the same rows by content
        assert (labels[open_index(tmp_path / kind, store).search(phi, 5, label=3).rows[0]] == 3).all()
    with pytest.raises(FeatureStoreMismatch, match="content"):
        ApproxInfoGain(index=index).fit(store.Phi.flip(0))


def test_graph_is_measured_not_proved():
    Phi, phi, _ = rows_and_queries(1500, 32)
    index = build_index(Phi, "faiss-hnsw", progress=False, links=4, ef=4, ef_build=8, fetch=2)
    got = ApproxInfoGain(index=index).fit(Phi).select(phi, 10)
    assert not got.proved.any() and got.bound.isinf().all()
    right = step_recall(got, Phi, phi)
    assert not right.all()                                               # short lists do miss rows, and it is seen
    for i in range(len(phi)):
        torch.testing.assert_close(got.total[i], info_gain(Phi, got.ranking[i], phi[i], got.noise_var)[0])  # exact for what was chosen


def test_kept_and_found_again(tmp_path):
    Phi, phi, labels = rows_and_queries()
    for kind in ("exact", "faiss", "faiss-hnsw"):
        first = build_index(Phi, kind, tmp_path / kind, labels=labels, progress=False)
        names = sorted(os.listdir(tmp_path / kind))
        assert names == (["index.json"] if kind == "exact" else ["index.json", "rows.faiss"])
        again = open_index(tmp_path / kind, Phi.numpy(), labels)
        third = build_index(Phi, kind, tmp_path / kind, labels=labels, progress=False)
        for index in (again, third):
            assert torch.equal(index.select(phi, 9, 5.0).ranking, first.select(phi, 9, 5.0).ranking)
        assert b"pickle" not in (tmp_path / kind / "index.json").read_bytes()
    assert build_index(Phi, "faiss-hnsw", tmp_path / "graph", progress=False, links=16, ef=50).engine.ef == 50
    assert open_index(tmp_path / "graph", Phi, ef=400).engine.ef == 400   # of a search, not of the graph
    with pytest.raises(ValueError, match="links: expected 16, got 8"):
        open_index(tmp_path / "graph", Phi, links=8)


# Real kills

PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import faiss, pymilvus
from infotda.index import FaissEngine, MilvusEngine, Rows, build_index
FaissEngine.checkpoint, walk = 256, Rows.blocks
Phi = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))

def work(path, kind, blocks, **unused):
    count = 0
    def until(self, start=0, size=None):
        nonlocal count
        for a, block in walk(self, start, min(size or 256, 256)):
            count += 1
            if count > blocks:
                os.kill(os.getpid(), signal.SIGKILL)
            yield a, block
    Rows.blocks = until
    page, MilvusEngine.enter = MilvusEngine.enter, lambda self, a, b, there: [page(self, c, min(c + 256, b), there) for c in range(a, b, 256)]
    build_index(Phi, kind, path, progress=False)
"""


def test_killed_build_is_completed(tmp_path):
    "SIGKILL while the n-th block of 256 rows is on its way; the first twelve blocks are read for the record."
    Phi, phi = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)), torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    with forked(PROGRAM) as order:
        for kind, blocks in [("faiss", 13), ("faiss", 20), ("faiss-hnsw", 17), ("milvus", 13), ("milvus", 17), ("milvus", 22)]:
            path = tmp_path / f"{kind}-{blocks}"
            code, _ = order(path=path, kind=kind, blocks=blocks)
            assert code == -9 and not json.loads((path / "index.json").read_text())["complete"]
            if kind != "milvus":
                assert not (path / "rows.faiss").exists() or 0 < faiss.read_index(str(path / "rows.faiss")).ntotal < 3000
            index = open_index(path, Phi, progress=False)
            if kind == "faiss-hnsw":
                assert index.engine.index.ntotal == 3000
            else:
                same(index, Phi, phi, 5)
            if kind == "milvus":
                assert index.engine.count(0, 3000) == index.engine.count(-2**62, 2**62) == 3000
            index.close()
            assert json.loads((path / "index.json").read_text())["complete"]


# A real server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("milvus")
    server = MilvusProcess(tmp_path_factory.mktemp("milvus"))
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_server_equals_the_scan(server, tmp_path):
    Phi, phi, labels = rows_and_queries(1200, 24)
    Phi[600:620] = Phi[:20]
    index = build_index(Phi, "milvus", tmp_path / "index", labels=labels, progress=False, uri=server.uri)
    same(index, Phi, phi, 6)
    same(index, Phi, phi, 4, candidates=labels == 2)
    same(index, Phi, phi, 4, candidates=torch.arange(1200) != 7)
    assert (labels[index.search(phi, 9, label=1).rows[0]] == 1).all()
    again = open_index(tmp_path / "index", Phi, labels)
    assert again.engine.count(0, 1200) == 1200
    with pytest.raises(FeatureStoreMismatch, match="collection"):
        build_index(Phi + 1, "milvus", tmp_path / "other", progress=False, uri=server.uri, collection=index.engine.name)
    index.close()


def test_server_killed_during_a_build(server, tmp_path):
    "Killed twice while rows pour in, started again: the build goes on, every row is there once."
    Phi, phi, labels = rows_and_queries(6000, 32, q=2)
    path, failed = tmp_path / "index", []

    def build():
        try:
            build_index(Phi, "milvus", path, labels=labels, progress=False, uri=server.uri, timeout=4.0)
        except (ConnectionError, ValueError) as error:
            failed.append(error)

    enter, entered = MilvusEngine.enter, []

    def counted(self, start, stop, there):
        if entered.count(start) == 0 and len(entered) == 3:              # in the middle: acknowledged, not flushed
            server.process.kill()
        entered.append(start)
        enter(self, start, stop, there)

    MilvusEngine.enter = counted
    try:
        thread = threading.Thread(target=build)
        thread.start()
        thread.join(120)
    finally:
        MilvusEngine.enter = enter
    assert not thread.is_alive() and len(failed) == 1 and isinstance(failed[0], ConnectionError), failed
    assert "start the server again" in str(failed[0]).lower()
    assert not json.loads((path / "index.json").read_text())["complete"]
    with pytest.raises(ConnectionError, match="milvus-server"):
        open_index(path, Phi, labels, progress=False)
    server.kill()
    server.start()
    index = open_index(path, Phi, labels, progress=False)
    assert index.engine.count(0, 6000) == index.engine.count(-2**62, 2**62) == 6000
    ids = [row["id"] for a in range(0, 6000, 2000) for row in index.engine.client.query(index.engine.name, filter=f"id >= {a} and id < {a + 2000}", output_fields=["id"])]
    assert sorted(ids) == list(range(6000))
    same(index, Phi, phi, 5)
    index.close()
