"""The pages as a site: they build without a warning, and a browser reads them without a request."""

import functools
import http.server
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from browser import NEEDS_BROWSER, browse
from command import LIMIT_S, ROOT

HOOKS = ROOT / "docs/site/hooks.py"
# The first page, a guide, a reference, and the page of the widest tables.
PAGES = ["index.html", "train_on_your_images.html", "reference/objective.html", "zoo.html"]
# What is searched for stands in the address. The clock of a headless page runs ahead of its
# workers, and waits for what the page asks for. So the probe asks for /wait until it has results.
PROBE = """
<script>
addEventListener("load", async () => {
  const searched = new URLSearchParams(location.search).get("find");
  const query = document.querySelector("[data-md-component=search-query]");
  const links = () => [...document.querySelectorAll(".md-search-result__link")].map(e => e.href);
  for (let n = 0; searched && n < 12 && !links().length; n++) {
    query.focus();
    query.value = searched;
    query.dispatchEvent(new Event("keyup"));
    const served = location.protocol != "file:";
    await (served ? fetch("/wait") : new Promise(done => setTimeout(done, 250)));
  }
  const out = [...document.querySelectorAll("article pre > code, article table, article img")]
    .map(e => e.closest(".md-typeset__scrollwrap, .highlight") || e)
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  document.title = JSON.stringify({
    heading: document.querySelector("h1").innerText, found: links(),
    asked: performance.getEntriesByType("resource").map(e => e.name),
    wide: document.documentElement.scrollWidth - innerWidth, out: out.length,
    ground: getComputedStyle(document.body).backgroundColor,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as one is told to."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"]
        + ["-f", "docs/site/mkdocs.yml", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Probed(http.server.SimpleHTTPRequestHandler):
    """Serves files, pages with the probe at their end."""

    def do_GET(self):
        if self.path == "/wait":
            time.sleep(0.25)
            self.send_response(204)
            return self.end_headers()
        path = self.translate_path(self.path)
        if not path.endswith(".html"):
            return super().do_GET()
        with open(path, encoding="utf-8") as file:
            body = file.read().replace("</body>", PROBE + "</body>").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(_Probed, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def probe(address, page, folder, **how):
    """What the probe of a page finds, of which nothing may come from elsewhere."""
    dom, console = browse(f"{address}/{page}", folder, dump=True, **how)
    assert console == []
    told = re.search(r"<title>(\{.*?\})</title>", dom)[1]
    found = json.loads(told.replace("&quot;", '"').replace("&amp;", "&"))
    assert all(name.startswith(address) for name in found["asked"])
    return found


def test_nothing_is_asked_for_elsewhere(site):
    """Scripts, styles, pictures and fonts of the pages are files of the site."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"""<(?:script|img|iframe)[^>]*\bsrc=["']([^"']+)""", text)
        loaded += re.findall(r"""<link[^>]*rel=["'](?!canonical)[^>]*href=["']([^"']+)""", text)
        assert loaded and not [name for name in loaded if re.match(r"\w+:|//", name)], page


@pytest.mark.slow
@NEEDS_BROWSER
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_a_page_in_a_browser(address, page, width, dark, tmp_path):
    found = probe(address, page, tmp_path, width=width, dark=dark)
    assert found["heading"] and found["asked"] and found["wide"] <= 0 and found["out"] == 0
    red, *_ = map(int, re.findall(r"\d+", found["ground"]))
    assert red < 60 if dark else red > 240


@pytest.mark.slow
@NEEDS_BROWSER
def test_search_finds_ista(address, tmp_path):
    found = probe(address, "index.html?find=ISTA", tmp_path)["found"]
    assert any("/white_box.html" in link for link in found)
    assert any("/reference/" in link for link in found)
    assert probe(address, "index.html?find=qqqqzzzz", tmp_path)["found"] == []


@NEEDS_BROWSER
def test_search_in_a_folder(site, tmp_path):
    """Opened as files, without a server."""
    page = site / "probed.html"
    text = (site / "index.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    found = probe(site.as_uri(), "probed.html?find=ISTA", tmp_path)["found"]
    assert any("/white_box.html" in link for link in found)


def test_examples_in_docstrings_are_code(site):
    """And no quotation in a quotation in a quotation, as Markdown reads ``>>>``."""
    pages = [page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")]
    assert len(pages) == 7 and sum(page.count("&gt;&gt;&gt;") for page in pages) >= 3
    assert not [page for page in pages if re.search(r"<blockquote>\s*<blockquote>", page)]


def mended(markdown, monkeypatch, repository=""):
    monkeypatch.setenv("CRATE_JAX_REPOSITORY", repository)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/models.md"))
    return runpy.run_path(str(HOOKS))["on_page_markdown"](markdown, page, None, None)


def test_links_out_of_the_pages(monkeypatch):
    text = "See [`train.py`](../../train.py), [it](../../tests/a.py#L1), [zoo](../zoo.md).\n"
    assert mended(text, monkeypatch) == "See `train.py`, it (`tests/a.py`), [zoo](../zoo.md).\n"
    host = "https://example.org/us/crate"
    assert mended(text, monkeypatch, host + "/") == (
        f"See [`train.py`]({host}/blob/main/train.py), [it]({host}/blob/main/tests/a.py#L1), "
        "[zoo](../zoo.md).\n"
    )
    code = "```\n[it](../../train.py)\n```\n"
    assert mended(code, monkeypatch, host) == code
