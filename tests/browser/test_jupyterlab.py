"""The notebook `inspect` in a real JupyterLab: it runs, and its controls and its frame do what they should."""

import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from small_study import make_boxes, make_points, make_probabilities, make_study, make_vertebrae

import utils
from lumbar.data.geometry import boxes_to_table
from lumbar.data.volume import Study, save_study
from lumbar.names import LABEL_COLUMNS
from lumbar.spine.vertebra import vertebrae_to_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folders with studies 7 and 9, alike but for the place of the ball, and a study whose levels fell back."""
    out = tmp_path_factory.mktemp("run")
    for name in ("data", "01_preprocess/volumes", "02_train_spinenet", "05_inference"):
        (out / name).mkdir(parents=True)
    study, (probabilities, truth) = make_study(), make_probabilities()
    truth[1, 1] = 2  # read severe; the prediction of study 9 is sure that it is not
    levels, vertebrae = [], []
    for study_id in (7, 9, 11):
        volumes = [replace(v, study_id=study_id, array=v.array * (0.5 + study_id / 20)) for v in study.volumes]
        save_study(Study(study_id, volumes), out / f"01_preprocess/volumes/{study_id}.safetensors")
        boxes = [replace(box, source="prior") if study_id == 11 else box for box in make_boxes()]
        levels.append(boxes_to_table(study_id, boxes))
        vertebrae.append(vertebrae_to_table(study_id, make_vertebrae()))
    pd.concat(levels).to_csv(out / "02_train_spinenet/levels.csv", index=False)
    pd.concat(vertebrae).to_csv(out / "02_train_spinenet/vertebrae.csv", index=False)
    labels = pd.DataFrame([dict(zip(LABEL_COLUMNS, np.array(utils.GRADES)[truth.ravel()]))] * 3)
    labels.assign(study_id=[7, 9, 11]).to_csv(out / "data/train.csv", index=False)
    points = make_points()
    points["condition"] = points["condition"].str.replace("_", " ").str.title()
    points["level"] = points["level"].str.upper().str.replace("_", "/")
    points.rename(columns={"x_px": "x", "y_px": "y"}).to_csv(out / "data/train_label_coordinates.csv", index=False)
    probabilities = np.stack([probabilities] * 3)
    probabilities[1, 1, 1] = (0.5, 0.5, 1e-9)
    table = utils.to_submission([7, 9, 11], probabilities)
    table.to_csv(out / "05_inference/submission.csv", index=False)
    return out


@pytest.fixture(scope="module")
def notebook(run):
    """`inspect` with that run's folders, beside the kit as in the repository."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    folder = run / "notebooks"
    folder.mkdir()
    for name in ("utils.py", "phantom", "lumbar"):
        (run / name).symlink_to(ROOT / name)
    parameters = {
        "DATA": str(run / "data"),
        "PREPROCESSED": str(run / "01_preprocess"),
        "LEVELS_DIR": str(run / "02_train_spinenet"),
        "PREDICTIONS": [],
        "INFERENCE": str(run / "05_inference"),
        "OUT": str(run),
    }
    content = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks/inspect.ipynb")), parameters)
    content.metadata.pop("papermill", None)
    nbformat.write(content, folder / "inspect.ipynb")
    return folder / "inspect.ipynb"


@pytest.fixture(scope="module")
def lab(notebook):
    """Address of a JupyterLab that serves the notebook's folder to this machine alone, with settings of its own."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install jupyterlab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, home = secrets.token_hex(16), notebook.parents[1] / "home"
    home.mkdir()
    own = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    log = (notebook.parents[1] / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
        + [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebook.parent}", "--ServerApp.port_retries=0"]
        + ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        env={**os.environ, **own},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@pytest.fixture(scope="module")
def live(chromium, lab):
    """The page of JupyterLab after all cells were run."""
    page = chromium.new_page(viewport={"width": 1500, "height": 2300})
    try:
        # Other packages' extensions (dash, which comes with open3d) make JupyterLab offer to build itself anew.
        offer = page.locator(".jp-Dialog")
        page.add_locator_handler(offer, lambda: offer.locator(".jp-mod-reject").first.click())
        page.goto(lab)
        page.locator(".jp-Notebook .jp-Cell").first.click(timeout=90_000)
        page.locator("[data-mime-type='text/markdown']").first.wait_for(timeout=60_000)
        page.get_by_text("| Idle").first.wait_for(timeout=90_000)  # the kernel, in the status bar
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        failed = page.locator("[data-mime-type*='stderr'], [data-mime-type*='error']")
        page.locator("iframe[title=study]").or_(failed).first.wait_for(timeout=120_000)
        if page.locator("iframe[title=study]").count() == 0:
            pytest.fail(failed.first.inner_text())
        page.frame_locator("iframe[title=study]").locator("[data-drawn]").wait_for(timeout=60_000)
        yield page
    finally:
        if os.environ.get("SCREENSHOTS"):  # a folder
            page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / "jupyterlab.png")
        page.close()


def study_frame(page, study_id):
    """The frame with the viewer, once it shows a study."""
    frame = page.frame_locator("iframe[title=study]")
    frame.get_by_role("heading", name=f"Study {study_id}").wait_for(timeout=60_000)
    frame.locator("[data-drawn]").wait_for(timeout=60_000)
    return frame


def picture(frame, panel=0):
    frame.locator("body").evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )
    return frame.locator("figure[data-panel] canvas").nth(panel).evaluate("canvas => canvas.toDataURL()")


def choose(page, label, text):
    """Choose the first entry of a widget's list that holds a text."""
    box = page.locator(".widget-dropdown", has_text=label).locator("select")
    entries = box.locator("option").all_text_contents()
    # ipywidgets writes its entries with spaces that do not break.
    number = next((n for n, entry in enumerate(entries) if text in entry.replace("\xa0", " ")), None)
    assert number is not None, f"{label}: {entries}"
    box.select_option(index=number)


