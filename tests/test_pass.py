"""Long passes: announced before they start, killed at random moments, and resumed to the same bits."""
import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from forks import forked
from infotda.data import has_data, load_data
from infotda.features import PassPlan, tangent_features
from infotda.greedy import InfoGain
from infotda.jacobian import param_shapes, per_example_jacobian
from infotda.models import MLP, ResNet9, digits_mlp
from infotda.outputs import Output, logit, true_logit
from infotda.sketch import Projector
from infotda.store import FeatureStore, FeatureStoreMismatch, shard_name

KILLS = int(os.environ.get("INFOTDA_KILLS", 24))  # 200 for the full count


# ---- memory -----------------------------------------------------------------------------------------
class SmallTransformer(nn.Module):
    "Three encoder layers over 64 tokens."

    def __init__(self, words=500, d=128, classes=4):
        super().__init__()
        self.embed, self.place = nn.Embedding(words, d), nn.Parameter(torch.randn(64, d) / 10)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True), 3, enable_nested_tensor=False)
        self.head = nn.Linear(d, classes)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens) + self.place).mean(dim=1))


def case(name):
    "A model, data and options for it."
    torch.manual_seed(0)
    if name == "mlp":
        data = load_data("fashion_mnist", "train").subset(range(15_000))
        return MLP([784, 512, 512, 10]).eval(), data, dict(proj_dim=4096)
    if name == "resnet9":
        data = load_data("cifar10", "test").subset(range(64))
        return ResNet9(10).eval(), data, dict(proj_dim=512)
    tokens = torch.randint(0, 500, (128, 64))
    return SmallTransformer().eval(), TensorDataset(tokens, torch.randint(0, 4, (128,))), dict(proj_dim=1024)


def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def measure(name, what):
    "In a process of its own: announce a pass, or make it and say what it took; bytes."
    model, data, options = case(name)
    run = lambda data, **more: tangent_features(model, data, true_logit(), progress=False, **options, **more)
    if what == "plan":
        plan = run(data, dry_run=True)
        print(json.dumps({"ram": plan.ram, "batch_size": plan.batch_size, "batch": plan.batch_memory, "features": plan.feature_memory, "seconds": plan.seconds}))
        return
    few = TensorDataset(data.x[:2], data.y[:2]) if hasattr(data, "x") else TensorDataset(*data[:2])
    run(few, batch_size=1)  # code and constants come into memory
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts here
    start = time.perf_counter()
    rows = run(data, batch_size=int(what))
    print(json.dumps({"took": status("VmHWM") - before, "rows": len(rows), "seconds": time.perf_counter() - start}))


def in_process(*args):
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the high-water mark of a process")
@pytest.mark.parametrize("name", ["mlp", "resnet9", "transformer"])
def test_peak_memory_is_within_a_fifth_of_the_plan(name):
    if name != "transformer" and not has_data({"mlp": "fashion_mnist", "resnet9": "cifar10"}[name]):
        pytest.skip("no data here")
    plan = in_process(name, "plan")
    made = in_process(name, str(plan["batch_size"]))
    assert 0.8 < made["took"] / plan["ram"] < 1.2, (plan, made)


def test_a_plan_leaves_no_trace_and_tells_what_there_is(tmp_path):
    model, data = net(), examples()
    plan = run(model, data, save_dir=tmp_path / "s", dry_run=True, proj_dim=4096)
    run(model, data, save_dir=tmp_path / "full", proj_dim=4096)
    assert 0.98 < plan.disk / sum(p.stat().st_size for p in (tmp_path / "full").iterdir()) <= 1
    plan = run(model, data, save_dir=tmp_path / "s", dry_run=True)
    assert isinstance(plan, PassPlan) and not (tmp_path / "s").exists() and (plan.examples, plan.of) == (90, 90) and plan.disk > 90 * 32 * 4
    assert plan.flops > 90 * 2 * 36 * 5 and plan.seconds > 0 and not plan.by_func and "by layer hooks" in repr(plan)
    func = run(model, data, dry_run=True, engine="func")
    assert set(func.by_func) == {name for name, _ in model.named_parameters()} and func.rows_per_shard is None and func.feature_memory == 90 * 32 * 4
    assert run(model, data, dry_run=True, memory=2**30).batch_size == 256
    small = run(model, data, dry_run=True, memory=2**18)
    assert small.batch_size < 256 and run(model, data, memory=2**18).Phi.shape == (90, 32)
    with pytest.raises(ValueError, match="memory: expected at least .* for one example"):
        run(model, data, memory=100)
    half = broken_pass(tmp_path / "half", model, data, after=1)
    assert run(model, data, save_dir=half.path, dry_run=True).examples == 74


