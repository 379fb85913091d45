"""Data sets and training: what needs files, a GPU, or a fresh process, and so cannot be told in notebook cells."""
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import infotda.data as data_module
from infotda.data import LAYOUTS, ROWS, MissingData, flip_labels, has_data, load_data, load_torchvision
from infotda.models import CIFAR10_RECIPE, DIGITS_RECIPE, FASHION_MNIST_RECIPE, ResNet9, accuracy, digits_mlp, paper_mlp, predict, train


def need(name):
    if not has_data(name):
        pytest.skip(f"the files of {name} are not below the data root (INFOTDA_DATA)")


def weights(model):
    return torch.cat([v.detach().flatten().float().cpu() for v in model.state_dict().values()])


def python(code):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# data


def test_import_is_cheap_and_needs_no_torchvision():
    code = "import sys, infotda, infotda.data, infotda.models; print('torchvision' in sys.modules)"
    assert python(code) == "False"


def test_torchvision_imports_in_a_fresh_process():
    code = "from infotda.data import load_torchvision as l; import torch; tv = l(); print(tv.models.resnet18()(torch.rand(1, 3, 64, 64)).shape[1])"
    assert python(code) == "1000"


@pytest.mark.parametrize("name, split", [(n, s) for n in ROWS for s in ROWS[n]])
def test_published_rows_labels_and_index(name, split):
    need(name)
    rows = load_data(name, split)
    assert len(rows) == ROWS[name][split] and rows.name == name and rows.split == split
    assert set(rows.y.tolist()) == set(range(len(rows.classes)))
    if name == "digits":
        assert rows.index.unique().numel() == len(rows) and rows.index.max() < 1797
    else:
        assert rows.index.tolist() == list(range(len(rows)))
    if name != "rte":
        assert rows.x.dtype == torch.float32 and rows.x.min() >= 0 and 0.9 < rows.x.max() <= 1
        assert rows.x.shape[1:] == {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}[name]


def test_fashion_mnist_equals_torchvision():
    need("fashion_mnist")
    theirs = load_torchvision().datasets.FashionMNIST(data_module.data_root(), train=False)
    ours = load_data("fashion_mnist", "test")
    assert torch.equal((ours.x[:, 0] * 255).round().to(torch.uint8), theirs.data)
    assert torch.equal(ours.y, theirs.targets) and list(ours.classes) == theirs.classes


