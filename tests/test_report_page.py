"""The page of `report` in a browser: every figure is drawn, nothing is asked for, nothing fails."""

import json
import re

import cv2
import pytest
from browser import NEEDS_BROWSER, browse
from command import run

pytestmark = [NEEDS_BROWSER, pytest.mark.slow]
# Run in the page after it has loaded; what it finds is read from the title.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const svgs = [...document.querySelectorAll("svg")];
  const images = [...document.querySelectorAll("svg image")];
  const wide = document.documentElement.scrollWidth - innerWidth;
  const areas = svgs.map(s => s.getBoundingClientRect()).map(r => Math.min(r.width, r.height));
  const loaded = images.map(i => new Promise(done => {
    const image = new Image();
    image.onload = () => done(image.naturalWidth);
    image.onerror = () => done(0);
    image.src = i.getAttribute("href") || i.getAttribute("xlink:href");
  }));
  Promise.all(loaded).then(widths => {
    const asked = performance.getEntriesByType("resource").map(e => e.name);
    document.title = JSON.stringify({
      svgs: svgs.length, smallest: Math.min(...areas), images: widths.length,
      blank: widths.filter(w => !w).length, wide: wide,
      math: [...document.querySelectorAll("math")]
        .filter(m => m.getBoundingClientRect().height > 8).length,
      asked: asked.filter(name => !name.startsWith("data:")),
      ground: getComputedStyle(document.body).backgroundColor,
    });
  });
}, 0));
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a run of the digits recipe, tiny."""
    from command import TINY

    folder = tmp_path_factory.mktemp("page")
    tiny = [*TINY, "--config.total_steps=4"]
    status, _, err = run("train.py", f"--workdir={folder / 'run'}", *tiny)
    assert status == 0, err
    status, out, err = run("-m", "crate_jax", "report", f"--workdir={folder / 'run'}")
    assert status == 0, err
    return folder / "run/report/index.html", json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(page, width, dark, tmp_path):
    path, told = page
    probed = tmp_path / "index.html"
    text = path.read_text(encoding="utf-8")
    probed.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, console = browse(probed.as_uri(), tmp_path, width=width, dark=dark, dump=True)
    assert console == []
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", dom)[1].replace("&quot;", '"'))
    assert found["svgs"] == told["figures"] > 20 and found["smallest"] > 20
    assert found["images"] > 20 and found["blank"] == 0
    assert found["math"] > 6 and found["asked"] == []
    assert found["wide"] <= 0  # nothing sticks out to the side
    assert found["ground"] == ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)")


def test_a_picture_of_the_page(page, tmp_path):
    _, console = browse(page[0].as_uri(), tmp_path)
    picture = cv2.imread(str(tmp_path / "shot.png"))
    assert console == [] and picture.shape == (1200, 1400, 3)
    assert picture.std() > 10  # not blank


def test_the_test_would_see_what_is_wrong(page, tmp_path):
    """An error in the console, and something that is asked for."""
    wrong = tmp_path / "index.html"
    wrong.write_text('<script>throw "x"</script><img src="http://example.org/a.png">' + PROBE)
    dom, console = browse(wrong.as_uri(), tmp_path, dump=True)
    assert any("Uncaught x" in line for line in console)
    assert "http://example.org/a.png" in dom
    title = re.search(r"<title>(\{.*?\})</title>", dom)
    assert title and "example.org" in title[1]
