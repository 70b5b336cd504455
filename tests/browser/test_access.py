"""Pages pass axe-core's accessibility rules: nothing serious in light and dark, on a small screen and enlarged.

axe-core comes with `pip install axe-playwright-python`; without it these tests are skipped.
"""

from pathlib import Path

import pandas as pd
import pytest
from small_study import make_boxes, make_detections, make_points, make_probabilities, make_study, make_vertebrae

import utils
from lumbar.data.volume import Study
from lumbar.look.folder_pages import index_html

ROOT = Path(__file__).resolve().parents[2]
SCREENS = {"1280x720": (1280, 720), "200%": (640, 360)}


def serious_findings(page):
    """What axe-core finds serious or critical in a page: [(rule, elements)]."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-core is missing: pip install axe-playwright-python"
    )
    found = axe.Axe().run(page).response
    assert found["passes"], "axe-core checked nothing"
    return [
        (one["id"], [node["html"][:120] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def findings(chromium, file, screen, scheme):
    context = chromium.new_context(
        viewport=dict(zip(("width", "height"), SCREENS[screen])), color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.goto(file.as_uri())
    if page.locator(".lumbar-viewer").count():
        page.wait_for_function("document.querySelector('.lumbar-viewer[data-drawn]')")
    found = serious_findings(page)
    context.close()
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    probabilities, truth = make_probabilities()
    full = utils.study_html(
        make_study(),
        make_boxes(second=0.28),
        make_points(),
        {"yolo": probabilities, "level": make_probabilities(1)[0]},
        truth,
        page=True,
        vertebrae=make_vertebrae(),
        detections=make_detections(),
    )
    bare = utils.study_html(Study(7, []), page=True)
    log = pd.DataFrame({"study_id": [7, 8], "series": ["Sagittal T1", ""], "second_share": [0.28, 0.0]})
    several = index_html(log.assign(problems=["", "no series of use"]), {7: folder / "full.html"}, {7: "L4/L5 canal"})
    texts = {"full": full, "bare": bare, "list": several}
    return {name: utils.write_text(folder / f"{name}.html", text) for name, text in texts.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["full", "bare", "list"])
def test_a_studys_page(chromium, pages, name, screen, scheme):
    assert findings(chromium, pages[name], screen, scheme) == []


def test_a_fault_is_found(chromium, pages, tmp_path):
    """The check itself: grey on grey, and a slider without a name."""
    text = pages["bare"].read_text().replace("</main>", "<p style='color:#aaa'>pale</p><input type=range></main>")
    found = findings(chromium, utils.write_text(tmp_path / "bad.html", text), "1280x720", "light")
    assert {rule for rule, _ in found} == {"color-contrast", "label"}
