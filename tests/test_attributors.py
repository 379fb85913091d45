"""What every attribution method has to do, whatever it computes: one suite, all methods."""
import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from infotda.data import load_data
from infotda.features import tangent_features
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.influence import EKFAC, GGNInfluence, RelatIF
from infotda.models import DIGITS_MEAN, DIGITS_STD, MLP, train
from infotda.onepass import SingletonInfoLoss, TopCovariance
from infotda.outputs import margin
from infotda.similarity import BM25, GradCos, GradDot, RandomAttribution, RepSim
from infotda.store import FeatureStoreMismatch
from infotda.trak import TRAK, training_ridge

N, Q, K = 60, 7, 4
ROOT = Path(__file__).resolve().parent.parent
QUANDA = ROOT / "out" / "quanda"
WORDS = "cat dog mat sat stocks fell rose sharply today barked moon night river stone".split()


@pytest.fixture(scope="module")
def world():
    "A small trained model, its features, its data, and texts; `take(kind, part, rows)` gives the rows of one side."
    digits = load_data("digits").subset(range(N + Q))
    model = MLP([64, 12, 10], mean=DIGITS_MEAN, std=DIGITS_STD, seed=3)
    train(model, digits, epochs=8, lr=0.05, batch_size=16, progress=False)
    data = {"train": digits.subset(range(N)), "query": digits.subset(range(N, N + Q))}
    features = {"train": tangent_features(model, data["train"], margin(), proj_dim=32, progress=False)}
    features["query"] = tangent_features(model, data["query"], margin(), like=features["train"], progress=False)
    draw = torch.Generator().manual_seed(0)
    corpus = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=draw).tolist()) for _ in range(N + Q)]
    texts = {"train": corpus[:N], "query": corpus[N:]}

    def take(kind, part, rows):
        rows = list(rows)
        if kind == "texts":
            return [texts[part][i] for i in rows]
        return data[part].subset(sorted(set(rows))) if kind == "data" and rows == sorted(set(rows)) else (data[part].x[rows], data[part].y[rows]) if kind == "data" else rows_of(features[part], rows)

    return SimpleNamespace(model=model, data=data, features=features, take=take)


def rows_of(features, rows):
    "Features of some rows, repetitions allowed, which `subset` refuses."
    parts = [features.subset([i]) for i in rows]
    one = copy.copy(parts[0])
    for name in ("Phi", "residual", "labels", "index"):
        object.__setattr__(one, name, torch.cat([getattr(part, name) for part in parts]))
    return one


@dataclass
class Case:
    make: object                    # model -> a new method
    kind: str = "features"          # what it takes: "features", "data" or "texts"
    signed: bool = True             # whether scores have a sign
    by_row: bool = False            # scores belong to row numbers, not to examples
    draws: bool = False             # draws labels, in the order of the rows
    greedy: bool = False            # the first choice need not be the highest single score


CASES = {
    "InfoLoss": Case(lambda model: InfoLoss(), signed=False),
    "InfoGain": Case(lambda model: InfoGain(), signed=False),
    "ApproxInfoGain": Case(lambda model: ApproxInfoGain(), signed=False, greedy=True),
    "SingletonInfoLoss": Case(lambda model: SingletonInfoLoss(), signed=False),
    "TopCovariance": Case(lambda model: TopCovariance(), signed=False),
    "RandomAttribution": Case(lambda model: RandomAttribution(5), by_row=True),
    "RepSim": Case(lambda model: RepSim(model), "data"),
    "RepSim on features": Case(lambda model: RepSim()),
    "GradDot": Case(lambda model: GradDot()),
    "GradCos": Case(lambda model: GradCos()),
    "BM25": Case(lambda model: BM25(), "texts"),
    "TRAK": Case(lambda model: TRAK()),
    "TRAK, given ridge": Case(lambda model: TRAK(3.0)),
    "TRAK, weighted": Case(lambda model: TRAK(weighted=True)),
    "RelatIF theta": Case(lambda model: RelatIF("theta")),
    "RelatIF l": Case(lambda model: RelatIF("l")),
    "GGNInfluence": Case(lambda model: GGNInfluence(model, tolerance=0.0), "data"),
    "EKFAC": Case(lambda model: EKFAC(model), "data", draws=True),
}
every = pytest.mark.parametrize("name", CASES)
fits, known = {}, {}


