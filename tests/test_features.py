"""Sketches and feature passes: what must not depend on batch, block, process, device or company."""
import hashlib
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset, TensorDataset

from infotda.core import check_comparable_features
from infotda.features import tangent_features
from infotda.outputs import Output, logit, true_logit
from infotda.philox import normal_entry, philox4x32, rademacher_entry
from infotda.sketch import Projector, add_normal, add_rademacher

TYPES = ["fold", "rademacher", "normal"]
SHAPES = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "head.weight": (40, 50), "scale": ()}


def gradients(b=9, dtype=torch.float64, seed=0, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(b, *shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def flatten(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], dim=1)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5)).eval()


def examples(n=23, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, generator=g), torch.randint(0, 5, (n,), generator=g)


# ---- the projector ----------------------------------------------------------------------------------

@pytest.mark.parametrize("m", [1, 7, 16, 100, 512])
@pytest.mark.parametrize("proj_type", TYPES)
def test_equals_dense_oracle(proj_type, m):
    projector, grads = Projector(SHAPES, m, proj_type, proj_seed=2**63 + 5), gradients()
    assert_close(projector(grads), flatten(grads) @ projector.dense().T)


@pytest.mark.parametrize("proj_type", TYPES)
def test_dict_and_matrix_agree(proj_type):
    projector, grads = Projector(SHAPES, 64, proj_type), gradients()
    assert_close(projector(flatten(grads)), projector(grads))
    assert_close(projector(dict(reversed(grads.items()))), projector(grads), rtol=0, atol=0)


@pytest.mark.parametrize("proj_type", TYPES)
def test_batches_agree(proj_type):
    projector, grads = Projector(SHAPES, 64, proj_type), gradients()
    whole = projector(grads)
    for sizes in ([1] * 9, [2, 7], [5, 4]):
        parts = zip(*[g.split(sizes) for g in grads.values()])
        rows = torch.cat([projector(dict(zip(grads, part))) for part in parts])
        assert_close(rows, whole)
        assert proj_type != "fold" or torch.equal(rows, whole)


@pytest.mark.parametrize("add, entry", [(add_rademacher, rademacher_entry), (add_normal, normal_entry)])
@pytest.mark.parametrize("width", [256, 512, 1024, None])
def test_blocks_agree(add, entry, width):
    G = torch.randn(4, 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(4, 33, dtype=torch.float64)
    add(out, G, None, 77, 5, width)
    assert_close(out, G @ entry(torch.arange(33)[:, None], torch.arange(1500), 77, 5).T)


@pytest.mark.parametrize("proj_type", TYPES)
def test_subset_of_parameters(proj_type):
    grads = gradients()
    first, second = {k: SHAPES[k] for k in list(SHAPES)[:2]}, {k: SHAPES[k] for k in list(SHAPES)[2:]}
    share = [Projector(part, 64, proj_type)({k: grads[k] for k in part}) for part in (first, second)]
    assert_close(share[0] + share[1], Projector(SHAPES, 64, proj_type)(grads))


@pytest.mark.parametrize("proj_type", TYPES)
def test_seed_and_name_matter(proj_type):
    grads = gradients(shapes={"a": (20, 30)})
    base = Projector({"a": (20, 30)}, 64, proj_type)(grads)
    assert not torch.allclose(base, Projector({"a": (20, 30)}, 64, proj_type, 1)(grads))
    assert not torch.allclose(base, Projector({"b": (20, 30)}, 64, proj_type)({"b": grads["a"]}))


@pytest.mark.parametrize("proj_type", TYPES)
def test_precision(proj_type):
    projector, grads = Projector(SHAPES, 64, proj_type), gradients()
    exact = projector(grads)
    for dtype, tol in [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)]:
        rows = projector({k: g.to(dtype) for k, g in grads.items()})
        assert rows.dtype == torch.float32
        assert (rows - exact).abs().max() < tol * exact.abs().max()


