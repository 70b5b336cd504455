"""What a study's page shows at once, on a small screen too: nothing is cut, covered or waits for a click."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from small_study import make_boxes, make_detections, make_points, make_probabilities, make_study, make_vertebrae

import utils
from lumbar.data.volume import Study

SCREENS = {"1280x720": (1280, 720), "200%": (640, 360), "telephone": (400, 800)}
# Texts that a canvas shows, each with its place; a canvas that is painted black starts anew.
RECORD = """
const paint = CanvasRenderingContext2D.prototype, { fillText, fillRect } = paint;
paint.fillRect = function (...area) { this.canvas.texts = []; fillRect.apply(this, area); };
paint.fillText = function (text, x, y) {
  const size = parseFloat(this.font);
  this.canvas.texts.push([text, x, y - size*.4, x + this.measureText(text).width, y + size*.4]);
  fillText.call(this, text, x, y);
};
"""
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


def crowded(study):
    """Levels and vertebrae 4 mm apart, label points and detections of all of them on the same slices."""
    boxes, vertebrae = make_boxes(second=0.28), make_vertebrae()
    boxes = [replace(box, center_lps_mm=np.array([0, 0, 10.0 - 4 * n])) for n, box in enumerate(boxes)]
    vertebrae = [
        replace(bone, corners_lps_mm=bone.corners_lps_mm + [0, 0, 31 * n - 80]) for n, bone in enumerate(vertebrae)
    ]
    points = [make_points().assign(level=level).assign(y_px=lambda t, n=n: t["y_px"] + n) for n, level in LEVELS]
    found = [make_detections().assign(level=level).assign(y_px=lambda t, n=n: t["y_px"] + n) for n, level in LEVELS]
    return dict(
        study=study,
        boxes=boxes,
        vertebrae=vertebrae,
        points=pd.concat(points, ignore_index=True),
        detections=pd.concat(found, ignore_index=True),
    )


LEVELS = list(enumerate(utils.LEVELS))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, study = tmp_path_factory.mktemp("pages"), make_study()
    probabilities, truth = make_probabilities()
    usual = dict(
        study=study, boxes=make_boxes(), vertebrae=make_vertebrae(), points=make_points(), detections=make_detections()
    )
    members = {
        name: make_probabilities(n)[0] for n, name in enumerate(("level", "yolo", "slices", "study", "ensemble"))
    }
    kinds = {"usual": usual, "crowded": crowded(study), "doubtful": usual | {"boxes": make_boxes(second=0.28)}}
    return {
        name: utils.write_text(
            folder / f"{name}.html", utils.study_html(**kind, probabilities=members, truth=truth, page=True)
        )
        for name, kind in kinds.items()
    }


@pytest.fixture
def opened(chromium, pages):
    """A function that opens a page on a screen."""
    contexts = []

    def open_page(name, screen="1280x720"):
        contexts.append(chromium.new_context(viewport=dict(zip(("width", "height"), SCREENS[screen])), offline=True))
        page = contexts[-1].new_page()
        page.add_init_script(RECORD)
        page.goto(pages[name].as_uri())
        page.wait_for_function("document.querySelector('.lumbar-viewer[data-drawn]')")
        page.evaluate(SETTLED)
        return page

    yield open_page
    for context in contexts:
        context.close()


def overprinted(texts):
    """Pairs of texts [text, left, top, right, bottom] that share more than a pixel."""
    return [
        (one[0], two[0])
        for n, one in enumerate(texts)
        for two in texts[:n]
        if min(one[3], two[3]) - max(one[1], two[1]) > 1 and min(one[4], two[4]) - max(one[2], two[2]) > 1
    ]


def texts_of(page, selector):
    """The texts of each picture, with their places on the screen, without the line's empty upper and lower part."""
    return page.evaluate(
        """query => [...document.querySelectorAll(query)].map(svg => [...svg.querySelectorAll('text')].map(text => {
             const { left, top, right, bottom } = text.getBoundingClientRect(), rim = (bottom - top)*.15;
             return [text.textContent, left, top + rim, right, bottom - rim];
           }))""",
        selector,
    )


@pytest.mark.parametrize(
    "name, screen",
    [("usual", "1280x720"), ("crowded", "1280x720"), ("crowded", "200%"), ("crowded", "telephone")],
)
def test_no_label_lies_on_another(opened, name, screen):
    page = opened(name, screen)
    for _ in range(5):  # conditions, each on slices of its own
        for texts in texts_of(page, ".picture svg") + texts_of(page, ".crops svg"):
            assert overprinted(texts) == [] and len(texts) >= 2
        sagittal = {text for text, *_ in texts_of(page, "figure[data-panel='2'] svg")[0]}
        assert {"A", "P", "H", "F"} <= sagittal
        assert sum("/" in text and "spinal" not in text for text in sagittal) == 5
        page.keyboard.press("c")
        page.evaluate(SETTLED)
    page.keyboard.press("z")
    page.evaluate(SETTLED)
    assert [overprinted(texts) for texts in texts_of(page, ".picture svg")] == [[], [], []]
    for look in ("oblique", "front", "left", "above"):
        page.locator(f"button[data-look={look}]").click()
        page.evaluate(SETTLED)
        texts = page.locator(".space canvas").evaluate("canvas => canvas.texts")
        assert overprinted(texts) == [] and sum("/" in text for text, *_ in texts) >= (1 if look == "above" else 3)


