"""Run the code cells of a notebook in its folder, with nothing but Python: for machines without Jupyter.

    python bench/plain.py nbs/figures/NAME.ipynb
"""
import ast
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")


def run(path: Path) -> None:
    "All cells in one namespace; the value of a last expression is printed, as a notebook shows it."
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    os.chdir(path.parent)
    space = {"__name__": "__main__", "display": print}
    for i, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]), filename=f"{path.name}, code cell {i}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, code cell {i}", "exec"), space)
        value = eval(compile(ast.Expression(last.value), f"{path.name}, code cell {i}", "eval"), space) if last else None
        if value is not None:
            print(value)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
