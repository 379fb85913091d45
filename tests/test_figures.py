"""The records of the figures: all there, complete, and able to catch a run that differs."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infotda.data import has_data

ROOT = Path(__file__).resolve().parent.parent
FIGURES = sorted(p for p in (ROOT / "nbs" / "figures").glob("*.ipynb") if p.stem != "index")
OF_THE_PAPER = ("fig2_relative_information", "fig3_brittleness", "fig3_cifar10", "fig3_rte", "table1_backdoor", "fig5_coreset", "fig6_class_balanced")


@pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.stem)
def test_figure_has_a_record_that_it_checks(path):
    record = json.loads((path.parent / "results" / f"{path.stem}.quick.json").read_text(encoding="utf-8"))
    assert record["figure"] == path.stem and record["profile"] == "quick" and len(record["numbers"]) >= 3
    assert record["seeds"] and {"python", "torch", "device", "infotda"} <= set(record["environment"]) and record["seconds"]["cpu"] > 0
    code = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert sum(".check(" in source for source in code) == 1, "one cell compares the run with the record"
    assert any(re.search(r"^\s*assert ", source, re.MULTILINE) for source in code), "a figure asserts what must hold"


def test_no_record_without_its_figure():
    names = {p.name.split(".")[0] for p in (ROOT / "nbs" / "figures" / "results").glob("*.json")}
    assert names == {p.stem for p in FIGURES}


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_each_figure_of_the_paper_has_a_notebook_and_rows_in_the_index(name):
    assert name in {p.stem for p in FIGURES}
    cells = json.loads((ROOT / "nbs" / "figures" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    claims = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"] if line.lstrip().startswith(f'("{name}"')]
    shown = [str(out) for cell in cells for out in cell.get("outputs", [])]
    assert claims and any(f"{name}.ipynb" in out for out in shown), "the stored table is older than its list of claims"


def test_the_two_coreset_figures_tell_the_same_experiment():
    free, equal = (json.loads((ROOT / "nbs" / "figures" / "results" / f"{name}.quick.json").read_text(encoding="utf-8"))["numbers"] for name in ("fig5_coreset", "fig6_class_balanced"))
    assert {name.replace(", free, ", ", equal, ") for name in free} == set(equal) and free["all data"] == pytest.approx(equal["all data"], abs=0.01)


@pytest.mark.skipif(not has_data("fashion_mnist"), reason="no Fashion-MNIST here")
@pytest.mark.parametrize("seed, passes", [(0, True), (1, False)], ids=["as it is", "another seed"])
def test_the_comparison_with_the_record_can_fail(tmp_path, seed, passes):
    folder = tmp_path / "figures"
    shutil.copytree(ROOT / "nbs" / "figures" / "results", folder / "results")
    notebook = (ROOT / "nbs" / "figures" / "appendix_f_gallery.ipynb").read_text(encoding="utf-8")
    assert notebook.count("paper_mlp(seed=0)") == 1 and notebook.count("assert max(sameness") == 1
    notebook = notebook.replace("paper_mlp(seed=0)", f"paper_mlp(seed={seed})").replace("assert max(sameness", "True or max(sameness")
    (folder / "appendix_f_gallery.ipynb").write_text(notebook, encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith("INFOTDA_RECORD")} | {"INFOTDA_PROFILE": "quick", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "bench" / "plain.py", folder / "appendix_f_gallery.ipynb"], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done.stderr[-2000:]
    assert passes or "expected the recorded numbers" in done.stderr