# ---- engines ----------------------------------------------------------------------------------------
def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5)).eval()


class Numbered(TensorDataset):
    "Examples with stable numbers, read one by one."

    @property
    def index(self):
        return 1000 + torch.arange(len(self))


def examples(n=90, seed=1, numbered=True):
    g = torch.Generator().manual_seed(seed)
    return (Numbered if numbered else TensorDataset)(torch.rand(n, 1, 6, 6, generator=g), torch.randint(0, 5, (n,), generator=g))


def run(model, data, output=None, **options):
    return tangent_features(model, data, output or logit(2), **{"proj_dim": 32, "progress": False, **options})


@pytest.mark.parametrize("proj_type", ["fold", "rademacher"])
@pytest.mark.parametrize("ntk", [None, {"4.weight": 0.5, "5.bias": 3.0}])
def test_engines_agree(proj_type, ntk):
    model, data = net(), examples(23)
    by_hooks, by_func, by_loop = (run(model, data, true_logit(), engine=engine, proj_type=proj_type, ntk=ntk) for engine in ("hooks", "func", "loop"))
    for other in (by_func, by_loop):
        torch.testing.assert_close(by_hooks.Phi, other.Phi, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_hooks.residual, other.residual, rtol=1e-4, atol=1e-6)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.gru(x[:, 0])[0][:, -1])


def test_what_vmap_cannot_do_is_left_to_a_loop():
    torch.manual_seed(0)
    model, data = Recurrent().eval(), examples(11)
    features = run(model, data, engine="loop")
    for i in (0, 10):
        grads = torch.autograd.grad(model(data[i][0][None])[0, 2], list(model.parameters()))
        row = features.projector({name: g[None] for (name, _), g in zip(model.named_parameters(), grads)})
        torch.testing.assert_close(features.Phi[i : i + 1], row, rtol=1e-4, atol=1e-5)


class Neighbour(nn.Module):
    "A plain sum over the batch does not notice that each example answers for another one."

    def __init__(self, shift):
        super().__init__()
        self.linear, self.shift = nn.Linear(36, 5), shift

    def forward(self, x):
        h = self.linear(x.flatten(1))
        return h - h.mean(dim=0) if self.shift is None else h.roll(self.shift, dims=0)


@pytest.mark.parametrize("shift", [None, 1])
@pytest.mark.parametrize("engine", ["auto", "hooks", "func"])
def test_coupled_examples_are_refused_by_every_engine(engine, shift):
    with pytest.raises(ValueError, match="mix the examples|examples are mixed"):
        run(Neighbour(shift), examples(20), engine=engine)


