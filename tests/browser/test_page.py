"""The page of a study in a real browser, without a network: what is pressed, turned and clicked does what it should."""

import re

import numpy as np
import pytest
from small_study import make_boxes, make_detections, make_points, make_probabilities, make_study, make_vertebrae

import utils

T1, AXIAL, T2 = range(3)
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def file(tmp_path_factory, study):
    """The page, as somebody got it by mail."""
    probabilities, truth = make_probabilities()
    path = tmp_path_factory.mktemp("page") / "study.html"
    return utils.write_text(
        path,
        utils.study_html(
            study,
            make_boxes(),
            make_points(),
            {"yolo": probabilities, "level": make_probabilities(1)[0]},
            truth,
            page=True,
            vertebrae=make_vertebrae(),
            detections=make_detections(),
        ),
    )


class Page:
    """A page with a viewer: what it shows, and what it asked the network for."""

    def __init__(self, chromium, file, **options):
        self.context = chromium.new_context(viewport={"width": 1280, "height": 1000}, offline=True, **options)
        self.page = self.context.new_page()
        self.problems, self.requests = [], []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("document.querySelector('.lumbar-viewer[data-drawn]')")
        self.settle()

    def settle(self):
        self.page.evaluate(SETTLED)

    def slice(self, panel):
        """Number of the slice that a panel shows, from 0."""
        return int(self.page.locator("figure[data-panel] > input[type=range]").nth(panel).input_value())

    def caption(self, panel):
        return self.page.locator("figure[data-panel] figcaption span").nth(panel).inner_text()

    def picture(self, selector, number=0):
        """The pixels of a canvas as text, to be compared."""
        self.settle()
        return self.page.locator(selector).nth(number).evaluate("canvas => canvas.toDataURL()")

    def pictures(self):
        return [self.picture("figure[data-panel] canvas", n) for n in range(3)]

    def count(self, selector):
        self.settle()
        return self.page.locator(selector).count()

    def set(self, selector, value):
        """Move a slider as a user does: the browser's own input event."""
        self.page.locator(selector).first.evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            value,
        )
        self.settle()

    def click_patient(self, panel, volume, xyz_mm, shift=(0, 0)):
        """Click on a place of the patient in a panel that shows a volume."""
        _, row, column = volume.lps_to_voxel(xyz_mm)
        height, width = np.array(volume.array.shape[1:]) * volume.spacing_mm[1:]
        y, x = (np.array([row, column]) + 0.5) * volume.spacing_mm[1:]
        side = max(height, width)
        area = self.page.locator("figure[data-panel] svg").nth(panel).bounding_box()
        self.page.mouse.click(
            area["x"] + (x + (side - width) / 2) / side * area["width"] + shift[0],
            area["y"] + (y + (side - height) / 2) / side * area["height"] + shift[1],
        )
        self.settle()


@pytest.fixture
def shown(chromium, file):
    page = Page(chromium, file)
    yield page
    page.context.close()
    assert page.problems == []