def test_rte_is_read_whole():
    need("rte")
    rte = load_data("rte", "dev")
    assert all(s.strip() for s in rte.sentence1 + rte.sentence2) and not any("\t" in s for s in rte.sentence1 + rte.sentence2)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """The original layout in miniature: torchvision's own names, with the MD5 sums of these files."""
    rng, datasets = np.random.RandomState(0), load_torchvision().datasets
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, md5 = [], {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels.append(rng.randint(0, 256, (10, 3 * 32 * 32), dtype=np.uint8))
        (folder / name).write_bytes(pickle.dumps({"data": pixels[-1], "labels": list(range(10))}))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    for file in folder.iterdir():
        md5[file.name] = datasets.utils.calculate_md5(file)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setitem(ROWS, "cifar10", {"train": 50, "test": 10})
    return tmp_path, np.concatenate(pixels).reshape(-1, 3, 32, 32)


def test_original_cifar10(small_cifar):
    root, pixels = small_cifar
    train_set, test_set = load_data("cifar10", root=root), load_data("cifar10", "test", root=root)
    assert_close(torch.cat([train_set.x, test_set.x]) * 255, torch.tensor(pixels).float())
    assert train_set.y.tolist() == list(range(10)) * 5 and train_set.source == "torchvision"


def test_changed_cifar10_is_not_unpickled(small_cifar):
    root, _ = small_cifar
    with open(root / "cifar-10-batches-py/data_batch_3", "ab") as file:
        file.write(b".")
    with pytest.raises(ValueError, match="MD5"):
        load_data("cifar10", root=root)
    (root / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(MissingData, match="only .*data_batch_1"):
        load_data("cifar10", root=root)


def test_parquet_cifar10(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    monkeypatch.setitem(ROWS, "cifar10", {"train": 6, "test": 6})
    pixels = np.random.RandomState(0).randint(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    encoded = []
    for p in pixels:
        buffer = io.BytesIO()
        Image.fromarray(p).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": ""})
    for split, layout in [("train", "parquet"), ("test", "hub")]:
        path = tmp_path / LAYOUTS["cifar10"][layout][split][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"img": encoded, "label": [3, 1, 4, 1, 5, 9]}), path)
        found = load_data("cifar10", split, root=tmp_path)
        assert_close(found.x * 255, torch.tensor(pixels).permute(0, 3, 1, 2).float())
        assert found.y.tolist() == [3, 1, 4, 1, 5, 9] and found.source == layout
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        load_data("cifar10", "test", root=tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match="columns img, label"):
        load_data("cifar10", "test", root=tmp_path)


def test_damaged_pictures_of_parquet_cifar10(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    def png(size, colours=True):
        buffer = io.BytesIO()
        pixels = np.random.RandomState(0).randint(0, 256 if colours else 1, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": ""}

    monkeypatch.setitem(ROWS, "cifar10", {"train": 3, "test": 3})
    path = tmp_path / LAYOUTS["cifar10"]["parquet"]["test"][0]
    path.parent.mkdir(parents=True)
    good = png((32, 32))
    for image, label, message in [
        (png((1, 1)), 1, "row 2.*32x32"), (png((28, 28)), 1, "row 2.*32x32"), (png((32, 32), False), 1, "single value.*row 2"),
        ({"bytes": good["bytes"][:-60], "path": ""}, 1, "row 2.*encoded picture"), ({"bytes": b"junk", "path": ""}, 1, "row 2.*encoded picture"),
        ({"bytes": None, "path": ""}, 1, "row 2"), (None, 1, "row 2"), (good, 10, "10 in row 2"), (good, None, "labels in .*test.parquet"),
    ]:
        pq.write_table(pa.table({"img": [good, good, image], "label": [0, 1, label]}), path)
        with pytest.raises(ValueError, match=message):
            load_data("cifar10", "test", root=tmp_path)


def test_damaged_fashion_mnist(tmp_path, monkeypatch):
    def write(file, array):
        (tmp_path / file).write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())

    monkeypatch.setitem(ROWS, "fashion_mnist", {"train": 20, "test": 20})
    images, labels = LAYOUTS["fashion_mnist"]["torchvision"]["test"]
    (tmp_path / images).parent.mkdir(parents=True)
    x, y = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8), (np.arange(20) % 10).astype(np.uint8)
    write(images, x)
    write(labels, y)
    assert load_data("fashion_mnist", "test", root=tmp_path).y.tolist() == y.tolist()
    for bad_x, bad_y, message in [(y, y, "images.*28, 28"), (x.reshape(20, 14, 56), y, "14, 56"), (0 * x, y, "single value"), (x, x, "labels"), (x, 0 * y, "every row"), (x, y + 1, "10 in row 9")]:
        write(images, bad_x)
        write(labels, bad_y)
        with pytest.raises(ValueError, match=message):
            load_data("fashion_mnist", "test", root=tmp_path)


def test_truncated_fashion_mnist(tmp_path):
    need("fashion_mnist")
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in LAYOUTS["fashion_mnist"]["torchvision"]["test"]:
        content = (data_module.data_root() / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="7840016 bytes.*3920008"):
        load_data("fashion_mnist", "test", root=tmp_path)


def test_label_noise_is_the_same_everywhere():
    noisy, wrong = flip_labels(load_data("digits"), 0.1, seed=0)
    assert wrong.nonzero().flatten()[:5].tolist() == [1, 5, 14, 18, 31]
    assert noisy.y[wrong][:5].tolist() == [3, 4, 9, 2, 2]


# training


def test_two_trainings_are_equal_bit_for_bit():
    first, second = digits_mlp(), digits_mlp()
    logs = [train(m, load_data("digits"), DIGITS_RECIPE, epochs=5, progress=False) for m in (first, second)]
    assert torch.equal(weights(first), weights(second)) and logs[0].loss == logs[1].loss


def test_training_in_another_process_is_equal():
    code = (
        "from infotda.data import load_data; from infotda.models import DIGITS_RECIPE, digits_mlp, train\n"
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); m = digits_mlp()\n"
        "train(m, load_data('digits'), DIGITS_RECIPE, epochs=2, progress=False); print(m.linear1.weight.tolist())"
    )
    model = digits_mlp()
    train(model, load_data("digits"), DIGITS_RECIPE, epochs=2, progress=False)
    assert python(code) == str(model.linear1.weight.tolist())


def test_resnet9_learns_and_repeats():
    x = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    y = torch.arange(24) % 2
    x[y == 1] += 0.6
    recipe = dict(recipe=CIFAR10_RECIPE, epochs=4, lr=0.1, peak_epoch=1, batch_size=8, progress=False)
    first, second = ResNet9(2), ResNet9(2)
    train(first, (x, y), **recipe)
    train(second, (x, y), **recipe)
    assert torch.equal(weights(first), weights(second)) and accuracy(first, (x, y)) == 1.0
    assert_close(predict(first, x, batch_size=5), predict(first, x), rtol=1e-4, atol=1e-5)


def test_failed_training_of_resnet9_changes_nothing():
    data = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    model = ResNet9().train()
    model.brick1.norm.eval()
    before, modes = weights(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="diverged"):
        train(model, data, CIFAR10_RECIPE, schedule="constant", epochs=3, lr=1e30, batch_size=8, progress=False)
    assert torch.equal(weights(model), before) and [m.training for m in model.modules()] == modes
    predict(model, data[0])
    assert torch.equal(weights(model), before) and [m.training for m in model.modules()] == modes
    train(model, (data[0][:9], data[1][:9]), epochs=1, batch_size=8, progress=False)  # one 32x32 picture is enough for its norms
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, "8", None])
def test_batch_sizes_that_are_none(batch_size):
    digits = load_data("digits").subset([0, 1, 2])
    for call in (predict, accuracy):
        with pytest.raises(ValueError, match="batch_size"):
            call(digits_mlp(), digits, batch_size=batch_size)
    with pytest.raises((ValueError, TypeError), match="batch_size"):
        train(digits_mlp(), digits, batch_size=batch_size, progress=False)


