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
