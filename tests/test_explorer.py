"""The explorer page: true to the registry, needs no network, answers clicks in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import vitzoo
from tools import explorer
from tools.explorer import growth, models, page, pictures

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
CLICKS = """<script>
at("family").value = "davit"; at("family").dispatchEvent(new Event("input"));
const key = document.querySelector("th[data-key=params]"); key.click(); key.click();
</script>"""

# Written where a dump of the page shows it: sides of the pictures as they were rendered.
RENDERED = """<script>
addEventListener("load", () => {
  const sides = [...document.images].map((i) => `${i.naturalWidth}x${i.naturalHeight}`);
  document.title = sides.join(" ");
});
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


def _data(text: str) -> dict:
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def test_script_finds_every_element_that_it_asks_for() -> None:
    text = page(drawn=False)
    asked = set(re.findall(r"""\bat\("(\w[\w-]*)"\)""", text))
    assert asked >= {"name", "family", "licence", "task", "sizes", "rows", "scatter", "growth"}
    assert asked <= set(re.findall(r"""\bid="([\w-]+)\"""", text))
    columns = re.findall(r"""\["(\w+)", "[^"]+"\]""", text.partition("const columns")[2])
    assert set(columns) <= set(_data(text)["models"][0])


def test_lines_are_what_the_registry_and_the_measurements_say() -> None:
    data = _data(page(drawn=False))
    results = json.loads((explorer.ROOT / "benchmarks/models.json").read_text())["results"]
    for line in data["models"]:
        record = vitzoo.info(line["name"])
        assert (line["family"], line["gmacs"]) == (record.family, record.gmacs)
        assert line["params"] == (record.params and record.params / 1e6)
        rates = [
            1e3 * one["batch"] / one["model_ms"]
            for one in results
            if (one["model"], one["mode"], one["dtype"]) == (line["name"], "forward", "float32")
        ]
        assert line["speed"] == max(rates, default=None)
    curves = [curve for panel in data["growth"] for curve in panel["curves"]]
    assert all(len(curve["points"]) > 1 and min(map(min, curve["points"])) > 0 for curve in curves)


@pytest.fixture
def two_pictures(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page with a picture of a window and of a group of points: the quick ones."""
    monkeypatch.setattr(explorer, "PICTURES", explorer.PICTURES[:1])
    return page()


def test_pictures_are_in_the_page(two_pictures: str) -> None:
    lines = _data(two_pictures)["pictures"]
    assert [line["model"] for line in lines] == ["vz_davit_tiny", "vz_flatformer"]
    for line in lines:
        kind, _, text = line["image"].partition(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        assert image.size == (224, 224)
        colours = {colour for _, colour in image.getcolors(224 * 224) or ()}
        assert (255, 221, 0) in colours, "no frame around the query"
        assert any(red > green + 60 and red > blue + 60 for red, green, blue in colours)


@needs_browser
def test_pictures_are_rendered(two_pictures: str, tmp_path: Path) -> None:
    dom = _browse(two_pictures.replace("</html>", RENDERED), tmp_path, "--dump-dom")
    title = dom.partition("<title>")[2].partition("</title>")[0]
    assert title == "224x224 224x224"


@needs_browser
@pytest.mark.slow
def test_every_picture_is_rendered(tmp_path: Path) -> None:
    text = page().replace("</html>", RENDERED)
    dom = _browse(text, tmp_path, "--dump-dom")
    sides = dom.partition("<title>")[2].partition("</title>")[0].split()
    assert sides == ["224x224"] * (len(explorer.PICTURES) + 1)


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