def fitted(world, name, rows=range(N)):
    "A method fitted on some rows; fits are shared, nothing changes a fitted method."
    rows = tuple(rows)
    if (name, rows) not in fits:
        case = CASES[name]
        fits[name, rows] = case.make(world.model).fit(world.take(case.kind, "train", rows))
    return fits[name, rows]


def scores_of(world, name, rows=range(N), queries=range(Q)):
    "Scores of a shared fit, computed once."
    key = name, tuple(rows), tuple(queries)
    if key not in known:
        known[key] = fitted(world, name, rows).attribute(world.take(CASES[name].kind, "query", queries))
    return known[key]


def scale(scores):
    return scores.abs().max().item()


@every
def test_shapes_types_and_finite_numbers(world, name):
    scores = scores_of(world, name)
    assert scores.shape == (N, Q) and scores.dtype == torch.float64 and torch.isfinite(scores).all()
    assert CASES[name].signed or (scores >= 0).all()
    picked = fitted(world, name).select(world.take(CASES[name].kind, "query", range(Q)), K)
    assert picked.ranking.shape == picked.gains.shape == (Q, K)
    assert picked.ranking.dtype == torch.int64 and picked.gains.dtype == torch.float64
    assert picked.ranking.device.type == picked.gains.device.type == "cpu"


@every
def test_fit_returns_self_and_a_second_fit_gives_the_same(world, name):
    case = CASES[name]
    method = case.make(world.model)
    before = {key: value for key, value in vars(method).items()}
    assert method.fit(world.take(case.kind, "train", range(N))) is method
    assert all(vars(method)[key] is value for key, value in before.items())
    scores = method.attribute(world.take(case.kind, "query", range(Q)))
    assert_close(scores, scores_of(world, name), rtol=0, atol=0 if not case.draws else 1e-5 * scale(scores))


@every
def test_the_order_of_calls_does_not_matter(world, name):
    case = CASES[name]
    query = world.take(case.kind, "query", range(Q))
    first = fitted(world, name).attribute(query)
    fitted(world, name).select(query, K)
    assert_close(fitted(world, name).attribute(query), first, rtol=0, atol=0)


@every
def test_queries_one_batch_at_a_time(world, name):
    whole = scores_of(world, name)
    assert_close(scores_of(world, name, queries=range(3)), whole[:, :3], rtol=1e-4, atol=1e-5 * scale(whole))
    if not CASES[name].by_row:
        assert_close(scores_of(world, name, queries=range(3, Q)), whole[:, 3:], rtol=1e-4, atol=1e-5 * scale(whole))


@every
def test_batch_size_of_the_passes(world, name):
    case, whole = CASES[name], scores_of(world, name)
    if case.kind == "texts":
        pytest.skip("texts are not read in batches")
    if case.kind == "features":
        train = tangent_features(world.model, world.data["train"], margin(), like=world.features["train"], batch_size=11, progress=False)
        query = tangent_features(world.model, world.data["query"], margin(), like=train, batch_size=3, progress=False)
        scores = case.make(world.model).fit(train).attribute(query)
    else:
        method = copy.copy(fitted(world, name))
        method.batch_size = 5
        scores = method.attribute(world.data["query"])
    assert_close(scores, whole, rtol=1e-3, atol=1e-4 * scale(whole))


@every
def test_permuted_training_set(world, name):
    case = CASES[name]
    if case.by_row or case.draws:
        pytest.skip("scores belong to row numbers" if case.by_row else "labels are drawn in the order of the rows")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).tolist()
    whole = scores_of(world, name)
    assert_close(scores_of(world, name, order), whole[order], rtol=1e-3, atol=1e-4 * scale(whole))