def test_labels_stay_within_their_picture(opened):
    page = opened("crowded", "telephone")
    for number, texts in enumerate(texts_of(page, ".picture svg")):
        area = page.locator(".picture").nth(number).bounding_box()
        assert all(area["x"] <= left and right <= area["x"] + area["width"] for _, left, _, right, _ in texts)


@pytest.mark.parametrize("screen", ["1280x720", "200%"])
def test_nothing_is_cut(opened, screen):
    page = opened("doubtful", screen)
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.title, figcaption, figcaption *, summary, th, td, .doubt, label')]
           .filter(x => x.scrollWidth > x.clientWidth + 1 && getComputedStyle(x).display !== 'inline'
             || x.getBoundingClientRect().right > innerWidth + 1).map(x => x.outerHTML.slice(0, 80))"""
    )
    assert cut == [] and page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen][0]


@pytest.mark.parametrize("screen", ["1280x720", "200%"])
@pytest.mark.parametrize("name", ["usual", "doubtful"])
def test_probabilities_are_in_the_first_screen(opened, name, screen):
    page = opened(name, screen)
    table = page.locator(".answer .grades").bounding_box()
    assert table["y"] + table["height"] <= SCREENS[screen][1]
    assert page.locator(".answer .grades").inner_text().count("%") == 15
    if screen == "1280x720" and name == "usual":  # with the pictures
        assert page.locator(".picture").first.bounding_box()["y"] < 300


def test_a_second_numbering_is_shown_where_there_is_one(opened):
    page = opened("doubtful")
    assert (
        "L4/L5 would be L5/S1" in page.locator(".doubt").inner_text() and "28%" in page.locator(".doubt").inner_text()
    )
    assert page.locator(".answer-caption").inner_text() == "L4/L5 (or L5/S1, 28%), spinal canal"
    assert "L5/S1 or S1/S2" in {text for text, *_ in texts_of(page, "figure[data-panel='2'] svg")[0]}
    assert "S1/S2, 28%" in page.locator(".levels").inner_text()
    page = opened("usual")
    assert page.locator(".doubt").count() == 0 and page.locator(".levels thead th").count() == 4


def test_keys_work_without_a_click(opened):
    page = opened("usual")

    def slices():
        return [int(slider.input_value()) for slider in page.locator("figure[data-panel] > input[type=range]").all()]

    def press(key):
        page.keyboard.press(key)
        page.evaluate(SETTLED)

    press("2")
    assert page.locator("select[data-pick=level]").input_value() == "1"
    before = slices()
    press("ArrowDown")  # the canal is graded on T2
    assert slices() == [before[0], before[1], before[2] + 1]
    assert page.locator("figure.active").get_attribute("data-panel") == "2"
    press("c")
    before = slices()
    press("PageDown")  # a foramen on T1
    assert slices()[0] > before[0] and slices()[1:] == before[1:]
    area = page.locator("figure[data-panel='1'] .picture").bounding_box()
    page.mouse.move(area["x"] + 30, area["y"] + 30)
    before = slices()
    press("End")  # the image under the mouse
    assert slices()[1] > before[1] and slices()[::2] == before[::2]
    page.mouse.move(2, 2)
    press("o")
    assert page.locator(".picture .box").count() == 0
    before = page.evaluate("scrollY")
    press("Space")
    page.wait_for_timeout(400)
    assert page.evaluate("scrollY") > before


def test_keys_of_controls_stay_theirs(opened):
    page = opened("usual")
    slider = page.locator("input[data-grey=width]")
    before = page.locator("figure[data-panel='2'] > input[type=range]").input_value()
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert float(slider.input_value()) > 1
    assert page.locator("figure[data-panel='2'] > input[type=range]").input_value() == before
    page.locator("select[data-pick=condition]").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("select[data-pick=condition]").input_value() == "1"


def test_a_fragment_takes_keys_only_under_the_mouse(chromium, tmp_path):
    """In a report the arrow keys scroll the page, unless the mouse is over the viewer."""
    fragment = utils.study_html(make_study(), make_boxes())
    empty = utils.study_html(Study(7, []))
    text = f"<!doctype html><body><p style='height:1200px'>text</p>{fragment}{empty}</body>"
    context = chromium.new_context(viewport={"width": 1280, "height": 720}, offline=True)
    page = context.new_page()
    page.goto(utils.write_text(tmp_path / "report.html", text).as_uri())
    page.wait_for_function("document.querySelector('.lumbar-viewer[data-drawn]')")
    slider, level = (
        page.locator("figure[data-panel] > input[type=range]").first,
        page.locator("select[data-pick=level]").first,
    )
    before = slider.input_value(), level.input_value()
    page.keyboard.press("1")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)
    assert (slider.input_value(), level.input_value()) == before and page.evaluate("scrollY") > 0
    page.locator("figure[data-panel='0'] .picture").first.hover()
    page.keyboard.press("1")
    page.keyboard.press("ArrowDown")
    page.evaluate(SETTLED)
    assert level.input_value() == "0" and slider.input_value() != before[0]
    context.close()