@pytest.mark.parametrize("proj_type", TYPES)
def test_unbiased(proj_type):
    """The mean over seeds is the inner product, and the variance is that of the formula, within 5 standard errors."""
    shapes, seeds, m = {"w": (8, 6), "v": (5,)}, 1500, 16
    grads = gradients(2, shapes=shapes)
    x, y = flatten(grads)
    rows = torch.stack([Projector(shapes, m, proj_type, seed)(grads) for seed in range(seeds)])
    inner = (rows[:, 0] * rows[:, 1]).sum(dim=1)
    assert abs(inner.mean() - x @ y) < 5 * inner.std() / seeds**0.5
    if proj_type != "fold":
        spikes = 2 * (x**2 * y**2).sum() if proj_type == "rademacher" else 0.0
        square = (inner - x @ y) ** 2
        theory = ((x @ x) * (y @ y) + (x @ y) ** 2 - spikes) / m
        assert abs(square.mean() - theory) < 5 * square.std() / seeds**0.5


SCRIPT = """
import hashlib, torch
from infotda.sketch import Projector
shapes = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "head.weight": (40, 50), "scale": ()}
x = torch.arange(3 * 2169, dtype=torch.float64).view(3, 2169) % 17 - 8
for proj_type in ["fold", "rademacher"]:
    print(hashlib.sha256(Projector(shapes, 100, proj_type, 3)(x).numpy().tobytes()).hexdigest())
"""


def test_same_in_another_process():
    """A new process, with another hash seed and one thread, makes the same bits (whole numbers add up exactly)."""
    x = torch.arange(3 * 2169, dtype=torch.float64).view(3, 2169) % 17 - 8
    here = [hashlib.sha256(Projector(SHAPES, 100, t, 3)(x).numpy().tobytes()).hexdigest() for t in ["fold", "rademacher"]]
    env = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert there.stdout.split() == here


# what this version gives; a change here makes every stored sketch unreadable
FROZEN = {
    "fold": "96cef539e74fbb31",
    "rademacher": "6ea9b0b6fe0983ea",
}


@pytest.mark.parametrize("proj_type", list(FROZEN))
def test_frozen(proj_type):
    x = torch.arange(3 * 2169, dtype=torch.float64).view(3, 2169) % 17 - 8
    rows = Projector(SHAPES, 100, proj_type, 3)(x) / Projector(SHAPES, 100, proj_type, 3).scale
    assert hashlib.sha256(rows.round().to(torch.int64).numpy().tobytes()).hexdigest()[:16] == FROZEN[proj_type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("proj_type", TYPES + ["identity"])
def test_not_finite(proj_type, value):
    p = sum(torch.Size(s).numel() for s in SHAPES.values())
    projector, grads = Projector(SHAPES, p if proj_type == "identity" else 64, proj_type), gradients()
    grads["conv.bias"][4, 2] = value
    with pytest.raises(ValueError, match=r"example 4.*conv\.bias"):
        projector(grads)


# ---- the feature pass -------------------------------------------------------------------------------

@pytest.mark.parametrize("proj_type", TYPES)
def test_features_equal_autograd(proj_type):
    model, (x, y) = net(), examples()
    features = tangent_features(model, (x, y), true_logit(), proj_dim=128, proj_type=proj_type, progress=False)
    names = [name for name, _ in model.named_parameters()]
    rows = []
    for xi, yi in zip(x, y):
        grads = torch.autograd.grad(model(xi[None])[0, yi], list(model.parameters()))
        rows.append(features.projector({name: g[None] for name, g in zip(names, grads)}))
    assert_close(features.Phi, torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batch_or_form():
    model, (x, y) = net(), examples()
    whole = tangent_features(model, (x, y), logit(2), proj_dim=128, progress=False)
    for size in (1, 2, 5, 23, 100):
        other = tangent_features(model, (x, y), logit(2), proj_dim=128, batch_size=size, progress=False)
        assert_close(other.Phi, whole.Phi, rtol=1e-4, atol=1e-4)
        assert_close(other.residual, whole.residual, rtol=1e-4, atol=1e-6)
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=4), list(zip(x, y))):
        other = tangent_features(model, data, logit(2), proj_dim=128, progress=False)
        assert_close(other.Phi, whole.Phi, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.labels, y)


class OnDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, tokens, mask):
        return self.head((self.embed(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_dict_batches_with_padding():
    torch.manual_seed(0)
    model = OnDict().eval()
    texts = [torch.randint(0, 11, (int(length),)) for length in torch.randint(1, 6, (9,))]

    def collate(items):
        width = max(len(t) for t, _ in items)
        tokens = torch.stack([nn.functional.pad(t, (0, width - len(t))) for t, _ in items])
        mask = torch.stack([nn.functional.pad(torch.ones(len(t)), (0, width - len(t))) for t, _ in items])
        return {"tokens": tokens, "mask": mask, "labels": torch.tensor([y for _, y in items])}

    pairs = [(t, i % 3) for i, t in enumerate(texts)]
    loader = DataLoader(pairs, batch_size=4, collate_fn=collate)
    features = tangent_features(model, loader, true_logit(), proj_dim=32, batch_size=3, progress=False)
    one = tangent_features(model, loader, true_logit(), proj_dim=32, batch_size=1, progress=False)
    assert_close(features.Phi, one.Phi, rtol=1e-4, atol=1e-5)
    assert features.labels.tolist() == [i % 3 for i in range(9)]


def test_model_is_left_as_it_was():
    model, (x, y) = net(), examples()
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features = tangent_features(model, (x, y), logit(0), proj_dim=16, progress=False)
    assert "0.weight" not in features.params and not model[0].weight.requires_grad
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_like_and_subset():
    model, (x, y) = net(), examples()
    train = tangent_features(model, (x, y), logit(1), proj_dim=64, params=["4.*", "7.*"], ntk={"7.weight": 0.5}, progress=False)
    query = tangent_features(model, x[[3, 8]], logit(1), like=train, progress=False)
    assert_close(query.Phi, train.subset([3, 8]).Phi, rtol=1e-4, atol=1e-5)
    assert query.params == train.params and query.ntk == train.ntk
    assert train.subset([8, 3]).labels.tolist() == [y[8].item(), y[3].item()]


def class_logit(logits, batch, c):
    return logits[:, c]


class OneClass:
    def __init__(self, c):
        self.c = c

    def __call__(self, logits, batch):
        return logits[:, self.c]


@pytest.mark.parametrize("make", [lambda c: lambda logits, batch: logits[:, c], lambda c: partial(class_logit, c=c), OneClass])
def test_unnamed_functions_are_told_apart(make):
    model, (x, y) = net(), examples()
    here, there = make(1), make(2)
    train = tangent_features(model, (x, y), here, proj_dim=32, progress=False)
    query = tangent_features(model, x[:2], here, like=train, progress=False)
    check_comparable_features(train, query)
    with pytest.raises(ValueError, match=r'Output\("name", fn\)'):
        tangent_features(model, x[:2], there, like=train, progress=False)
    other = tangent_features(model, x[:2], there, proj_dim=32, progress=False)
    with pytest.raises(ValueError, match=r'Output\("name", fn\)'):
        check_comparable_features(train, other)
    stored = pickle.loads(pickle.dumps(train))  # a lambda does not stand in the way, but is forgotten
    assert_close(stored.Phi, train.Phi)
    with pytest.raises(ValueError, match=r'Output\("name", fn\)'):
        tangent_features(model, x[:2], here, like=stored, progress=False)
    named = tangent_features(model, (x, y), Output("class 1", here), proj_dim=32, progress=False)
    check_comparable_features(pickle.loads(pickle.dumps(named)), tangent_features(model, x[:2], Output("class 1", make(1)), like=named, progress=False))


def test_features_of_different_settings_are_told_apart():
    model, (x, y) = net(), examples()
    options = dict(output=logit(1), proj_dim=32, progress=False)
    train = tangent_features(model, (x, y), **options)
    check_comparable_features(train, tangent_features(model, x[:2], **options))
    for change, word in [({"output": logit(2)}, "output"), ({"proj_dim": 33}, "proj_dim"), ({"proj_seed": 1}, "proj_seed"), ({"proj_type": "normal"}, "proj_type"), ({"params": "7.*"}, "shapes"), ({"ntk": {"7.weight": 0.5}}, "ntk")]:
        with pytest.raises(ValueError, match=word):
            check_comparable_features(train, tangent_features(model, x[:2], **{**options, **change}))


class Numbered(TensorDataset):
    index = torch.arange(100, 123)


@pytest.mark.parametrize("position", [2, 20])
def test_a_bad_example_is_named_by_position_and_stable_index(position):
    model, (x, y) = net(), examples()
    x[position] = float("nan")
    data = Numbered(x, y)
    with pytest.raises(ValueError, match=rf"example {position},.*stable index of example {position} is {100 + position}"):
        tangent_features(model, data, logit(0), proj_dim=16, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=rf"example 1,.*stable index of example 1 is {100 + position}"):
        tangent_features(model, Subset(data, [0, position]), logit(0), proj_dim=16, progress=False)


def test_constant_outputs_are_refused():
    model, (x, y) = net(), examples()
    with pytest.raises(ValueError, match="do not detach"):
        tangent_features(model, (x, y), lambda z, b: z.argmax(1).float(), proj_dim=16, progress=False)
    with pytest.raises(TypeError, match="the parameters' type"):
        tangent_features(model, x.double(), logit(0), proj_dim=16, progress=False)


class Shifted(nn.Module):
    "Each example gets the answer of its neighbour: a plain sum over the batch does not notice."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 5)

    def forward(self, x):
        return self.linear(x.flatten(1).roll(1, dims=0))


def test_self_check_catches_a_permutation():
    with pytest.raises(ValueError, match="mix the examples"):
        tangent_features(Shifted(), examples(), logit(1), proj_dim=64, progress=False)
    with pytest.raises(ValueError, match="mix the examples"):
        tangent_features(Shifted(), examples(), logit(1), proj_dim=64, batch_size=1, progress=False)


# ---- on a GPU ---------------------------------------------------------------------------------------

@pytest.mark.gpu
def test_philox_on_gpu():
    counter = torch.randint(0, 2**32, (4, 100_000), generator=torch.Generator().manual_seed(0))
    here, there = philox4x32(tuple(counter), 2**64 - 3), philox4x32(tuple(counter.cuda()), 2**64 - 3)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))


