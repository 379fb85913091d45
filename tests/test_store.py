"""The feature store under fire: kills at random moments and at every step, lost power, full disks, many processes."""
import errno
import json
import os
import random
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from forks import forked
from infotda.core import as_features
from infotda.sketch import Projector
from infotda.store import (DTYPES, DataHash, FeatureStore, FeatureStoreMismatch, StoreSpec, decode_rows, encode_rows, hash_weights, resume_pass, shard_name,
                           weights_of)

N, M, ROWS = 600, 16, 10


def spec_of(n=N, m=M, dtype="float32", **other):
    return StoreSpec(**{**dict(n=n, projector=Projector(m, m), output="f", weights={"all": "w"}, dtype=dtype), **other})


def produce(start, stop, m=M):
    rows = torch.randn(stop - start, m, generator=torch.Generator().manual_seed(start)) * 10.0 ** -(start % 7)
    return {"Phi": rows, "labels": torch.arange(start, stop) % 10, "index": torch.arange(start, stop) * 3, "residual": rows[:, 0].abs()}


def expected(store):
    parts = [produce(a, b, store.projector.proj_dim)["Phi"] for a, b in store.spans()]
    return torch.cat([decode_rows(encode_rows(part, store.manifest["spec"]["dtype"])) for part in parts])


def filled(path, n=25, rows=10, **other):
    return resume_pass(FeatureStore.create(path, spec_of(n, **other), rows), produce, progress=False)


# What the process behind `writer` does with an order, see forks.py.
SERVER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from test_store import ROWS, produce, spec_of
from infotda.store import FeatureStore, resume_pass

