"""A real browser opens the report and finds nothing to complain about."""

import html
import json
import re
import shutil
import subprocess

import pytest
from synthetic import write_run

from safelight.report import Report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr",
)  # fmt: skip

WATCH = """<script>
window.complaints = [];
addEventListener("error", e => complaints.push(String(e.message || e.target.outerHTML)), true);
addEventListener("unhandledrejection", e => complaints.push(String(e.reason)));
</script>"""

TELL = """<script>
addEventListener("load", () => {
  const box = document.documentElement, found = [...document.images];
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, nav, svg, .veil"));
  const veil = document.querySelector(".veil img");
  const blur = () => veil && getComputedStyle(veil).filter;
  const before = blur();
  if (veil) veil.parentElement.click();
  const theme = box.dataset.theme;
  document.querySelector(".switch").click();
  const told = {
    complaints, width: innerWidth, scroll: box.scrollWidth, images: found.length,
    missing: found.filter(i => !i.complete || !i.naturalWidth).length,
    wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
    blur: [before, blur()], theme: [theme, box.dataset.theme],
    requests: performance.getEntriesByType("resource").map(r => r.name)
      .filter(n => !n.startsWith("data:")),
  };
  parent.postMessage(JSON.stringify(told), "*");
});
</script>"""

# A window cannot be as narrow as a phone, a frame can.
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,">
<script>addEventListener("message", e => {
  const pre = document.createElement("pre");
  pre.id = "told";
  pre.textContent = e.data;
  document.body.append(pre);
});</script>
<body><iframe src="watched.html" style="width: %dpx; height: 900px; border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so no page can be opened")
    return found


def opened(browser, page, folder, width):
    """What the page says about itself in a window of this width, and the browser's log."""
    text = page.read_text(encoding="utf-8")
    watched = text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", TELL + "</body>", 1)
    (folder / "watched.html").write_text(watched, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000",
         "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, f"the page did not finish loading: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(told.group(1))), console


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_finds_no_error_no_missing_picture_and_nothing_too_wide(
    browser, page, tmp_path, width
):
    told, console = opened(browser, page, tmp_path, width)
    assert console == []
    assert told["complaints"] == []
    assert told["images"] > 50
    assert told["missing"] == 0
    assert told["width"] == width
    assert told["scroll"] <= told["width"], told["wide"]
    assert told["wide"] == []
    assert told["requests"] == []
    assert set(told["theme"]) == {"light", "dark"}


def test_a_veiled_picture_is_blurred_until_it_is_clicked(browser, tmp_path):
    run = write_run(tmp_path / "real", size=4, judges=("nudenet",))
    Report([run]).html(tmp_path / "report.html")
    told, _ = opened(browser, tmp_path / "report.html", tmp_path, 1280)
    before, after = told["blur"]
    assert "blur" in before
    assert after == "none"