@every
def test_copies_score_alike_and_the_first_is_chosen(world, name):
    case = CASES[name]
    if case.by_row:
        pytest.skip("scores belong to row numbers")
    copied = fitted(world, name, range(8)).select(world.take(case.kind, "query", range(Q)), 1).ranking[:, 0].mode().values.item()
    rows = [*range(8), copied, copied]
    scores = scores_of(world, name, rows)
    assert_close(scores[8], scores[copied], rtol=1e-4, atol=1e-6 * scale(scores))
    assert_close(scores[9], scores[copied], rtol=1e-4, atol=1e-6 * scale(scores))
    if case.kind == "data":
        return  # two rows of a batch may differ in the last bit of a product
    for line in fitted(world, name, rows).select(world.take(case.kind, "query", range(Q)), 10).ranking.tolist():
        assert line.index(copied) < line.index(8) < line.index(9)


@every
def test_candidates_restrict_the_choice(world, name):
    case, method = CASES[name], fitted(world, name)
    query = world.take(case.kind, "query", range(Q))
    mask = torch.arange(N) % 3 == 0
    assert (method.select(query, K, mask).ranking % 3 == 0).all()
    own = torch.stack([torch.arange(N) % 5 == j % 5 for j in range(Q)])
    assert (method.select(query, K, own).ranking % 5 == torch.arange(Q)[:, None] % 5).all()
    lists = [row.nonzero().flatten() for row in own]
    assert torch.equal(method.select(query, K, lists).ranking, method.select(query, K, own).ranking)
    with pytest.raises(ValueError, match="at least k="):
        method.select(query, K, torch.arange(N) < K - 1)
    with pytest.raises(ValueError, match="k"):
        method.select(query, 0)


@every
def test_the_first_choice_has_the_highest_score(world, name):
    if CASES[name].greedy:
        pytest.skip("chooses by another number than the one it reports")
    scores = scores_of(world, name)
    first = fitted(world, name).select(world.take(CASES[name].kind, "query", range(Q)), 1).ranking[:, 0]
    chosen = scores.gather(0, first[None])[0]
    assert_close(chosen, scores.max(dim=0).values, rtol=1e-9, atol=0)


@every
def test_an_example_supports_itself(world, name):
    case = CASES[name]
    if case.by_row or not case.signed:
        pytest.skip("scores have no sign, or none that means anything")
    own = fitted(world, name).attribute(world.take(case.kind, "train", range(10))).diagonal()
    assert (own > -1e-9).all() and (own > 0).sum() >= 9


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.signed and not case.by_row and case.kind == "data"] + ["GradDot", "TRAK, given ridge", "RelatIF l"])
def test_copies_with_the_wrong_label_oppose(world, name):
    "The same picture with another label pulls the margin down; RepSim looks at pictures only."
    if name == "RepSim":
        pytest.skip("does not look at labels")
    x, y = world.data["train"].x[:6], world.data["train"].y[:6]
    wrong = (torch.cat([world.data["train"].x, x]), torch.cat([world.data["train"].y, (y + 1) % 10]))
    case = CASES[name]
    if case.kind == "data":
        scores = case.make(world.model).fit(wrong).attribute((x, y))
    else:
        rows = tangent_features(world.model, wrong, margin(), like=world.features["train"], progress=False)
        scores = case.make(world.model).fit(rows).attribute(tangent_features(world.model, (x, y), margin(), like=world.features["train"], progress=False))
    own = scores[N:].diagonal()
    assert (own < 1e-9).all() and (own < 0).sum() >= 5


@every
def test_saved_features_and_copies_give_the_same(world, name, tmp_path):
    case, whole = CASES[name], scores_of(world, name)
    if case.kind == "features":
        for _ in range(2):  # the second call reads what the first one wrote
            train = tangent_features(world.model, world.data["train"], margin(), like=world.features["train"], save_dir=tmp_path / "train", progress=False)
        method = case.make(world.model).fit(train)
    elif name == "EKFAC":
        EKFAC(world.model, folder=tmp_path).fit(world.data["train"])
        method = EKFAC(world.model, folder=tmp_path).fit(world.data["train"])
        with pytest.raises(FeatureStoreMismatch, match="folder, seed"):
            EKFAC(world.model, seed=1, folder=tmp_path).fit(world.data["train"])
    else:
        method = copy.deepcopy(fitted(world, name))
    assert_close(method.attribute(world.take(case.kind, "query", range(Q))), whole, rtol=1e-4, atol=1e-6 * scale(whole))


