"""Many retrainings at once: drawn networks and masks against one training each, killed runs, caches, devices."""
import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from forks import forked
from infotda.core import expect_error
from infotda.data import Data
from infotda.models import MLP, Recipe, ResNet9, predict, train
from infotda.retrain import RetrainCacheMismatch, linear_stack, retrain, train_many

close = torch.testing.assert_close


def mixture(n, d, C, seed=0, dtype=torch.float64):
    "A few classes around random points."
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=gen)
    x = torch.randn(C, d, generator=gen)[y] + torch.randn(n, d, generator=gen)
    return Data(x.to(dtype), y, torch.arange(n), tuple(map(str, range(C))))


@st.composite
def cases(draw):
    "A network, a recipe, masks, seeds and an order."
    n, d, C = draw(st.integers(3, 40)), draw(st.integers(1, 6)), draw(st.integers(2, 4))
    widths = [d] + draw(st.lists(st.integers(1, 7), max_size=2)) + [C]
    model = MLP(widths, bias=draw(st.booleans()), seed=draw(st.integers(0, 99))).double()
    triangular = draw(st.booleans())
    recipe = Recipe(epochs=draw(st.integers(2, 3)), lr=draw(st.sampled_from([0.01, 0.1])), momentum=draw(st.sampled_from([0.0, 0.9])), weight_decay=draw(st.sampled_from([0.0, 0.01])),
                    batch_size=draw(st.integers(1, 50)), schedule="triangular" if triangular else "constant", peak_epoch=1)
    r = draw(st.integers(1, 5))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    masks = torch.rand(r, n, generator=gen) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    masks[:, draw(st.integers(0, n - 1))] = True
    return model, mixture(n, d, C), masks, recipe, draw(st.lists(st.integers(0, 3), min_size=r, max_size=r)), draw(st.sampled_from(["same", "own"])), draw(st.integers(1, 6))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_stack_is_its_models_one_by_one(case):
    model, data, masks, recipe, seeds, order, block = case
    before = copy.deepcopy(model.state_dict())
    many = train_many(model, data, masks, recipe, outputs=data, seeds=seeds, order=order, weights=True, block=block, progress=False)
    assert many.engine == "stacked" and linear_stack(model) is not None
    for j, (mask, seed) in enumerate(zip(masks, seeds)):
        single = copy.deepcopy(model)
        if order == "own":
            train(single, data.subset(mask), recipe, seed=seed, progress=False)
        else:
            retrain(single, data.x, data.y, mask, recipe, seed, order)
        close(many.outputs[j], predict(single, data), rtol=1e-7, atol=1e-9)
        for name, w in single.state_dict().items():
            close(many.weights[name][j], w, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items()), "the model that was passed in stays as it is"


@pytest.mark.parametrize("order", ["same", "own"])
def test_nothing_removed_is_the_full_training(order):
    data, recipe = mixture(50, 5, 3), Recipe(epochs=3, batch_size=16)
    full = MLP([5, 8, 3]).double()
    train(full, data, recipe, seed=2, progress=False)
    many = train_many(MLP([5, 8, 3]).double(), data, torch.ones(1, 50, dtype=torch.bool), recipe, outputs=data.x, seeds=2, order=order, progress=False)
    close(many.outputs[0], predict(full, data.x), rtol=1e-9, atol=1e-11)


def test_a_removed_example_leaves_no_trace():
    data, mask = mixture(40, 5, 3), torch.arange(40) != 7
    x = data.x.clone()
    x[7] = 1e6
    spoilt = replace(data, x=x)
    runs = [train_many(MLP([5, 8, 3]).double(), d, mask[None], Recipe(epochs=3, batch_size=16), outputs=data.x[:4], progress=False).outputs for d in (data, spoilt)]
    assert torch.equal(*runs)


def test_dropout_and_augmentation_are_the_same_in_both_trainings():
    gen = torch.Generator().manual_seed(0)
    data = Data(torch.rand(20, 1, 8, 8, generator=gen), torch.arange(20) % 3, torch.arange(20), tuple("abc"))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))
    recipe = Recipe(epochs=2, lr=0.1, batch_size=8, augment="flip_crop")
    mask = torch.arange(20) < 15
    state = torch.random.get_rng_state()
    many = train_many(model, data, mask[None], recipe, outputs=data, order="own", seeds=3, progress=False)
    assert many.engine == "one by one" and torch.equal(torch.random.get_rng_state(), state)
    single = copy.deepcopy(model)
    train(single, data.subset(mask), recipe, seed=3, progress=False)
    assert torch.equal(many.outputs[0], predict(single, data))


def test_batch_statistics_are_kept_with_the_weights():
    gen = torch.Generator().manual_seed(0)
    data = Data(torch.rand(24, 3, 32, 32, generator=gen), torch.arange(24) % 10, torch.arange(24), tuple("0123456789"))
    masks = torch.rand(2, 24, generator=gen) < 0.8
    many = train_many(ResNet9(), data, masks, Recipe(epochs=1, lr=0.01, batch_size=12, augment="flip_crop"), outputs=data.x[:3], weights=True, progress=False)
    assert many.engine == "one by one" and "brick1.norm.running_mean" in many.weights
    close(predict(many.load(1, ResNet9()), data.x[:3]), many.outputs[1])


