"""The house rules for notebooks as functions, and the README that index.ipynb gives.

    python tests/notebooks.py readme     write README.md from nbs/index.ipynb
    python tests/notebooks.py check      print what breaks a rule
    python tests/notebooks.py run FILE   run a notebook from a fresh kernel and store its outputs
"""
import ast
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
EXPORT = re.compile(r"^#\s*\|\s*exporti?\b", re.MULTILINE)
DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.MULTILINE)
HIDDEN = re.compile(r"^#\s*\|\s*hide\b", re.MULTILINE)
MARKER = re.compile(r"^#\s*NBVAL_\w+", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|usr|Users|opt)/")
MAX_LINES, MAX_CELLS, MAX_BYTES, MIN_WORDS = 40, 120, 300_000, 3.5


def all_notebooks() -> list[Path]:
    "Every notebook below nbs/, sorted."
    hidden = lambda p: any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))


def number(path: Path) -> int | None:
    "The two digits in front of a notebook's name; None for index, figures and tutorials."
    return int(path.name[:2]) if path.parent == NBS and path.name[:2].isdigit() else None


def module_numbers() -> dict[str, int]:
    "module name -> the number of the notebook that defines it."
    found = {}
    for path in all_notebooks():
        cells = nbformat.read(path, as_version=4).cells
        match = next(filter(None, (DEFAULT_EXP.search(cell.source) for cell in cells)), None)
        if match and number(path) is not None:
            found[match[1]] = number(path)
    return found


def parsed(source: str) -> ast.Module:
    "The syntax tree of a cell without its magics."
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))


def imported_modules(tree: ast.Module) -> set[str]:
    "Names of infotda modules that a cell imports, at any depth; 'infotda' for the package itself."
    names = set()
    for node in ast.walk(tree):
        full = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        full += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names |= {(name.split(".") + [""])[1] or "infotda" for name in full if name.split(".")[0] == "infotda"}
    return names


def code_problems(path: Path, source: str, numbers: dict[str, int]) -> list[str]:
    "Broken rules in the source of one code cell."
    bad, tree = [], parsed(source)
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body]
    if any(imports) and not all(imports) and path.name != "index.ipynb":  # the README's example is one block
        bad.append("a cell mixes imports with other code")
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree)):
        bad.append("star import")
    lines = sum(bool(line.strip()) for line in source.splitlines())
    if EXPORT.search(source) and lines > MAX_LINES:
        bad.append(f"an exported cell of {lines} lines (at most {MAX_LINES})")
    marker = MARKER.search(source)
    if marker and EXPORT.search(source):
        bad.append(f"{marker[0]} in an exported cell would land in the module")
    if marker and re.search(r"^#\s*\|", source[marker.end():], re.MULTILINE):
        bad.append("a #| directive after an NBVAL marker is not seen")
    if (own := number(path)) is not None:
        for name in imported_modules(tree):
            if name == "infotda" or numbers.get(name, 100) >= own:
                bad.append(f"imports infotda.{name}, which is no lower notebook" if name != "infotda" else "imports the whole package")
    return bad


def output_problems(cell) -> list[str]:
    "Broken rules in the stored outputs of one code cell."
    bad = []
    if "NBVAL_CHECK_OUTPUT" in cell.source and not cell.outputs:
        bad.append("a checked cell without stored output")
    for out in cell.outputs:
        if out.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
            bad.append("a stored error")
        if out.get("name") == "stderr":
            bad.append(f"text on stderr: {out.text[:60]!r}")
        data = out.get("data", {})
        if "image/svg+xml" in data or "application/vnd.jupyter.widget-view+json" in data:
            bad.append("an SVG or a widget in an output")
        text = out.get("text", "") + "".join(v for k, v in data.items() if k.startswith("text/"))
        if MACHINE_PATH.search(text):
            bad.append(f"a machine's path in an output: {MACHINE_PATH.search(text)[0]}")
    return bad


def problems(path: Path, numbers: dict[str, int]) -> list[str]:
    "Every house rule that a notebook breaks."
    nb = nbformat.read(path, as_version=4)
    bad, first = [], nb.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \S.*\n\s*\n?> \S", first.source):
        bad.append("the first cell is not '# title' and '> subtitle'")
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            found = code_problems(path, cell.source, numbers) + output_problems(cell)
            bad += [f"cell {i} ({cell.source.strip().splitlines()[-1][:50]!r}): {what}" for what in found]
    if code and not any(cell.outputs for cell in code):
        bad.append("no stored output at all: run it before committing")
    words = sum(len(cell.source.split()) for cell in nb.cells if cell.cell_type == "markdown")
    lines = sum(bool(line.strip()) and not line.lstrip().startswith("#|") for cell in code for line in cell.source.splitlines())
    hidden = sum(bool(HIDDEN.search(cell.source)) for cell in code)
    if number(path) is not None and lines and words / lines < MIN_WORDS:
        bad.append(f"{words / lines:.1f} words a line of code (at least {MIN_WORDS})")
    if code and hidden > 0.1 * len(code):
        bad.append(f"{hidden} of {len(code)} code cells hidden (at most a tenth)")
    if len(nb.cells) > MAX_CELLS:
        bad.append(f"{len(nb.cells)} cells (at most {MAX_CELLS})")
    if path.stat().st_size > MAX_BYTES:
        bad.append(f"{path.stat().st_size} bytes (at most {MAX_BYTES})")
    return bad


def readme() -> tuple[str, dict[str, bytes]]:
    "What README.md has to be (index.ipynb as Markdown, links made relative to the top), and its pictures by file name."
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if not (cell.cell_type == "code" and (HIDDEN.search(cell.source) or EXPORT.search(cell.source)))]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not re.match(r"#\s*(\||NBVAL_)", line))
    pictures = {"ExtractOutputPreprocessor": {"output_filename_template": "images/readme_{cell_index}_{index}{extension}"}}
    body, resources = MarkdownExporter(config=Config(pictures)).from_notebook_node(nb)
    body = re.sub(r"<div>\n<style scoped>.*?</style>", "<div>", body, flags=re.DOTALL)
    body = re.sub(r"\]\((?!https?:|#|nbs/)([\w/]+\.(?:ipynb|png))", r"](nbs/\1", body)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.splitlines())).strip()
    return f"<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->\n\n{body}\n", resources["outputs"]


def write_readme() -> None:
    "Write README.md and the pictures it shows."
    text, pictures = readme()
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    for name, data in pictures.items():
        (NBS / name).parent.mkdir(exist_ok=True)
        (NBS / name).write_bytes(data)


def run(path: Path) -> None:
    "Run a notebook from a fresh kernel in its folder; its outputs are stored when every cell passed."
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(nb, path)
    nbdev_clean(str(path))


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        write_readme()
    elif sys.argv[1:] == ["check"]:
        numbers = module_numbers()
        found = [f"{path.relative_to(ROOT)}: {what}" for path in all_notebooks() for what in problems(path, numbers)]
        print("\n".join(found) or f"{len(all_notebooks())} notebooks keep every rule")
        sys.exit(bool(found))
    elif sys.argv[1:2] == ["run"] and len(sys.argv) == 3:
        run(Path(sys.argv[2]).resolve())
    else:
        sys.exit(__doc__)
