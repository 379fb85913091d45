"""The repository is what it says: exported, clean, linted, by the house rules, and packaged alone."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from notebooks import ROOT, all_notebooks, module_numbers, problems, readme

LINT = ["--select", "F,E9,PLE,W605", "--line-length", "160", "--no-cache"]


def run(*command, cwd=ROOT, **env):
    "Run a command, its output kept, outside any notebook test mode."
    keep = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(command, cwd=cwd, env=keep | env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tool(name):
    "A command of the environment the tests run in."
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the sources, exported and cleaned anew."
    top = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT / "nbs", top / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    shutil.copy(ROOT / "settings.ini", top)
    (top / "infotda").mkdir()
    shutil.copy(ROOT / "infotda" / "__init__.py", top / "infotda")
    run(tool("nbdev_export"), cwd=top)
    run(tool("nbdev_clean"), cwd=top)
    return top


def test_modules_are_what_the_notebooks_export(fresh):
    made = {p.name: p.read_text(encoding="utf-8") for p in (fresh / "infotda").glob("*.py")}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "infotda").glob("*.py")}
    assert set(made) == set(kept), f"stale or missing modules: {set(made) ^ set(kept)}; run `make export`"
    differ = [name for name in made if made[name] != kept[name]]
    assert not differ, f"{differ} differ from their notebooks; run `make export`"


def test_notebooks_are_clean(fresh):
    unclean = [p.relative_to(ROOT) for p in all_notebooks() if p.read_bytes() != (fresh / p.relative_to(ROOT)).read_bytes()]
    assert not unclean, f"{unclean} hold run counts or metadata; run `make export`"


@pytest.mark.parametrize("path", all_notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_keeps_the_house_rules(path):
    found = problems(path, module_numbers())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("breakage, words", [
    (("markdown", "no title"), "first cell"),
    (("code", "import torch\nx = 1"), "mixes imports"),
    (("code", "#| export\n" + "x = 1\n" * 40), "41 lines"),
    (("code", "from infotda.greedy import InfoGain"), "no lower notebook"),
    (("code", "# NBVAL_CHECK_OUTPUT\n1"), "without stored output"),
    (("code", "# NBVAL_SKIP\n#| export\nx = 1"), "directive after"),
])
def test_the_notebook_checker_can_fail(tmp_path, monkeypatch, breakage, words):
    kind, source = breakage
    nb = nbformat.read(ROOT / "nbs" / "00_core.ipynb", as_version=4)
    cell = nbformat.v4.new_markdown_cell(source) if kind == "markdown" else nbformat.v4.new_code_cell(source)
    nb.cells.insert(0 if kind == "markdown" else 3, cell)
    nbformat.write(nb, tmp_path / "00_core.ipynb")
    monkeypatch.setattr("notebooks.NBS", tmp_path)
    assert any(words in what for what in problems(tmp_path / "00_core.ipynb", {"core": 0, "greedy": 22}))


def test_lint():
    run(tool("ruff"), "check", *LINT, "nbs", "tests", "bench", "infotda", "setup.py")


def test_lint_can_fail(tmp_path):
    (tmp_path / "wrong.py").write_text("def f():\n    return undefined_name\n")
    with pytest.raises(AssertionError, match="F821"):
        run(tool("ruff"), "check", *LINT, str(tmp_path))


def test_readme_is_what_index_gives():
    text, pictures = readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run `make readme`"
    for name, data in pictures.items():
        assert (ROOT / "nbs" / name).read_bytes() == data, f"{name} is not the picture stored in index.ipynb; run `make readme`"


def test_readme_is_short_and_its_first_example_runs_as_pasted(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"```.*?```|<div>.*?</div>", "", text, flags=re.DOTALL).split()) <= 700
    example = re.search(r"```python\n(.*?)```", "\n".join(text.splitlines()[:40]), re.DOTALL)
    assert example, "the first example has to end within forty lines"
    run(sys.executable, "-c", example[1], cwd=tmp_path, MPLBACKEND="agg")


def test_wheel_holds_the_package_only(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ["setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for name in ["infotda", "tests", "nbs", "bench"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "the wheel must not need a compiler"
    with zipfile.ZipFile(wheel) as z:
        tops = {name.split("/")[0] for name in z.namelist()}
        meta = z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode()
    assert {t for t in tops if not t.endswith(".dist-info")} == {"infotda"}
    torch_pins = re.findall(r"^Requires-Dist: torch(?:vision)?\b(.*)$", meta, re.MULTILINE)
    assert torch_pins and all(re.fullmatch(r">=[\d.]+", pin.strip()) for pin in torch_pins), "only lower bounds, or pip may replace a user's torch"


def test_a_run_that_leaves_a_notebook_out_fails(tmp_path):
    top = tmp_path / "nbs"
    top.mkdir()
    shutil.copy(ROOT / "nbs" / "conftest.py", top)
    for name, source in [("00_runs", "assert True"), ("01_skipped", "#| eval: false\nassert True")]:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(nb, top / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "nbs", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    for workers in ([], ["-n", "2", "--dist", "loadfile"]):
        done = subprocess.run(command + workers, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and "no cell ran: 01_skipped.ipynb" in done.stdout, done.stdout
