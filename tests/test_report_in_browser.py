"""The report in a real browser: no errors in its console, no page that scrolls sideways on a phone, a slider that works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, browse
from report_runs import curve, history, metrics, write_curve, write_evaluation

from dsno_cluster.cli import main

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

# loads the page in a frame as wide as a phone, where a window cannot be, and looks at it
PROBE = """<!doctype html><html><body><iframe id="f" style="width:WIDTHpx;height:800px;border:0"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, found = {};
  page.querySelectorAll("details").forEach((details) => { details.open = true; });
  found.width = view.innerWidth;
  found.scrollWidth = page.documentElement.scrollWidth;
  found.charts = [...page.querySelectorAll("svg.chart")].filter((s) => s.getBoundingClientRect().width > 0).length;
  found.cut = [...page.querySelectorAll("svg.chart text")].filter((text) => {
    const inside = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
    return inside.width > 0 && (inside.left < chart.left - 1 || inside.right > chart.right + 1);
  }).map((text) => text.textContent);
  found.drawn = [...page.images].every((image) => image.complete && image.naturalWidth > 0);
  const range = page.querySelector("input[type=range]");
  range.focus();
  found.focused = page.activeElement === range;
  found.outline = view.getComputedStyle(range).outlineStyle;
  range.value = 80;
  range.dispatchEvent(new view.Event("input"));
  found.clip = view.getComputedStyle(page.querySelector(".theirs-side img")).clipPath;
  found.said = range.getAttribute("aria-valuetext");
  document.getElementById("found").textContent = JSON.stringify(found);
};
frame.srcdoc = PAGE;
</script></body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    figures = {"inception_score": 6.3, "inception_score_std": 0.5, "recall": 0.9, "f_score": 0.85}
    found = metrics(warnings=["A warning of some length, which has to wrap on a phone."])
    for row in (*found["teacher_rows"], found["student"], found["real_held_out"]):
        row |= figures
    write_evaluation(root, found, history())
    write_curve(root, curve())
    assert main(["report", f"storage.root={root}", "--out", str(root / "report.html")]) == 0
    return root / "report.html"


def test_console_stays_silent(page: Path) -> None:
    dom, console = browse(page)
    assert console == []
    assert 'class="js"' in dom and "--at: 50%" in dom  # the script ran to its end


@pytest.mark.parametrize("width", [390, 1100])
def test_fits_its_window_and_the_slider_moves(page: Path, width: int) -> None:
    inner = json.dumps(page.read_text()).replace("</", "<\\/")
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", inner))
    dom, console = browse(probe)
    said = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert said is not None, dom[:500]
    found = json.loads(said[1])
    assert console == []
    assert found["width"] == width and found["scrollWidth"] <= width
    assert found["cut"] == []  # no name reaches out of its chart
    assert found["charts"] == 4 and found["drawn"]  # each in one of its two widths
    assert found["focused"] and found["outline"] != "none"
    assert found["clip"] == "inset(0px 20% 0px 0px)"  # the teacher is left of the border
    assert "80 percent" in found["said"]
