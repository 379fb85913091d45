"""Lets nbval check notebooks as nbdev keeps them, and fails a run in which a notebook was left out."""
import functools
import re
from pathlib import Path

from infotda.data import has_data

HERE = Path(__file__).parent
SKIP = re.compile(r"^\s*#\s*\|\s*(notest|gpu|eval:\s*false)\b", re.MULTILINE | re.IGNORECASE)
LOADS = re.compile(r'load_data\(\\"(\w+)\\"')
passed_in = set()  # notebooks of which a cell passed


@functools.cache
def lacks_data(path: Path) -> bool:
    "Whether a figure or a tutorial loads a data set that is not on this machine; the numbered notebooks see to that themselves."
    return path.parent != HERE and not all(has_data(name) for name in LOADS.findall(path.read_text(encoding="utf-8")))


def pytest_itemcollected(item):
    if type(item).__name__ != "IPyNbCell":
        return
    if SKIP.search(item.cell.source) or lacks_data(Path(item.path)):
        item.options["skip"] = True
    if item.cell.execution_count is None:  # cleaned away by nbdev; nbval would read it as "never run"
        item.cell.execution_count = 0
    item.parent.sanitize_patterns[r" at 0x[0-9a-fA-F]+"] = ""


def notebooks():
    "Every notebook that a complete run has to execute."
    visible = lambda p: not any(part.startswith((".", "_")) for part in p.relative_to(HERE).parts)
    return {p for p in HERE.rglob("*.ipynb") if visible(p) and not lacks_data(p)}


def pytest_runtest_logreport(report):
    path = report.nodeid.split("::")[0]
    if report.when == "call" and report.passed and path.endswith(".ipynb"):
        passed_in.add(path)


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    complete = HERE in {Path(config.invocation_params.dir, arg).resolve() for arg in config.args}
    if hasattr(config, "workerinput"):  # one of several workers: only the process that gathers their reports can tell
        return
    if not complete or not (config.option.nbval or config.option.nbval_lax) or config.option.keyword or config.option.collectonly:
        return
    ran = {(config.rootpath / path).resolve() for path in passed_in}
    missing = sorted(p.name for p in notebooks() - ran)
    if missing:
        session.exitstatus = 1
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nnotebooks of which no cell ran: {', '.join(missing)}", red=True)
