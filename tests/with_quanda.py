"""Runs quanda's own metrics on our explainers and prints both numbers of each as JSON: test_attributors.py starts it with quanda on PYTHONPATH.

quanda 0.5 wants captum below 0.9, and that one numpy below 2, so pip cannot put it beside the versions that this package is tested with. It runs with them, though:
`make out/quanda/ready` fills a folder of its own with quanda and what it imports, see quanda.txt.
"""
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from infotda.adapters import FromData, from_quanda, to_quanda
from infotda.data import load_data, load_torchvision
from infotda.evaluate import LDSTruth, found_curve, lds, margins, random_subsets
from infotda.models import DIGITS_MEAN, DIGITS_STD, MLP, Recipe, train
from infotda.retrain import train_many
from infotda.similarity import RepSim
from infotda.trak import TRAK

load_torchvision()  # so that lightning, which looks for it, finds one that works

import quanda  # noqa: E402
from quanda.explainers.wrappers import CaptumSimilarity  # noqa: E402
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric  # noqa: E402
from quanda.metrics.ground_truth import LinearDatamodelingMetric  # noqa: E402
from quanda.metrics.heuristics import TopKCardinalityMetric  # noqa: E402

N, Q, K, M = 120, 9, 5, 12
DIGITS = dict(mean=DIGITS_MEAN, std=DIGITS_STD)


def both_numbers(folder: Path) -> dict[str, tuple[float, float]]:
    "name -> what quanda finds, what we find."
    data, query = load_data("digits").subset(range(N)), load_data("digits", "test").subset(range(Q))
    recipe = Recipe(epochs=10, lr=0.05, batch_size=20)
    model = MLP([64, 16, 10], **DIGITS, seed=1)
    train(model, data, recipe, progress=False)
    make = lambda model: FromData(TRAK(3.0), model, proj_dim=64)
    ours = make(model).fit(data)
    scores, ranking = ours.attribute(query), ours.select(query, K).ranking
    explainer = to_quanda(make)(model=model, train_dataset=data, checkpoints=None)
    assert isinstance(explainer, quanda.Explainer)
    explanations = explainer.explain(query.x, query.y)
    torch.testing.assert_close(explanations, scores.T)
    torch.testing.assert_close(from_quanda(explainer).fit(data).attribute(query), scores)
    found = {}

    masks = random_subsets(N, M, seed=2)
    many = train_many(MLP([64, 16, 10], **DIGITS, seed=1), data, masks, recipe, outputs=query, weights=True, progress=False)
    files = [str(folder / f"{i}.pt") for i in range(M)]
    for i, file in enumerate(files):
        torch.save(many.load(i, MLP([64, 16, 10], **DIGITS)).state_dict(), file)
    metric = LinearDatamodelingMetric(model=model, train_dataset=data, m=M, alpha=0.5, subset_ids=[mask.nonzero().flatten().tolist() for mask in masks], subset_ckpt_filenames=files, cache_dir=str(folder))
    metric.update(explanations, query.y, query.x)
    found["LDS"] = metric.compute()["score"], lds(scores, LDSTruth(masks, margins(many.outputs, query.y)[None], (0,), 2)).lines[0]["value"]

    metric = ClassDetectionMetric(model=model, train_dataset=data, s=K)
    metric.update(explanations, query.y)
    found["class detection"] = metric.compute()["score"], (data.y[ranking] == query.y[:, None]).double().mean().item()

    metric = TopKCardinalityMetric(model=model, train_dataset=data, top_k=K)
    metric.update(explanations)
    found["cardinality"] = metric.compute()["score"], len(ranking.unique()) / ranking.numel()

    wrong = torch.arange(N) % 10 == 3  # the area does not ask who is really mislabelled
    metric = MislabelingDetectionMetric(model=model, train_dataset=data, mislabeling_indices=wrong.nonzero().flatten().tolist(), explainer_cls=to_quanda(make))
    own = ours.attribute(data).diagonal() + 1e-4 * torch.arange(N)  # so quanda breaks ties: later rows count as more suspicious
    curve = found_curve(own, wrong)[1:]
    found["mislabelling"] = metric.compute()["score"], torch.trapezoid(curve).item() / N

    similarity = CaptumSimilarity(model=model, train_dataset=data, model_id="digits", layers="relu1", cache_dir=str(folder / "captum"), batch_size=N)
    theirs, mine = from_quanda(similarity).fit(data).attribute(query), RepSim(model).fit(data).attribute(query)
    found["similarity"] = theirs[7, 3].item(), mine[7, 3].item()
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        numbers = both_numbers(Path(folder))
    print(json.dumps({"quanda": quanda.__file__, "numbers": numbers}))
