"""The documentation site: the notebooks with their stored outputs, and an API reference, as pages that work offline.

    python tests/build_site.py       write _docs/ (no notebook is executed; any warning is an error)
"""
import ast
import importlib
import inspect
import json
import re
import shutil
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from fastcore.docments import docments
from nbformat.v4 import new_markdown_cell
from notebooks import DEFAULT_EXP, EXPORT, HIDDEN, NBS, ROOT, all_notebooks, number, parsed
from sphinx.application import Sphinx

SOURCE, BUILT, SITE = ROOT / "_proc" / "site", ROOT / "_proc" / "html", ROOT / "_docs"  # myst-nb writes beside BUILT
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
CONFIG = CONFIG["DEFAULT"]
PACKAGE = CONFIG["lib_name"]
CLAIMS = NBS / "figures" / "index.ipynb"  # a page for its tables: all code folded
FLOORS = {  # page: first number, title, what a reader finds there
    "floor0": (0, "Ground", "Data, models, outputs, and the helpers that everything else stands on."),
    "floor1": (10, "Tangent features", "From a trained model to one short vector for each example."),
    "floor2": (19, "Information", "How many nats a set of examples holds about a prediction, and how to find a good set."),
    "floor3": (30, "Laplace", "How much one example tells the parameters."),
    "floor4": (40, "Baselines", "Other methods behind the same verbs."),
    "floor5": (49, "Evidence", "Evaluations, plots, records, and the demo."),
}
TUTORIALS = "Each tutorial does one job from beginning to end; every number in it was printed by the code above it."
COURSE = "Five short lessons, from the Laplace approximation to the information in one example, with exercises and worked solutions."
LEGEND = "Each notebook derives one component, builds the plain version, then the fast one, and asserts that they agree. Cells with a coloured edge are the source of the package, word for word."
ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle cx="4" cy="4" r="3.5" fill="#2757dd"/><circle cx="4" cy="4" r="1.5" fill="#fff"/></svg>'
DIRECTIVE = re.compile(r"^#\s*(\||NBVAL_).*\n?", re.MULTILINE)


@dataclass
class Page:
    "A notebook on its way to the site."
    path: Path
    name: str                 # address without the ending, as below nbs/
    title: str
    line: str                 # the one-line description
    module: str | None        # the module that it exports
    cells: list
    defined: set[str]         # names that its exported cells define


@cache
def public_names() -> dict[str, str]:
    "What the package gives at its top: name -> the module that defines it."
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def code_cell(cell, heading: str, defined: set[str], fold: bool) -> list:
    "The cells that stand for one code cell: anchors of its definitions, its code without directives, Markdown outputs as text."
    source = DIRECTIVE.sub("", cell.source).strip()
    if not source or HIDDEN.search(cell.source):
        return []
    tags, before, names = [], [], []
    if EXPORT.search(cell.source):
        tags, names = ["export"], [node.name for node in parsed(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        before = [new_markdown_cell("".join(f'<span id="def-{name}"></span>' for name in names), id=f"def-{cell.id}")] if names else []
        defined.update(names)
    imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in parsed(source).body)
    tags += ["hide-input"] if imports or fold else []
    words = {"code_prompt_show": "imports" if imports else "code", "code_prompt_hide": "hide"}
    tables = [out.data["text/markdown"] for out in cell.outputs if "text/markdown" in out.get("data", {})]
    cell.outputs = [out for out in cell.outputs if "text/markdown" not in out.get("data", {})]
    cell.source, cell.metadata = source, {"tags": tags, "mystnb": words | {"image": {"alt": f"Figure: {heading}"}}}
    return [*before, cell, *(new_markdown_cell(text, id=f"out-{cell.id}-{i}") for i, text in enumerate(tables))]


def markdown(text: str, path: Path, module: str | None) -> str:
    "Markdown for the site: public names link to the API, files that are no page link to the repository."
    def link(match):
        target, _, anchor = match[2].partition("#")
        where = (path.parent / target).resolve()
        if not target or where.suffix == ".ipynb":
            return match[0]
        return f"[{match[1]}]({CONFIG['git_url']}/blob/{CONFIG['branch']}/{where.relative_to(ROOT)}{anchor and '#' + anchor})"
    def name(match):
        home = public_names().get(match[1])
        return match[0] if home in (None, module) else f"{{py:obj}}`{match[1]}{match[2] or ''} <{home}.{match[1]}>`"
    def notebook(match):
        found = next(NBS.glob(f"[0-9][0-9]_{match[1]}.ipynb"), None)
        return f"notebook [{match[1]}](/{found.name})" if found else match[0]
    pieces = re.split(r"(^```.*?^```|\$\$.*?\$\$|^#[^\n]*)", text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(pieces), 2):  # the odd ones are code, display equations and headings
        pieces[i] = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:)([^)\s]+)\)", link, pieces[i])
        pieces[i] = re.sub(r"notebook \*(\w+)\*(?!\*)", notebook, pieces[i])
        pieces[i] = re.sub(r"(?<![\[`}])`(\w+)(\([^`<>]*)?`(?![\]`])", name, pieces[i])
    return "".join(pieces)