def test_it_opens_without_a_network_and_asks_for_none(shown, file):
    assert file.stat().st_size < 10_000_000
    assert [url for url in shown.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert all(len(picture) > 3000 for picture in shown.pictures())  # an empty canvas of this size has fewer letters
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_slider_wheel_and_keys_turn_the_slices(shown):
    seen = {shown.picture("figure[data-panel] canvas", T1)}
    others = shown.pictures()[1:]
    shown.set("figure[data-panel='0'] > input[type=range]", 1)
    assert shown.caption(T1).startswith("slice 2 of 9, 15 mm left")
    seen.add(shown.picture("figure[data-panel] canvas", T1))
    area = shown.page.locator("figure[data-panel='0'] svg").bounding_box()
    shown.page.mouse.move(area["x"] + 50, area["y"] + 50)
    for notch in (120, 120, -120):
        shown.page.mouse.wheel(0, notch)
        shown.page.wait_for_timeout(60)
    shown.settle()
    assert shown.slice(T1) == 2
    seen.add(shown.picture("figure[data-panel] canvas", T1))
    shown.page.locator("figure[data-panel='0'] svg").focus()
    for key, slice_ in (("ArrowDown", 3), ("PageDown", 8), ("ArrowUp", 7), ("Home", 0), ("End", 8)):
        shown.page.keyboard.press(key)
        shown.settle()
        assert shown.slice(T1) == slice_
    seen.add(shown.picture("figure[data-panel] canvas", T1))
    assert len(seen) == 4 and shown.pictures()[1:] == others


def test_a_click_moves_the_other_series_there(shown, study):
    sagittal, stacks = study.of("Sagittal T1")[0], study.of("Axial T2")
    shown.set("figure[data-panel='0'] > input[type=range]", 2)  # x = 10
    before = shown.pictures()
    place = np.array([10.0, 0.0, 42.0])
    shown.click_patient(T1, sagittal, place)
    assert shown.slice(T1) == 2 and shown.slice(T2) == utils.nearest_slice(sagittal, place)[0] == 2
    assert shown.slice(AXIAL) == utils.nearest_slice(stacks[0], place)[0] == 3
    after = shown.pictures()
    assert after[T1] == before[T1] and after[AXIAL] != before[AXIAL] and after[T2] != before[T2]
    # The axial slice cuts the sagittal one in a level line at its own height: z = 42 is 59 mm below the upper edge.
    line = shown.page.locator("figure[data-panel='0'] line.reference").first
    assert float(line.get_attribute("y1")) == pytest.approx(59) == float(line.get_attribute("y2"))
    # From the tilted stack back to the sagittal ones, right of the middle.
    place = stacks[1].voxel_to_lps([2, 30, 24])
    shown.page.locator("figure[data-panel='1'] select").select_option("stack 2 of 2")
    shown.set("figure[data-panel='1'] > input[type=range]", 8)
    shown.click_patient(AXIAL, stacks[1], place)
    assert shown.slice(AXIAL) == 8 and shown.slice(T1) == utils.nearest_slice(sagittal, place)[0] == 7
    slanted = shown.page.locator("figure[data-panel='0'] line.reference").first
    assert float(slanted.get_attribute("y1")) != pytest.approx(float(slanted.get_attribute("y2")), abs=5)


def test_level_and_condition_lead_to_their_place(shown):
    crop = ".crops svg:nth-of-type(1) image"
    seen = {shown.page.locator(crop).get_attribute("href")}
    shown.page.locator("select[data-pick=level]").select_option("L2/L3")
    shown.page.locator("select[data-pick=condition]").select_option("Left foramen")
    shown.settle()
    assert shown.caption(T1) == "slice 2 of 9, 15 mm left of the spine's middle"
    assert shown.page.locator("td.here").first.get_attribute("data-cell") == "1,1"
    assert "L2/L3" in shown.page.locator(".crop-caption").inner_text()
    assert "L2/L3, left foramen" in shown.page.locator(".answer-caption").inner_text()
    seen.add(shown.page.locator(crop).get_attribute("href"))
    shown.page.locator("td[data-cell='2,2']").first.click()
    shown.settle()
    assert shown.caption(T1) == "slice 8 of 9, 15 mm right of the spine's middle"
    seen.add(shown.page.locator(crop).get_attribute("href"))
    for key, cell in (("4", "3,2"), ("c", "3,3"), ("Shift+C", "3,2"), ("Shift+C", "3,1")):
        shown.page.keyboard.press(key)
        shown.settle()
        assert shown.page.locator("td.here").first.get_attribute("data-cell") == cell
    assert len(seen) == 3


def test_predictions_stand_beside_what_was_read(shown):
    probabilities, truth = make_probabilities()
    shown.page.locator("td[data-cell='2,1']").first.click()
    shown.settle()
    rows = shown.page.locator(".answer .grades tr")
    for number in range(3):
        cells = rows.nth(number).locator("td")
        assert cells.nth(0).inner_text().strip() == f"{probabilities[1, 2, number]:.0%}"
        assert ("read" in cells.nth(2).inner_text()) == (truth[1, 2] == number)
    tables = shown.page.locator("[data-member]")
    assert [tables.nth(n).is_visible() for n in range(2)] == [True, False]
    shown.page.locator("select[data-pick=member]").select_option("level")
    shown.settle()
    assert [tables.nth(n).is_visible() for n in range(2)] == [False, True]


def test_window_and_level_change_the_greys(shown):
    picture = shown.page.locator("figure[data-panel='0'] .picture")
    before = picture.screenshot()
    shown.set("input[data-grey=width]", 0.4)
    darker = picture.screenshot()
    slope = shown.page.locator("filter [data-grey]").first.get_attribute("slope")
    assert float(slope) == pytest.approx(2.5) and darker != before
    area = picture.bounding_box()
    shown.page.keyboard.down("Shift")
    shown.page.mouse.move(area["x"] + 100, area["y"] + 100)
    shown.page.mouse.down()
    shown.page.mouse.move(area["x"] + 160, area["y"] + 100)
    shown.page.mouse.up()
    shown.page.keyboard.up("Shift")
    shown.settle()
    assert float(shown.page.locator("input[data-grey=width]").input_value()) == pytest.approx(0.7)
    shown.page.locator("button[data-reset]").click()
    shown.settle()
    assert picture.screenshot() == before


def test_outlines_can_be_put_on_and_off(shown):
    shown.page.locator("td[data-cell='2,0']").first.click()
    kinds = {"box": "boxes", "bone": "bones", "point": "points", "found": "found", "reference": "lines"}
    there = {kind: shown.count(f"figure[data-panel='2'] .{kind}") for kind in kinds}
    assert there == {"box": 5, "bone": 6, "point": 1, "found": 1, "reference": 1}
    assert "Severe 0.71" in shown.page.locator("figure[data-panel='2'] svg").text_content()
    for kind, name in kinds.items():
        shown.page.locator(f"input[data-show={name}]").click()
        assert shown.count(f"figure[data-panel] .{kind}") == 0
        shown.page.locator(f"input[data-show={name}]").click()
    shown.page.locator("figure[data-panel='2'] svg").focus()
    shown.page.keyboard.press("o")
    assert sum(shown.count(f".picture .{kind}") for kind in kinds) == 0
    shown.page.keyboard.press("o")
    assert {kind: shown.count(f"figure[data-panel='2'] .{kind}") for kind in kinds} == there


def test_closer_shows_less_around_the_place(shown):
    before = shown.pictures()
    shown.page.locator("figure[data-panel='0'] svg").focus()
    shown.page.keyboard.press("z")
    assert all(a != b for a, b in zip(before, shown.pictures()))
    box = shown.page.locator("figure[data-panel='0'] svg").get_attribute("viewBox").split()
    assert box[2:] == ["90", "90"]
    shown.page.keyboard.press("z")
    assert shown.pictures() == before


def test_the_study_turns_in_space(shown):
    space = ".space canvas"
    seen = {shown.picture(space)}
    area = shown.page.locator(space).bounding_box()
    shown.page.mouse.move(area["x"] + 100, area["y"] + 100)
    shown.page.mouse.down()
    shown.page.mouse.move(area["x"] + 180, area["y"] + 120)
    shown.page.mouse.up()
    seen.add(shown.picture(space))
    shown.page.mouse.wheel(0, -300)
    shown.page.wait_for_timeout(100)
    seen.add(shown.picture(space))
    shown.page.keyboard.press("ArrowLeft")
    seen.add(shown.picture(space))
    for look in ("front", "left", "above"):
        shown.page.locator(f"button[data-look={look}]").click()
        seen.add(shown.picture(space))
    shown.page.locator("input[data-show=cloud]").click()
    seen.add(shown.picture(space))
    shown.page.locator("input[data-show=planes]").click()
    seen.add(shown.picture(space))
    assert len(seen) == 9
    # What is chosen above is what stands in space.
    shown.page.locator("input[data-show=planes]").click()
    shown.page.locator("button[data-look=oblique]").click()
    before = shown.picture(space)
    shown.set("figure[data-panel='0'] > input[type=range]", 0)
    assert shown.picture(space) != before


def luminance(colour):
    """Relative luminance of a CSS rgb() colour, as WCAG defines it."""
    channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(chromium, file, scheme):
    page = Page(chromium, file, color_scheme=scheme)
    paper = luminance(page.page.locator(".lumbar-viewer").evaluate("x => getComputedStyle(x).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector in (".title", "summary", "figcaption span", "td[data-cell]", "th", ".legend", ".tools label"):
        ink = luminance(page.page.locator(selector).first.evaluate("x => getComputedStyle(x).color"))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, f"{selector}: {ratio:.1f}"
    page.context.close()


def test_it_fits_a_telephone(chromium, file):
    page = Page(chromium, file)
    page.page.set_viewport_size({"width": 400, "height": 800})
    page.settle()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.page.locator("figure[data-panel='0'] .picture").bounding_box()["width"] > 300
    page.context.close()


def test_two_viewers_on_a_page_keep_apart(chromium, tmp_path, study):
    both = utils.study_html(study, make_boxes()) + utils.study_html(study)
    page = Page(chromium, utils.write_text(tmp_path / "two.html", f"<!doctype html><body>{both}</body>"))
    assert page.problems == []
    first, second = page.page.locator(".lumbar-viewer").all()
    before = second.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
    now = first.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
    first.locator("figure[data-panel] > input[type=range]").first.fill("0")
    page.settle()
    assert first.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") != now
    assert second.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") == before
    page.context.close()