@pytest.mark.parametrize("engine", ["hooks", "func"])
def test_a_gradient_that_is_not_finite_is_named(engine):
    model, data = net(), examples()
    data.tensors[0][77] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or Inf for example 77, in parameters \['.*stable index of example 77 is 1077"):
        run(model, data, engine=engine, batch_size=16)


# ---- resumed ----------------------------------------------------------------------------------------
class Failing(Numbered):
    "Reading fails from some example on."

    def __getitem__(self, i):
        if i >= self.fails_at:
            raise ConnectionError("gone")
        return super().__getitem__(i)


def broken_pass(path, model, data, after=1, **options):
    "A store with `after` shards of sixteen rows."
    from infotda import features

    bad = Failing(*data.tensors)
    bad.fails_at = 16 * after + 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(features, "shard_rows", lambda *_: 16)
        with pytest.raises(ConnectionError):
            run(model, bad, **{"batch_size": 8, "save_dir": path, **options})
    store = FeatureStore.open(path)
    assert sum(store.has(start) for start, _ in store.spans()) == after
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("output", [logit(2), true_logit(), Output("norm", lambda z, batch: z.norm(dim=1))])
def test_resumed_uninterrupted_and_in_memory_are_the_same_bits(tmp_path, dtype, output):
    model, data = net(), examples()
    memory = run(model, data, output, batch_size=8)
    broken_pass(tmp_path / "s", model, data, 3, output=output, dtype=dtype)
    resumed = run(model, data, output, save_dir=tmp_path / "s", dtype=dtype)
    straight = run(model, data, output, save_dir=tmp_path / "straight", batch_size=8, dtype=dtype)
    for name in ("Phi", "residual", "labels", "index"):
        a, b, c = (getattr(f, name) for f in (resumed, straight, memory))
        assert (a is None and b is None and c is None) or torch.equal(a, b)
        assert a is None or torch.equal(a, c) or (name == "Phi" and dtype != "float32")
    assert resumed.residual_note == memory.residual_note and resumed.dtype == dtype
    norms = memory.Phi.double().norm(dim=1)
    error = (resumed.Phi.double() @ resumed.Phi.double().T - memory.Phi.double() @ memory.Phi.double().T).abs() / (norms[:, None] * norms)
    assert error.max() <= resumed.rounding and (dtype == "float32") == (resumed.rounding == 0)
    again = run(stopped(), data, output, save_dir=tmp_path / "s", dtype=dtype)
    assert torch.equal(again.Phi, resumed.Phi)


def stopped():
    "The same weights in a model that cannot be run any more: a complete store asks for nothing."
    model = net()
    model.forward = None
    return model


def test_padding_that_depends_on_the_batch(tmp_path):
    torch.manual_seed(0)
    model = SmallTransformer(words=50, d=16).eval()
    texts = [(torch.randint(0, 50, (int(length),)), int(length) % 4) for length in torch.randint(2, 9, (40,))]

    def collate(items):
        width = max(len(t) for t, _ in items)
        return torch.stack([nn.functional.pad(t, (0, width - len(t))) for t, _ in items]), torch.tensor([y for _, y in items])

    model.place = nn.Parameter(model.place[:1].detach().clone())
    loader = torch.utils.data.DataLoader(texts, collate_fn=collate)
    first = run(model, loader, save_dir=tmp_path / "s", batch_size=4)
    assert torch.equal(run(model, loader, save_dir=tmp_path / "s").Phi, first.Phi), "examples are hashed with the padding they were made with"
    with pytest.raises(FeatureStoreMismatch, match="data of rows"):
        run(model, torch.utils.data.DataLoader(texts[::-1], collate_fn=collate), save_dir=tmp_path / "s")


def test_half_done_passes_go_on_as_they_began(tmp_path):
    model, data = net(), examples()
    store = broken_pass(tmp_path / "s", model, data, 2)
    with pytest.raises(ValueError, match="batch_size for feature store .*: expected 8, with which the pass began, got 4"):
        run(model, data, save_dir=store.path, batch_size=4)
    with pytest.raises(ValueError, match="engine for feature store .*: expected 'auto'"):
        run(model, data, save_dir=store.path, engine="func")
    with pytest.raises(ValueError, match=r'Output\("name", fn\)'):
        run(model, data, lambda z, batch: z[:, 0], save_dir=tmp_path / "t")
    assert not (tmp_path / "t").exists() and run(model, data, save_dir=store.path).Phi.shape == (90, 32)


# ---- what does not fit ------------------------------------------------------------------------------
@pytest.mark.parametrize("complete", [False, True])
def test_a_store_that_does_not_fit_is_refused_by_field_and_nothing_is_lost(tmp_path, complete):
    model, data = net(), examples()
    store = broken_pass(tmp_path / "s", model, data, 2)
    if complete:
        run(model, data, save_dir=store.path)
    before = {p.name: p.read_bytes() for p in store.path.iterdir()}
    moved, buffers = net(), net()
    with torch.no_grad():
        moved[4].weight[0, 0] += 1e-6
        buffers[1].running_mean[0] += 1e-3
    x, y = data.tensors
    for field, call in {
        "weights.selected": lambda: run(moved, data, save_dir=store.path),
        "weights.all": lambda: run(buffers, data, save_dir=store.path),
        "n": lambda: run(model, Numbered(x[:80], y[:80]), save_dir=store.path),
        "data": lambda: run(model, (x, y), save_dir=store.path),
        "output": lambda: run(model, data, logit(3), save_dir=store.path),
        "projection.dim": lambda: run(model, data, save_dir=store.path, proj_dim=33),
        "projection.seed": lambda: run(model, data, save_dir=store.path, proj_seed=1),
        "projection.parameters": lambda: run(model, data, save_dir=store.path, params="7.*"),
        "ntk": lambda: run(model, data, save_dir=store.path, ntk={"7.weight": 0.5}),
        "dtype": lambda: run(model, data, save_dir=store.path, dtype="float16"),
    }.items():
        with pytest.raises(FeatureStoreMismatch, match=f"feature store .*, {field}: expected"):
            call()
    assert {p.name: p.read_bytes() for p in store.path.iterdir()} == before
    assert torch.equal(run(model, data, save_dir=store.path).Phi, run(model, data, batch_size=8).Phi)


def test_an_order_that_changed_is_noticed_without_stable_numbers(tmp_path):
    model, (x, y) = net(), examples().tensors
    swapped = torch.arange(90)
    swapped[[3, 4]] = swapped[[4, 3]]
    first = run(model, (x, y), save_dir=tmp_path / "s", batch_size=8)
    assert torch.equal(run(model, (x, y), save_dir=tmp_path / "s").Phi, first.Phi)
    with pytest.raises(FeatureStoreMismatch, match="data of rows 0 to 89"):
        run(model, (x[swapped], y[swapped]), save_dir=tmp_path / "s")


def test_queries_like_a_store_need_its_model(tmp_path):
    model, data, other = net(), examples(), net(1)
    train = run(model, data, save_dir=tmp_path / "s")
    for like in (train, tmp_path / "s", str(tmp_path / "s"), FeatureStore.open(tmp_path / "s")):
        query = tangent_features(model, data.tensors[0][:3], logit(2), like=like, progress=False)
        torch.testing.assert_close(query.Phi, train.Phi[:3], rtol=1e-4, atol=1e-5)
        with pytest.raises(FeatureStoreMismatch, match="weights.selected"):
            tangent_features(other, data.tensors[0][:3], logit(2), like=like, progress=False)
    InfoGain().fit(train).select(query, 2)


# ---- damage -----------------------------------------------------------------------------------------
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    model, data = net(), examples()
    store, calls, real = broken_pass(tmp_path / "s", model, data, 2), [0], os.fsync

    def full(number):
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*entered before \(3 shards\) is safe"):
            run(model, data, save_dir=store.path)
    assert FeatureStore.open(store.path).verify() == 3
    assert torch.equal(run(model, data, save_dir=store.path).Phi, run(model, data, batch_size=8).Phi)


def test_a_damaged_shard_is_named_and_made_again(tmp_path):
    model, data = net(), examples()
    store = broken_pass(tmp_path / "s", model, data, 2)
    truth = run(model, data, save_dir=store.path).Phi.clone()
    bad = store.path / shard_name(32)
    content = bytearray(bad.read_bytes())
    content[-7] ^= 8
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"shard {bad.name} .*SHA-256.*Delete {bad.name} and run the same pass again"):
        run(model, data, save_dir=store.path)
    bad.unlink()
    assert torch.equal(run(model, data, save_dir=store.path).Phi, truth)


