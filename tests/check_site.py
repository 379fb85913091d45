"""What the built site has to be, in a headless browser: `make site-test` (not part of `make test`, which has no browser).

Every page loads with no error and asks no other host; no link or anchor is broken; maths is typeset; pictures are there; a phone
never scrolls sideways; the search answers.
"""
import shutil
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parent.parent / "_docs"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
if CHROMIUM is None:
    raise FileNotFoundError("no Chromium on this machine: install one (Debian: apt-get install chromium) and run `make site-test` again")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STATE = """async () => {
    const maths = document.querySelectorAll('.math.notranslate').length
    if (maths) await MathJax.startup.promise
    await new Promise(done => requestAnimationFrame(done))
    const content = document.querySelector('article').cloneNode(true)
    content.querySelectorAll('pre, code, mjx-container, script, style, div.cell_output').forEach(node => node.remove())
    return {
        maths, typeset: [...document.querySelectorAll('.math.notranslate')].filter(node => node.querySelector('mjx-container')).length,
        wrong: [...document.querySelectorAll('mjx-merror, [data-mjx-error], mjx-container [style*="color: red"]')].map(node => node.textContent),
        raw: content.textContent.match(/.{0,30}(\\$|\\\\\\(|\\\\\\[|\\\\begin).{0,30}/g) || [],
        missing: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
        unnamed: [...document.images].filter(image => !image.alt).length,
        cut: [...document.querySelectorAll('article *')].filter(node => node.getBoundingClientRect().right > innerWidth + 1)
            .filter(node => !node.closest('pre, div.table-wrapper, div.cell_output, div.math, mjx-assistive-mml')).map(node => node.outerHTML.slice(0, 200)),
        wide: document.documentElement.scrollWidth - innerWidth,
    }
}"""


class Reader(HTMLParser):
    "The links, the anchors, the title and the description of a page."
    def __init__(self, page: str):
        super().__init__()
        self.links, self.anchors, self.description = [], {""}, None
        self.feed((SITE / page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "meta" and found.get("name") == "description":
            self.description = found["content"]


@pytest.fixture(scope="session")
def read():
    return {page: Reader(page) for page in PAGES}


@pytest.fixture(scope="session")
def address():
    "The site, served from this machine."
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def tab(browser, address):
    "A phone-sized page, and what went wrong on it."
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else page.troubles.append(f"asks {request.url}"))
    yield page
    page.close()


def test_the_site_has_been_built():
    assert len(PAGES) > 80 and {"index.html", "search.html", "api.html", "figures/index.html"} <= set(PAGES), "run `make site`"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(page, read):
    broken = []
    for link in read[page].links:
        target = urlsplit(urljoin(page, link))
        if target.scheme or target.netloc:
            continue
        path, anchor = unquote(target.path), unquote(target.fragment)
        if not (SITE / path).is_file() or (path in read and anchor not in read[path].anchors):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tab, address, read):
    tab.goto(address + page)
    state = tab.evaluate(STATE)
    assert not tab.troubles
    made = page in ("search.html", "genindex.html", "py-modindex.html")
    assert tab.title() and (made or tab.locator("h1").count() == 1 and read[page].description)
    assert state["typeset"] == state["maths"] and not state["wrong"] and not state["raw"], state
    assert not state["missing"] and not state["unnamed"], state
    assert state["wide"] <= 0 and not state["cut"], f"wider than a phone: {state['wide']} pixels, {state['cut']}"
    tab.set_viewport_size({"width": 1280, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("words, page", [("submodular", "27_guarantees.html"), ("attribute", "api/pipeline.html"), ("brittleness", "50_evaluate.html")])
def test_search(words, page, tab, address):
    tab.goto(f"{address}index.html")
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.fill("input[name=q]", words)
    tab.press("input[name=q]", "Enter")
    tab.wait_for_selector(f"ul.search li a[href*='{page}']")
    assert not tab.troubles