@pytest.mark.gpu
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("m", [100, 4096])
def test_sketch_on_gpu(proj_type, m):
    shapes = SHAPES | {"big": (300, 500)}
    projector, grads = Projector(shapes, m, proj_type), gradients(shapes=shapes)
    on_gpu = {k: g.cuda() for k, g in grads.items()}
    assert_close(projector(on_gpu).cpu(), projector(grads))
    single = projector({k: g.float() for k, g in on_gpu.items()})
    assert single.dtype == torch.float32 and single.is_cuda
    assert_close(single.cpu().double(), projector(grads), rtol=1e-3, atol=1e-2)
    if proj_type == "fold":
        assert torch.equal(projector(on_gpu).cpu(), projector(grads))


@pytest.mark.gpu
def test_features_on_gpu():
    model, (x, y) = net(), examples()
    torch.backends.cudnn.allow_tf32 = False
    here = tangent_features(model, (x, y), logit(2), proj_dim=128, device="cpu", progress=False)
    there = tangent_features(model, (x, y), logit(2), proj_dim=128, device="cuda", progress=False)
    assert next(model.parameters()).device.type == "cpu"
    assert there.Phi.device.type == "cpu"
    assert_close(there.Phi, here.Phi, rtol=1e-3, atol=1e-3)
    assert_close(there.residual, here.residual, rtol=1e-3, atol=1e-5)