# ---- mapped -----------------------------------------------------------------------------------------
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rule_fits_features_on_disk_without_loading_them(tmp_path):
    def private():
        with open("/proc/self/smaps_rollup") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("Anonymous:"))

    torch.manual_seed(0)
    model, x = nn.Linear(40, 3).eval(), torch.randn(16_384, 40)
    run(model, x, proj_dim=1024, batch_size=256, save_dir=tmp_path / "s")
    before = private()
    features = run(model, x, proj_dim=1024, save_dir=tmp_path / "s")
    assert len(FeatureStore.open(tmp_path / "s").spans()) == 4 and features.Phi.nbytes == 64 * 2**20
    rule = InfoGain().fit(features)
    picked = rule.select(run(model, x[:2], proj_dim=None, like=features), 5)
    assert private() - before < 16 * 2**20
    memory = InfoGain().fit(features.Phi.clone()).select(run(model, x[:2], proj_dim=None, like=features).Phi, 5)
    assert torch.equal(picked.ranking, memory.ranking)


# ---- killed -----------------------------------------------------------------------------------------
# A process with model and data, which makes a pass for each order, see forks.py.
SERVER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from infotda import features
from test_pass import kill_case

made = features.pass_rows
model, data, options = kill_case()
features.shard_rows = lambda *_: 40

