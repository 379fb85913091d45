"""Relative links and pictures in the notebooks and in the Markdown files lead to files of the repository. (The pages: `make site-test`.)"""
import json
import re
from pathlib import Path

import pytest
from notebooks import ROOT, all_notebooks

CODE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)|<(?:img|a)\b[^>]*?(?:src|href)=[\"']([^\"']+)")


def texts(path: Path) -> list[str]:
    "The Markdown of a file: of a notebook, also what its cells printed as Markdown."
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    printed = [out["data"]["text/markdown"] for cell in cells for out in cell.get("outputs", []) if "text/markdown" in out.get("data", {})]
    return ["".join(text) for text in [cell["source"] for cell in cells if cell["cell_type"] == "markdown"] + printed]


def broken(path: Path) -> list[str]:
    "Relative links of a file that lead nowhere."
    found = [link[1] or link[2] for text in texts(path) for link in LINK.finditer(CODE.sub("", text))]
    local = [link for link in found if not re.match(r"[a-z]+:|#", link)]
    return [link for link in local if not (path.parent / link.split("#")[0]).exists()]


@pytest.mark.parametrize("path", [*all_notebooks(), *sorted(ROOT.glob("*.md"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not broken(path)


def test_the_link_check_can_fail(tmp_path):
    text = "[here](a.ipynb), `[not](a link)`, $[0](1)$, [there](b.md#part), ![picture](c.png), <img src='d.png'>, [web](https://e.org)"
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "b.md").write_text("")
    assert broken(tmp_path / "page.md") == ["a.ipynb", "c.png", "d.png"]