def test_digits_accuracy():
    model = digits_mlp()
    train(model, load_data("digits"), DIGITS_RECIPE, progress=False)
    assert accuracy(model, load_data("digits", "test")) >= 0.96


def test_fashion_mnist_accuracy_of_the_recipe():
    need("fashion_mnist")
    model = paper_mlp()
    train(model, load_data("fashion_mnist").sample(15_000, seed=0), FASHION_MNIST_RECIPE, progress=False)
    reached = accuracy(model, load_data("fashion_mnist", "test"))
    print(f"Fashion-MNIST test accuracy: {100 * reached:.2f} %")
    assert reached >= 0.86


@pytest.mark.gpu
def test_cuda_reaches_the_accuracy_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    digits, digits_test = load_data("digits"), load_data("digits", "test")
    models = {}
    for run, device in [("cpu", "cpu"), ("cuda", "cuda"), ("again", "cuda")]:
        models[run] = digits_mlp()
        state = torch.cuda.get_rng_state()
        train(models[run], digits, DIGITS_RECIPE, device=device, progress=False)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert next(models[run].parameters()).device.type == device
    assert abs(accuracy(models["cpu"], digits_test) - accuracy(models["cuda"], digits_test)) <= 0.015
    assert torch.equal(weights(models["cuda"]), weights(models["again"]))


@pytest.mark.gpu
def test_cuda_resnet9_repeats():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = (x, torch.arange(256) % 10)
    runs = [ResNet9(), ResNet9()]
    for model in runs:
        train(model, data, CIFAR10_RECIPE, epochs=2, peak_epoch=1, batch_size=64, device="cuda", progress=False)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert predict(runs[0], x).device.type == "cpu"