def work(path, log, **_):
    note = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def noted(work, source, size, why, start, *rest, **more):
        os.write(note, f"{start}\\n".encode())
        return made(work, source, size, why, start, *rest, **more)
    features.pass_rows = noted
    features.tangent_features(model, data, save_dir=path, progress=False, **options)
"""


def kill_case():
    "A small network on Fashion-MNIST: seventy-five shards of forty rows, in batches of eight."
    torch.manual_seed(0)
    return MLP([784, 32, 10]).eval(), load_data("fashion_mnist", "train").subset(range(3000)), dict(output=logit(3), proj_dim=64, batch_size=8)


@pytest.fixture
def writer():
    "A function that has a process make the pass, and perhaps die; returns its exit code and the seconds."
    with forked(SERVER) as order:
        yield order


@pytest.mark.skipif(not has_data("fashion_mnist"), reason="no data here")
def test_kills_at_random_moments_lose_double_and_invent_nothing(tmp_path, writer):
    model, data, options = kill_case()
    truth = tangent_features(model, data, progress=False, **options)
    _, longest = writer(path=tmp_path / "straight", log=tmp_path / "straight.log")
    shards = FeatureStore.open(tmp_path / "straight").manifest["shards"]
    assert len(shards) == 75
    rng, kills, passes, inside = random.Random(0), 0, 0, 0
    while kills < KILLS:
        path, log, done = tmp_path / f"pass-{passes}", tmp_path / f"log-{passes}", []
        while True:
            before = len(log.read_text().split()) if log.exists() else 0
            code, _ = writer(path=path, log=log, kill_after=rng.uniform(0, longest) if kills < KILLS else None)
            assert code in (0, -9)
            kills += code == -9
            if not (path / "manifest.json").exists():
                continue
            made = [int(word) for word in log.read_text().split()[before:]]
            assert not set(made) & set(done), "a shard that was entered was made again"
            store = FeatureStore.open(path)
            now = [start for start, _ in store.spans() if store.has(start)]
            assert set(done) <= set(now) <= set(done) | set(made), "a shard was lost or invented"
            assert store.verify() == len(now) and all(torch.equal(store.rows(a, a + 40), truth.Phi[a : a + 40]) for a in now)
            inside, done = inside + (code == -9 and 0 < len(now) < 75), now
            if code == 0:
                break
        assert store.manifest["shards"] == shards, "the files are those of a pass that ran through, byte by byte"
        assert torch.equal(store.Phi, truth.Phi) and torch.equal(store.index, truth.index) and torch.equal(store.labels, truth.labels) and torch.equal(store.residual, truth.residual)
        assert not list(path.glob("*.tmp"))
        passes += 1
    print(f"{kills} kills, {inside} of them in the middle of a store, over {passes} passes of {longest:.1f} s")
    assert inside > KILLS / 3


if __name__ == "__main__":
    measure(*sys.argv[1:])


class Experts(nn.Module):
    """Each token goes to one of two layers, by its sign."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 4)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for positive, expert in enumerate(self.experts):
            rows = ((tokens[:, 0] > 0) == bool(positive)).nonzero().flatten()
            if len(rows):
                out[rows] = torch.tanh(expert(tokens[rows]))
        return self.head(out.view_as(x).mean(dim=1))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tokens_that_are_routed_by_value_stay_with_their_examples(size):
    # the first examples leave the second expert alone; later its 12 tokens are 0, 0, 0, 0, 1, 3, 4, 4 of eight examples
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6)
    x[:, :, 0] = -x[:, :, 0].abs()
    for example, count in [(4, 1), (5, 3), (6, 4), (7, 4)]:
        x[example, :count, 0] *= -1
    model, options = Experts(), {"proj_dim": 64, "batch_size": size, "progress": False}
    truth = Projector(param_shapes(model), 64)(per_example_jacobian(model, x, logit(1), engine="loop", chunk_size=1))
    one_by_one = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(model(row[None])[0, 1], list(model.parameters()), materialize_grads=True)]) for row in x])
    assert_close(truth, Projector(param_shapes(model), 64)(one_by_one), rtol=1e-4, atol=1e-5)
    assert_close(tangent_features(model, x, logit(1), engine="loop", **options).Phi, truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError):
        tangent_features(model, x, logit(1), **options)