# ---- the cache --------------------------------------------------------------------------------------
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_retrain import killed_job
def work(path, kill_after=None):
    killed_job(path)
"""


def killed_job(path=None):
    "A run of a tenth of a second or so, in twenty blocks."
    gen = torch.Generator().manual_seed(5)
    data, masks = mixture(40, 6, 3), torch.rand(40, 40, generator=gen) < 0.9
    return train_many(MLP([6, 8, 3]).double(), data, masks, Recipe(epochs=2, batch_size=16), outputs=data.x[:5], seeds=[0, 1] * 20, cache=path, block=2, progress=False)


def test_twenty_kills_lose_at_most_a_block_each(tmp_path):
    straight, rng, kills, longest, folders, continued = killed_job(), random.Random(0), 0, 0.05, 0, 0
    with forked(SERVER) as order:
        while kills < 20:
            path, done = tmp_path / str(folders), 0
            while True:
                code, _ = order(path=path, **({"kill_after": rng.uniform(0, longest)} if kills < 20 else {}))
                assert code in (0, -9)
                kills += code == -9
                longest *= 1.02
                blocks = len(list(path.glob("block-*.safetensors"))) if path.exists() else 0
                assert blocks >= done, "a finished block is never lost"
                continued += 0 < done < 20
                done = blocks
                if code == 0:
                    break
            again = killed_job(path)
            assert done == 20 and again.reused == 40 and torch.equal(again.outputs, straight.outputs)
            folders += 1
    assert continued > 0, "no run was interrupted in the middle: the test has lost its point"


def test_a_cache_knows_its_experiment(tmp_path):
    data = mixture(30, 4, 3)
    job = dict(model=MLP([4, 5, 3]), data=data, masks=[[0, 1, 2], [5, 6]], recipe=Recipe(epochs=2), outputs=data.x[:2], seeds=[0, 1], cache=tmp_path, progress=False)
    first = train_many(**job)
    assert first.reused == 0 and train_many(**job).reused == 2
    assert train_many(**job | {"masks": [[5, 6]], "seeds": 1}).reused == 1
    assert train_many(**job | {"masks": [[5, 6]], "seeds": 0}).reused == 0
    changed = replace(data, y=data.y.roll(1))
    for change, word in [({"seeds": 2}, "seed 2"), ({"recipe": Recipe(epochs=3)}, "recipe.epochs"), ({"data": changed}, "data"), ({"outputs": data.x[:3]}, "outputs"),
                         ({"model": MLP([4, 5, 3], seed=1)}, "start"), ({"weights": True}, "weights"), ({"order": "own"}, "order")]:
        expect_error(RetrainCacheMismatch, lambda change=change: train_many(**job | change), word)
    block = next(tmp_path.glob("block-*"))
    content = block.read_bytes()
    block.write_bytes(content[: len(content) // 2])
    expect_error(ValueError, lambda: train_many(**job), "delete this file")
    block.unlink()
    assert torch.equal(train_many(**job).outputs, first.outputs)


@pytest.mark.gpu
def test_gpu_trains_what_the_cpu_trains():
    data = mixture(300, 20, 4)
    masks = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    for order in ("same", "own"):
        runs = [train_many(MLP([20, 16, 4], bias=True).double(), data, masks, Recipe(epochs=5), outputs=data, order=order, device=device, progress=False) for device in ("cpu", "cuda")]
        close(runs[1].outputs, runs[0].outputs, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
def test_mixed_precision_learns_what_full_precision_learns():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 4
    x = torch.rand(4, 3, 32, 32, generator=gen)[y] + 0.3 * torch.rand(256, 3, 32, 32, generator=gen)
    data = Data(x / 1.3, y, torch.arange(256), tuple("0123"))
    masks = torch.rand(2, 256, generator=gen) < 0.9
    runs = [train_many(ResNet9(classes=4), data, masks, Recipe(epochs=4, lr=0.1, batch_size=64), outputs=data, amp=amp, device="cuda", progress=False).outputs for amp in (False, True)]
    for logits in runs:
        assert (logits.argmax(dim=2) == y).double().mean() > 0.95


def test_a_cache_knows_the_architecture(tmp_path):
    data, recipe = mixture(20, 4, 3), Recipe(epochs=2, batch_size=10)
    masks, nets = torch.ones(1, 20, dtype=torch.bool), []
    for activation in (nn.ReLU, nn.Tanh):  # the same weights at the start
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double())
    train_many(nets[0], data, masks, recipe, outputs=data.x, cache=tmp_path, progress=False)
    with pytest.raises(RetrainCacheMismatch, match="module"):
        train_many(nets[1], data, masks, recipe, outputs=data.x, cache=tmp_path, progress=False)