def dying(real, left):
    def call(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call

def work(path, log, dtype="float32", n=None, die_at=None, hold=False, stage=False, **_):
    if die_at is not None:
        left = [die_at]
        for name in ("fsync", "replace", "open", "unlink"):
            setattr(os, name, dying(getattr(os, name), left))
    if hold:
        with FeatureStore.open(path).writing():
            if os.fork() == 0:  # a reader of data that outlives its parent for a while
                os.setsid()
                time.sleep(5)
            os.kill(os.getpid(), signal.SIGKILL)
    if stage:
        store = FeatureStore.open(path)
        with open(log, "w") as file:
            json.dump([store.stage(a, produce(a, b)) for a, b in store.spans()], file)
        return
    spec = spec_of(dtype=dtype, **({} if n is None else {"n": n}))
    note = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def noted(start, stop):
        os.write(note, f"{start}\\n".encode())
        return produce(start, stop)
    resume_pass(FeatureStore.open_or_create(path, spec, ROWS), noted, progress=False)
"""


@pytest.fixture(scope="module")
def writer():
    "A function that has a process write, and perhaps die; returns its exit code."
    with forked(SERVER) as order:
        yield lambda **what: order(**what)[0]


# ---- killed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_twenty_kills_at_random_moments_lose_double_and_invent_nothing(tmp_path, writer, dtype):
    rng, kills, passes, longest = random.Random(dtype), 0, 0, 0.1
    while kills < 20:
        path, log, done = tmp_path / f"pass-{passes}", tmp_path / f"log-{passes}", []
        while True:
            before = len(log.read_text().split()) if log.exists() else 0
            code = writer(path=path, log=log, dtype=dtype, **({"kill_after": rng.uniform(0, longest)} if kills < 20 else {}))
            assert code in (0, -9)
            kills += code == -9
            longest *= 1.02  # on a slow machine too, some run gets through
            if not (path / "manifest.json").exists():
                continue
            made = [int(word) for word in log.read_text().split()[before:]] if log.exists() else []
            assert not set(made) & set(done), "a shard that was entered was made again"
            store = FeatureStore.open(path)
            now = [start for start, _ in store.spans() if store.has(start)]
            assert set(done) <= set(now) <= set(done) | set(made), "a shard was lost or invented"
            assert store.verify() == len(now)
            done = now
            if code == 0:
                break
        truth = expected(store)
        assert torch.equal(store.Phi, truth) and torch.equal(store.labels, torch.arange(N) % 10) and torch.equal(store.index, torch.arange(N) * 3)
        straight = filled(tmp_path / f"straight-{passes}", N, ROWS, dtype=dtype)
        assert straight.manifest["shards"] == store.manifest["shards"], "the files themselves are the same, byte by byte"
        passes += 1


def test_killed_at_every_system_call_from_the_first(tmp_path, writer):
    for step in range(200):
        path, log = tmp_path / str(step), tmp_path / f"log-{step}"
        code = writer(path=path, log=log, n=15, die_at=step)
        if code == 0:
            break
        assert code == -9
        if (path / "manifest.json").exists():
            store = FeatureStore.open(path)
            assert store.verify() == len(store.manifest["shards"])
        assert writer(path=path, log=log, n=15) == 0, "the second run must go through, whatever the first has left"
        store = FeatureStore.open(path)
        assert torch.equal(store.Phi, expected(store)) and not list(path.glob("*.tmp"))
    assert 20 < step < 199, f"a pass of two shards has {step} steps"


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path, writer):
    store = FeatureStore.create(tmp_path / "s", spec_of(25), ROWS)
    assert writer(path=store.path, log=tmp_path / "log", hold=True) == -9
    with store.writing():
        pass


# ---- lost power -------------------------------------------------------------------------------------
class Disk:
    "A pessimist's disk: after a power cut, a file holds what was last flushed, and a name may or may not have arrived."

    def __init__(self, folder, monkeypatch):
        self.folder, self.flushed, self.named, self.states = folder, {}, {}, []
        self.acknowledged = 0
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def names(self):
        return {p.name: p.stat().st_ino for p in self.folder.iterdir()}

    def watched(self, name, real):
        def call(*args):
            self.cut()
            real(*args)
            if name == "fsync":
                kind = os.fstat(args[0])
                if os.path.samestat(kind, self.folder.stat()):
                    self.named = self.names()
                else:
                    self.flushed[kind.st_ino] = self.content(kind.st_ino)
            self.cut()
        return call

    def content(self, inode):
        return next((p.read_bytes() for p in self.folder.iterdir() if p.stat().st_ino == inode), b"")

    def cut(self):
        "Remember what a power cut at this moment may leave: names that are safe, or all of them; content only if flushed."
        for names in (self.named, self.names()):
            self.states.append((self.acknowledged, {name: self.flushed.get(inode, b"") for name, inode in names.items()}))

    def check(self, where):
        "Every state must open to a store that is truthful and holds all that was acknowledged."
        bad = 0
        for i, (acknowledged, files) in enumerate(self.states):
            path = where / str(i)
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            try:
                store = FeatureStore.open(path)
                store.verify()
                bad += sum(store.has(start) for start, _ in store.spans()) < acknowledged
            except (ValueError, OSError):
                bad += 1
        return bad


@pytest.mark.parametrize("broken", [None, "files are not flushed", "the folder is not flushed"])
def test_power_may_fail_after_any_step(tmp_path, monkeypatch, broken):
    store = FeatureStore.create(tmp_path / "s", spec_of(25), ROWS)
    disk = Disk(store.path, monkeypatch)
    disk.named = disk.names()
    disk.flushed = {inode: disk.content(inode) for inode in disk.named.values()}
    if broken:
        seen, is_folder = os.fsync, lambda number: os.path.samestat(os.fstat(number), store.path.stat())
        monkeypatch.setattr(os, "fsync", lambda number: None if is_folder(number) == broken.startswith("the folder") else seen(number))
    with store.writing():
        for start, stop in store.missing():
            store.write(start, produce(start, stop))
            disk.acknowledged += 1
            disk.cut()
    monkeypatch.undo()
    assert len(disk.states) > (10 if broken else 30)
    bad = disk.check(tmp_path)
    assert bad > 0 if broken else bad == 0


# ---- no room ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", range(6))
def test_a_disk_that_is_full_at_any_step_loses_nothing(tmp_path, monkeypatch, step):
    store, left = FeatureStore.create(tmp_path / "s", spec_of(25), ROWS), [step]
    with store.writing():
        store.write(0, produce(0, 10))

        def full(real):
            def call(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args)
            return call

        with monkeypatch.context() as patched:
            for name in ("fsync", "replace"):
                patched.setattr(os, name, full(getattr(os, name)))
            with pytest.raises(OSError, match=r"No space left.*entered before \(1 shards\) is safe") as error:
                store.write(10, produce(10, 20))
        assert error.value.errno == errno.ENOSPC and not list(store.path.glob("*.tmp"))
        assert torch.equal(store.rows(0, 10), produce(0, 10)["Phi"])
        store.write(10, produce(10, 20))  # the same handle goes on once there is room
    assert torch.equal(resume_pass(FeatureStore.open(store.path), produce, progress=False).Phi, expected(store))


def test_a_disk_that_is_really_full(tmp_path):
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        store = FeatureStore.create(tmp_path / "s", spec_of(2000), 500)  # 500 rows are some 42 kB
        with pytest.raises(OSError, match="is safe: make room"):
            (tmp_path / "somebody else's").write_bytes(b"x" * 130_000)
            resume_pass(store, produce, progress=False)
        there = len(store.manifest["shards"])
        assert 0 < there < 4 and FeatureStore.open(store.path).verify() == there and not list(store.path.glob("*.tmp"))
        (tmp_path / "somebody else's").unlink()
        assert torch.equal(resume_pass(FeatureStore.open(store.path), produce, progress=False).Phi.clone(), expected(store))
    finally:
        del store
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# ---- many processes ---------------------------------------------------------------------------------
def test_many_stage_and_one_commits(tmp_path, writer):
    store = FeatureStore.create(tmp_path / "s", spec_of(35), ROWS)
    assert [writer(path=store.path, log=tmp_path / name, stage=True) for name in "ab"] == [0, 0]
    entries = [json.loads((tmp_path / name).read_text()) for name in "ab"]
    assert entries[0] == entries[1] and store.missing() == store.spans(), "staged is not entered"
    with store.writing():
        assert [store.commit(e) for e in entries[0]] == [True] * 4 and [store.commit(e) for e in entries[1]] == [False] * 4
    assert store.verify() == 4 and torch.equal(store.Phi, expected(store))


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec_of(25), ROWS)
    with store.writing():
        store.write(0, produce(0, 10))
        other = FeatureStore.open(store.path)
        assert torch.equal(other.rows(0, 10), produce(0, 10)["Phi"])
        with pytest.raises(ValueError, match="one writer at a time"):
            resume_pass(other, produce, progress=False)
    assert resume_pass(other, produce, progress=False).is_complete
    assert store.missing() and FeatureStore.open(store.path).is_complete  # a handle knows what it knew; writing() looks again
    with store.writing():
        assert store.is_complete


# ---- what is read is what was written ---------------------------------------------------------------
@given(n=st.integers(1, 40), rows=st.integers(1, 50), m=st.integers(1, 9), dtype=st.sampled_from(list(DTYPES)), data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_cut_reads_back(tmp_path_factory, n, rows, m, dtype, data):
    store = FeatureStore.create(tmp_path_factory.mktemp("cut") / "s", spec_of(n, m, dtype), rows)
    resume_pass(store, lambda a, b: produce(a, b, m), progress=False)
    truth = expected(store)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    again = FeatureStore.open(store.path)
    assert torch.equal(again.rows(start, stop), truth[start:stop]) and again.rows(start, stop).dtype == torch.float32
    assert torch.equal(as_features(again), truth) and torch.equal(torch.cat([b for _, b in again.blocks(7)]), truth)
    assert torch.equal(again.index, torch.arange(n) * 3) and again.labels.dtype == torch.int64 and len(again.residual) == len(again) == n
    assert again.projector == store.projector and again.matches(spec_of(n, m, dtype))


@given(rows=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_row_exponents_keep_eleven_bits_at_any_scale(rows):
    Phi = torch.tensor(rows, dtype=torch.float32)
    back = decode_rows(encode_rows(Phi, "float16")).double()
    top = Phi.double().abs().amax(dim=1, keepdim=True)
    if top.max() > 3.4e38:
        return  # rounds to a number that float32 does not have; writing refuses it
    error = (back - Phi.double()).abs()
    assert (error <= 2.0**-11 * Phi.double().abs() + 2.0**-39 * top + 2.0**-150).all()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), one=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_hash_of_the_data_does_not_know_batches(sizes, one):
    n = sum(sizes)
    batch = {"ids": torch.arange(3 * n).view(n, 3), "mask": torch.ones(n, 3, dtype=torch.bool), "labels": torch.arange(n)}
    total, start = DataHash(), 0
    for size in [1] * n if one else sizes:
        total.update({key: t[start : start + size] for key, t in batch.items()})
        start += size
    assert total.hexdigest() == DataHash().update(batch).hexdigest()
    assert total.hexdigest() != DataHash().update({**batch, "labels": torch.arange(n) + 1}).hexdigest()


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    for dtype in ("float16", "bfloat16"):
        store = FeatureStore.create(tmp_path / dtype, spec_of(2, 1, dtype))
        with pytest.raises(ValueError, match="finite numbers within the range of .* for example 1"):
            resume_pass(store, lambda a, b: {"Phi": torch.tensor([[1.0], [3.4027e38]])}, progress=False)


def test_shards_are_plain_safetensors_and_maps_are_private(tmp_path):
    store = filled(tmp_path / "s")
    columns = load_file(store.path / shard_name(10))
    assert set(columns) == {"Phi", "labels", "index", "residual"} and torch.equal(columns["Phi"], produce(10, 20)["Phi"])
    content = (store.path / shard_name(10)).read_bytes()
    assert b"pickle" not in content and content[8:9] == b"{"
    store.rows(10, 20).fill_(7)
    assert (store.path / shard_name(10)).read_bytes() == content
    one = resume_pass(FeatureStore.create(tmp_path / "one", spec_of(25)), produce, progress=False)
    assert len(one.spans()) == 1 and one.Phi.data_ptr() == one.shard(0)["Phi"].data_ptr(), "a single shard is not copied"


def test_a_complete_store_is_read_without_lock_or_permission(tmp_path):
    store = filled(tmp_path / "s")
    (store.path / "writer.lock").unlink()

    def never(start, stop):
        raise AssertionError("nothing is missing")

    resume_pass(FeatureStore.open(store.path), never, progress=False)
    assert not (store.path / "writer.lock").exists()


# ---- damage and mismatch ----------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty", "swapped"])
def test_every_damage_is_named_and_repaired_by_deleting_the_file(tmp_path, damage):
    store = filled(tmp_path / "s")
    file = store.path / shard_name(10)
    content = file.read_bytes()
    bits = bytearray(content)
    bits[len(bits) // 2] ^= 4
    file.write_bytes({"bit": bytes(bits), "short": content[:-1], "long": content + b"x", "empty": b"", "swapped": (store.path / shard_name(0)).read_bytes()}[damage])
    store = FeatureStore.open(store.path)
    for read in (lambda: store.Phi, store.verify, lambda: store.rows(15, 16), lambda: store.labels):
        with pytest.raises(ValueError, match="shard rows-000000010.safetensors of feature store .*Delete rows-000000010.safetensors and run the same pass again"):
            read()
    assert torch.equal(store.rows(0, 10), produce(0, 10)["Phi"])
    file.unlink()
    assert store.missing() == [(10, 20)]
    assert torch.equal(resume_pass(store, produce, progress=False).Phi, expected(store)) and file.read_bytes() == content


def test_a_deleted_shard_may_come_back_with_other_bits(tmp_path):
    store = filled(tmp_path / "s")
    store.Phi
    (store.path / shard_name(10)).unlink()
    resume_pass(store, lambda a, b: {**produce(a, b), "Phi": produce(a, b)["Phi"] + 1}, progress=False)
    assert store.verify() == 3 and torch.equal(store.rows(10, 20), produce(10, 20)["Phi"] + 1)
    assert torch.equal(store.Phi[10:20], produce(10, 20)["Phi"] + 1), "the handle does not show what it had kept"


def test_every_field_of_the_record_is_compared(tmp_path):
    store, base = FeatureStore.create(tmp_path / "s", spec_of(25, ntk={"flat": 0.5}), ROWS), dict(ntk={"flat": 0.5})
    assert store.matches(spec_of(25, **base))
    for field, change in {"n": {"n": 26}, "projection.dim": {"projector": Projector(M, 8)}, "projection.parameters": {"projector": Projector({"other": (M,)}, M)}, "output": {"output": "g"},
                          "weights.all": {"weights": {"all": "v"}}, "data": {"data": "d"}, "ntk.flat": {"ntk": {"flat": 0.25}}, "ntk": {"ntk": None}, "dtype": {"dtype": "bfloat16"}}.items():
        with pytest.raises(FeatureStoreMismatch, match=f"feature store .*, {field}: expected .* as in its manifest, got"):
            store.matches(spec_of(**{**dict(n=25), **base, **change}))
    with pytest.raises(FeatureStoreMismatch, match="output"):
        FeatureStore.open_or_create(store.path, spec_of(25, output="g", **base))


def test_weights_are_told_apart_by_parameters_and_buffers():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    before = weights_of(model, ["3.weight"])
    model[1].running_mean[0] += 1
    after = weights_of(model, ["3.weight"])
    assert before["selected"] == after["selected"] and before["all"] != after["all"]
    assert hash_weights(model) == hash_weights(model.to(memory_format=torch.channels_last)), "layout is not value"
    assert hash_weights(model) != hash_weights(model.double())


@pytest.mark.gpu
def test_weights_and_rows_from_a_gpu(tmp_path):
    model = nn.Linear(5, 3)
    here = hash_weights(model)
    assert hash_weights(model.cuda()) == here
    store = FeatureStore.create(tmp_path / "s", spec_of(25, dtype="float16"), ROWS)
    resume_pass(store, lambda a, b: {name: t.cuda() for name, t in produce(a, b).items()}, progress=False)
    assert torch.equal(store.Phi, expected(store)) and store.Phi.device.type == "cpu"
    assert_close(DataHash().update(torch.arange(9).cuda()).hexdigest(), DataHash().update(torch.arange(9)).hexdigest())