@every
def test_refusals(world, name):
    case = CASES[name]
    with pytest.raises(ValueError, match="fitted"):
        case.make(world.model).select(world.take(case.kind, "query", range(Q)), K)
    if case.kind != "features" or case.by_row:
        return
    bad = copy.copy(world.features["train"])
    object.__setattr__(bad, "Phi", bad.Phi.clone().index_fill_(0, torch.tensor([3]), float("nan")))
    with pytest.raises(ValueError, match="first \\[3\\]"):
        case.make(world.model).fit(bad)
    with pytest.raises(ValueError, match="columns"):
        fitted(world, name).attribute(world.features["query"].Phi[:, :5])


def test_ensembles_of_equal_checkpoints_are_one(world):
    train, query = world.features["train"], world.features["query"]
    assert_close(TRAK(3.0).fit([train, train]).attribute([query, query]), TRAK(3.0).fit(train).attribute(query))


def test_training_ridge_grows_with_decay_and_falls_with_time():
    from dataclasses import replace

    from infotda.models import DIGITS_RECIPE
    base = training_ridge(DIGITS_RECIPE, 1000)
    assert training_ridge(replace(DIGITS_RECIPE, weight_decay=0.01), 1000) == pytest.approx(base + 1000 * 0.009)
    assert training_ridge(replace(DIGITS_RECIPE, epochs=60), 1000) < base


def test_missing_packages_are_named(monkeypatch):
    for module, make in (("bm25s", lambda: BM25().fit(["a text"])), ("kronfluence", lambda: EKFAC(MLP([64, 10]).eval()).fit(load_data("digits").subset([0, 1])))):
        for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=re.escape("pip install 'infotda[baselines]'")):
            make()


def test_quanda_runs_its_metrics_on_our_explainers():
    "In a process of its own, where the packages that quanda wants come first."
    if not QUANDA.exists():
        pytest.skip("there is no folder out/quanda; `make test` fills it, or `make out/quanda/ready`")
    assert (QUANDA / "ready").exists(), f"{QUANDA} was begun and not finished: `make out/quanda/ready` repeats it"
    path = os.pathsep.join(filter(None, [str(QUANDA / "site"), os.environ.get("PYTHONPATH")]))
    run = subprocess.run([sys.executable, "-W", "ignore", ROOT / "tests" / "with_quanda.py"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"quanda in {QUANDA} does not run (remove the folder, and `make out/quanda/ready`):\n{run.stderr[-3000:]}"
    found = json.loads(run.stdout)
    assert Path(found["quanda"]).is_relative_to(QUANDA)
    assert set(found["numbers"]) == {"LDS", "class detection", "cardinality", "mislabelling", "similarity"}
    for name, (theirs, ours) in found["numbers"].items():
        assert theirs == pytest.approx(ours, abs=1e-5), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "features"])
def test_gpu_gives_the_same(world, name):
    case, whole = CASES[name], scores_of(world, name)
    method = case.make(world.model).fit(world.features["train"].to("cuda"))
    scores = method.attribute(world.features["query"].to("cuda"))
    assert_close(scores.cpu(), whole, rtol=1e-3, atol=1e-4 * scale(whole))
    picked = method.select(world.features["query"].to("cuda"), K)
    assert torch.equal(picked.ranking, fitted(world, name).select(world.features["query"], K).ranking)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["RepSim", "GGNInfluence"])
def test_gpu_models_give_the_same(world, name):
    case, whole = CASES[name], scores_of(world, name)
    scores = case.make(copy.deepcopy(world.model).to("cuda")).fit(world.data["train"]).attribute(world.data["query"])
    assert_close(scores.cpu(), whole, rtol=1e-3, atol=1e-3 * scale(whole))