def test_the_frame_is_as_tall_as_its_page_and_follows_the_theme(live):
    frame = study_frame(live, 7)
    tall = frame.locator(".lumbar-viewer").evaluate("x => x.offsetHeight")
    assert tall <= live.locator("iframe[title=study]").bounding_box()["height"] <= tall + 20
    assert frame.locator(".lumbar-viewer").get_attribute("data-theme") == "light"


def test_sliders_and_clicks_within_the_study(live):
    frame = study_frame(live, 7)
    before = [picture(frame, n) for n in range(3)]
    frame.locator("figure[data-panel='0'] > input[type=range]").fill("1")
    assert picture(frame, 0) != before[0]
    svg = frame.locator("figure[data-panel='0'] svg")
    area = svg.bounding_box()
    svg.click(position={"x": area["width"] * 0.5, "y": area["height"] * 0.25})
    assert picture(frame, 1) != before[1] and picture(frame, 2) != before[2]
    turned = picture(frame, 0)
    svg.hover()
    live.mouse.wheel(0, 120)
    live.wait_for_timeout(200)
    assert picture(frame, 0) != turned


def test_keys_work_in_the_frame_under_the_mouse(live):
    """Without a click; in the notebook its own keys count again once the mouse has left."""
    live.locator(".jp-Notebook .jp-MarkdownCell").first.click()
    frame, cells = study_frame(live, 7), live.locator(".jp-Notebook .jp-Cell").count()
    live.mouse.move(5, 5)
    frame.locator("figure[data-panel='0'] svg").hover()
    for key in ("2", "ArrowDown"):
        live.keyboard.press(key)
        live.wait_for_timeout(150)
    assert frame.locator("select[data-pick=level]").input_value() == "1"
    live.mouse.move(5, 5)
    live.wait_for_timeout(150)
    assert live.evaluate("document.activeElement.tagName") != "IFRAME"
    assert live.locator(".jp-Notebook .jp-Cell").count() == cells
    frame.locator("select[data-pick=level]").select_option("L4/L5")


def test_controls_change_the_study(live):
    first = picture(study_frame(live, 7))
    live.get_by_role("button", name="next").click()
    assert picture(study_frame(live, 9)) != first
    live.get_by_role("button", name="previous").click()
    study_frame(live, 7)
    choose(live, "worst errors", "1. study 9: L2/L3 left foramen")
    frame = study_frame(live, 9)
    assert frame.locator("td.here").first.get_attribute("data-cell") == "1,1"
    assert frame.locator("select[data-pick=condition]").input_value() == "1"
    choose(live, "fell back", "study 11")
    assert "prior" in study_frame(live, 11).locator(".levels").inner_text()


def test_keys_are_the_static_fragments_own(live):
    """JupyterLab has its own meaning for keys: 1 makes a heading of the cell, x cuts it, z takes back."""
    fragment = live.locator(".jp-OutputArea-output > section.lumbar-viewer, .jp-RenderedHTML > section.lumbar-viewer")
    fragment.first.wait_for(timeout=60_000)
    slider = fragment.locator("figure[data-panel] > input[type=range]").first
    fragment.locator("figure[data-panel] svg").first.click(position={"x": 20, "y": 20})
    before, cells = int(slider.input_value()), live.locator(".jp-Notebook .jp-CodeCell").count()
    for key in ("ArrowDown", "ArrowDown"):
        live.keyboard.press(key)
        live.wait_for_timeout(150)
    assert int(slider.input_value()) == before + 2
    for key in ("1", "x", "o"):
        live.keyboard.press(key)
        live.wait_for_timeout(150)
    assert fragment.count() == 1 and live.locator(".jp-Notebook .jp-CodeCell").count() == cells
    assert fragment.locator("select[data-pick=level]").input_value() == "0"
    assert fragment.locator(".picture .box").count() == 0
