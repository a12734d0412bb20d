"""The explorer page: true to the registry, needs no network, answers clicks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vitzoo
from tools.explorer import growth, models, page, pictures

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
CLICKS = """<script>
at("family").value = "davit"; at("family").dispatchEvent(new Event("input"));
const key = document.querySelector("th[data-key=params]"); key.click(); key.click();
</script>"""

HALONET = """<script>
at("name").value = "halo"; at("name").dispatchEvent(new Event("input"));
</script>"""


def _browse(html: str, folder: Path, *options: str) -> str:
    file = folder / "page.html"
    file.write_text(html)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # type: ignore[arg-type]
    return done.stdout


def test_page_holds_every_model_and_no_address() -> None:
    text = page(drawn=False)
    found = re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    data = json.loads(found.group(1))
    assert [line["name"] for line in data["models"]] == vitzoo.list_models()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


@needs_browser
def test_filters_and_sorting_answer_clicks(tmp_path: Path) -> None:
    dom = _browse(page(drawn=False).replace("</html>", CLICKS), tmp_path, "--dump-dom")
    body = dom.partition('<tbody id="rows">')[2].partition("</tbody>")[0]
    shown = re.findall(r"<tr><td>(vz_\w+)</td>", body)
    expected = [line for line in models() if line["family"] == "davit"]
    expected.sort(key=lambda line: -line["params"])
    assert shown == [line["name"] for line in expected]
    assert f"{len(shown)} of {len(models())} models" in dom


@needs_browser
def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    html = page(drawn=False).replace("</html>", HALONET)
    dom = _browse(html, tmp_path, "--dump-dom")
    plot = dom.partition('<svg id="scatter"')[2].partition("</svg>")[0]
    both = [line for line in models() if line["top1"] and line["speed"]]
    shown = [line for line in both if "halo" in line["name"]]
    assert 0 < len(shown) < len(both)
    assert plot.count("<circle") == len(shown)
    for line in shown:
        assert f"{line['name']} at {line['speed_size']}<" in plot
    curves = [curve for panel in growth() for curve in panel["curves"]]
    plots = dom.partition('<div id="growth">')[2].partition("</div>")[0]
    assert plots.count("<polyline") == len(curves)
    assert {curve["name"] for curve in curves} >= {"window", "neighborhood"}


@pytest.mark.slow
def test_every_family_has_a_picture() -> None:
    drawn = {vitzoo.info(picture["model"]).family for picture in pictures()}
    assert drawn == {vitzoo.info(name).family for name in vitzoo.list_models()}


@needs_browser
def test_page_can_be_photographed(tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    _browse(page(drawn=False), tmp_path, f"--screenshot={target}", "--window-size=1280,1600")
    assert target.stat().st_size > 20_000