def read(path: Path) -> Page:
    "A notebook as the site shows it."
    nb, cells, defined = nbformat.read(path, as_version=4), [], set()
    title, line = re.match(r"# (.+?)\s*\n\s*> *(.+)", nb.cells[0].source).groups()
    match = next(filter(None, (DEFAULT_EXP.search(cell.source) for cell in nb.cells)), None)
    module, heading = match and f"{PACKAGE}.{match[1]}", title
    for cell in nb.cells:
        if cell.cell_type == "code":
            cells += code_cell(cell, heading, defined, fold=path == CLAIMS)
        else:
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
            cell.source = markdown(cell.source, path, module)
            cells.append(cell)
    if module:
        cells.insert(1, new_markdown_cell(f"Module {{py:mod}}`{module}`, written in `nbs/{path.name}`.", id="module"))
    return Page(path, path.relative_to(NBS).with_suffix("").as_posix(), title, line, module, cells, defined)


def write(name: str, text: str) -> None:
    "Write a source file of the site."
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def front(line: str) -> str:
    "Front matter of a Markdown page: its description, for search engines."
    return f"---\nmyst:\n  html_meta:\n    description: {json.dumps(line)}\n---\n"


def toctree(pages: list[str], caption: str = "") -> str:
    "A table of contents that only the sidebar shows."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *(f"/{page}" for page in pages), "```"])


def listing(pages: list[Page]) -> str:
    "Pages with their descriptions."
    return "\n".join(f"* [{page.title}](/{page.name}.ipynb): {markdown(page.line, page.path, None)}" for page in pages)


def in_order(pages: list[Page], guide: Path) -> list[Page]:
    "Pages in the order in which a notebook first names them; what it does not name comes last, by name."
    text = guide.read_text(encoding="utf-8")
    return sorted(pages, key=lambda page: (text.find(page.path.stem) % sys.maxsize, page.name))  # -1, not found, is the largest


def reference(page: Page) -> tuple[str, str]:
    "Short name and API page of one module: what the package gives at its top first, then the rest."
    thing, short = importlib.import_module(page.module), page.module.split(".")[1]
    first = [name for name in thing.__all__ if name in public_names()]
    rest = [name for name in thing.__all__ if name not in first and name in page.defined]
    text = [".. meta::", f"   :description: API of {page.module}: {page.line}", "", page.module, "=" * len(page.module), ""]
    text += [f"Derived and tested in :doc:`/{page.name}`.", "", f".. automodule:: {page.module}", ""]
    for heading, names in [(f"From {PACKAGE}", first), (f"From {page.module}", rest)]:
        text += [heading, "-" * len(heading), ""] if names else []
        for name in names:
            kind = "class" if inspect.isclass(getattr(thing, name)) else "function" if name in page.defined else "data"
            text += [f".. auto{kind}:: {name}", *(["   :members:", "   :special-members: __call__"] if kind == "class" else []), ""]
    return short, "\n".join(text)