def test_labels_that_change_behind_their_numbers_are_noticed(tmp_path):
    model, data = digits_mlp(), load_data("digits", "train").subset(range(90))
    flipped, options = replace(data, y=(data.y + 1) % 10), {"proj_dim": 32, "batch_size": 32, "progress": False, "save_dir": tmp_path / "store"}
    kept = tangent_features(model, data, true_logit(), **options)
    assert torch.equal(tangent_features(model, data, true_logit(), **options).Phi, kept.Phi)
    for changed in (flipped, replace(data, x=2 * data.x - 1)):
        with pytest.raises(FeatureStoreMismatch, match="data of rows 0 to"):
            tangent_features(model, changed, true_logit(), **options)


def test_queries_of_another_model_are_refused_in_memory_too():
    model, data = digits_mlp(), load_data("digits", "train").subset(range(40))
    train = tangent_features(model, data, logit(3), proj_dim=32, progress=False)
    with pytest.raises(FeatureStoreMismatch, match="weights.selected"):
        tangent_features(digits_mlp(seed=1), data, logit(3), like=train, progress=False)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("proj_type", ["fold", "rademacher", "sjlt"])
def test_a_model_of_two_precisions(kind, proj_type):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8).to(kind), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(torch.relu(self.body(x.to(kind))).float())

    torch.manual_seed(0)
    model, x = Two(), torch.randn(7, 6)
    grads = [torch.cat([g.flatten().double() for g in torch.autograd.grad(model(row[None])[0, 1], list(model.parameters()))]) for row in x]
    truth = Projector(param_shapes(model), 32, proj_type)(torch.stack(grads)).float()
    for engine in ("hooks", "func"):
        features = tangent_features(model, x, logit(1), proj_dim=32, proj_type=proj_type, batch_size=3, engine=engine, progress=False)
        assert_close(features.Phi, truth, rtol=1e-4, atol=2e-2 if kind == torch.bfloat16 else 1e-5)


def test_a_pass_within_inference_mode():
    model, data = digits_mlp(), load_data("digits", "train").subset(range(40))
    run = lambda: tangent_features(model, data, logit(3), proj_dim=32, batch_size=16, progress=False).Phi
    with torch.inference_mode():
        within = run()
    assert torch.equal(within, run())


def test_examples_that_change_or_hold_lists_are_refused():
    class Cropped(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.rand(1, 8, 8), i % 10

    with pytest.raises(ValueError, match="random augmentation"):
        tangent_features(digits_mlp(), Cropped(), logit(3), progress=False)
    with pytest.raises(TypeError, match="a list in 'input_ids'"):
        tangent_features(digits_mlp(), [{"input_ids": [1, 2], "label": 1}] * 3, logit(3), progress=False)
    with pytest.raises(TypeError, match="nn.Module"):
        tangent_features(torch.relu, torch.zeros(3, 2), logit(0), progress=False)