def contents(pages: list[Page]) -> None:
    "Write every page, and the pages that list them: tutorials, course, figures, floors, API."
    home = next(page for page in pages if page.name == "index")
    claims = next(page for page in pages if page.path == CLAIMS)
    course = [page for page in pages if page.name.startswith("tutorials/lesson")]
    tutorials = in_order([page for page in pages if page.path.parent.name == "tutorials" and page not in course], home.path)
    figures = in_order([page for page in pages if page.path.parent.name == "figures" and page is not claims], claims.path)
    tree = [("Learn", []), ("Results", ["figures/index"]), ("Notebooks", list(FLOORS)), ("Reference", ["api"])]
    for name, title, text, group in [("tutorials/index", "Tutorials", TUTORIALS, tutorials), ("tutorials/course", "Course", COURSE, course)]:
        if group:
            write(f"{name}.md", f"{front(text)}# {title}\n\n{text}\n\n{listing(group)}\n\n{toctree([page.name for page in group])}\n")
            tree[0][1].append(name)
    api = [f"{front(f'Every public name of {PACKAGE}.')}# API\n\nWhat `from {PACKAGE} import ...` gives. The module pages hold the rest.\n\n| name | |\n| --- | --- |"]
    for name, module in sorted(public_names().items(), key=lambda item: item[0].lower()):
        thing = getattr(importlib.import_module(module), name)
        line = inspect.getdoc(thing).splitlines()[0].replace("|", "\\|") if callable(thing) else f"a {type(thing).__name__}"
        api.append(f"| {{py:obj}}`{name} <{module}.{name}>` | {line} |")
    starts = [start for start, *_ in FLOORS.values()] + [100]
    for (floor, (start, title, line)), end in zip(FLOORS.items(), starts[1:]):
        group = [page for page in pages if number(page.path) is not None and start <= number(page.path) < end]
        write(f"{floor}.md", f"{front(line)}# {title}\n\n> {line}\n\n{LEGEND}\n\n{listing(group)}\n\n{toctree([page.name for page in group])}\n")
        modules = [(page, *reference(page)) for page in group if page.module]
        api += ["", f"## {title}", "", *(f"* {{py:mod}}`{page.module}`: {page.line}" for page, *_ in modules), "", toctree([f"api/{short}" for _, short, _ in modules])]
        for _, short, text in modules:
            write(f"api/{short}.rst", text)
    write("api.md", "\n".join(api) + "\n")
    home.cells.append(new_markdown_cell("\n\n".join(toctree(names, caption) for caption, names in tree if names), id="contents"))
    claims.cells.append(new_markdown_cell(toctree([page.name for page in figures]), id="contents"))
    for page in pages:
        meta = {"language_info": {"name": "python", "pygments_lexer": "python"}, "myst": {"html_meta": {"description": page.line}}}
        write(f"{page.name}.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=page.cells, metadata=meta)))


def plain(text: str) -> str:
    "A docstring's line as reStructuredText: code stays code, and no other sign means anything."
    parts = text.split("`")
    return "".join(f"``{part}``" if i % 2 and part.strip() else re.sub(r"([\\*|_])", r"\\\1", part) for i, part in enumerate(parts))


def add_docments(app, what, name, thing, options, lines) -> None:
    "Parameters and returns, described by the comments beside them."
    lines[:] = [plain(line) for line in lines]
    if what in ("class", "function", "method"):
        for key, found in docments(thing, full=True, returns=True).items():
            if found["docment"] and key != "self":
                lines += ["", f":{'returns' if key == 'return' else f'param {key}'}: {plain(' '.join(found['docment'].split()))}"]


def build() -> int:
    "Write the sources, then the site; 0 if nothing was wrong."
    pages = [read(path) for path in all_notebooks()]
    for folder in (SOURCE, BUILT, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    contents(pages)
    origin = {page.module: page for page in pages if page.module}
    def source_of(domain, info):
        page, name = origin.get(info["module"]), info["fullname"].split(".")[0]
        return f"../{page.name}.html#def-{name}" if page and name in page.defined else None
    mathjax = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    for name in ["tex-chtml.js", "input/tex/extensions", "output/chtml/fonts"]:
        copy = shutil.copytree if (mathjax / name).is_dir() else shutil.copy
        (SOURCE / "_static" / "mathjax" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(mathjax / name, SOURCE / "_static" / "mathjax" / name)
    shutil.copy(ROOT / "tests" / "site.css", SOURCE / "_static")
    for picture in [*NBS.rglob("*.png"), *NBS.rglob("*.jpg")]:
        (SOURCE / picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, SOURCE / picture.relative_to(NBS))
    write("_static/icon.svg", ICON)
    app = Sphinx(SOURCE, None, BUILT, ROOT / "_proc" / "doctrees", "html", status=None, warningiserror=True, confoverrides={
        "project": PACKAGE, "author": CONFIG["author"], "copyright": CONFIG["copyright"],
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.mathjax"], "linkcode_resolve": source_of,
        "nb_execution_mode": "off", "myst_enable_extensions": ["dollarmath", "amsmath"], "myst_heading_anchors": 4,
        "add_module_names": False, "autodoc_member_order": "bysource", "autodoc_typehints_format": "short", "autodoc_preserve_defaults": True,
        "autodoc_inherit_docstrings": False, "maximum_signature_line_length": 60, "toc_object_entries_show_parents": "hide",
        "html_theme": "furo", "html_title": PACKAGE, "html_short_title": PACKAGE, "html_static_path": ["_static"], "html_css_files": ["site.css"],
        "html_favicon": "_static/icon.svg", "html_copy_source": False, "html_show_sphinx": False, "mathjax_path": "mathjax/tex-chtml.js",
    })
    app.connect("autodoc-process-docstring", add_docments)
    app.build()
    BUILT.rename(SITE)
    print(f"{len(pages)} notebooks in {SITE.name}/index.html" + ("; see the warnings above" if app.statuscode else ""))
    return app.statuscode


if __name__ == "__main__":
    sys.exit(build())
