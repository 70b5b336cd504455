"""The viewer live in a notebook: choose a study, jump to errors and fallbacks.

The kernel reads a study and sends its page once; everything within a study happens in the browser.

May use: inspection, report, slices, viewer_page, names.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from ..names import GRADES
from .inspection import Inspection, fallen_back
from .report import worst_rows
from .slices import CONDITION_NAMES, LEVEL_NAMES
from .viewer_page import FRAGMENT_BYTES

if TYPE_CHECKING:
    import ipywidgets as widgets

# In the frame: the page takes the notebook's theme, and the frame the page's height. Both fail harmlessly where the
# frame may not see the notebook.
_FRAME_SCRIPT = """
(() => {
const root = document.querySelector('.lumbar-viewer');
document.body.style.margin = 0;
try {
  const theme = window.frameElement.ownerDocument.body.dataset.jpThemeLight;
  if (theme) root.dataset.theme = theme === 'true' ? 'light' : 'dark';
  const fit = () => { window.frameElement.style.height = root.offsetHeight + 4 + 'px'; };
  new ResizeObserver(fit).observe(root);
  // Keys reach the frame while the mouse is over it, without a click first, unless somebody is writing.
  let before = null;
  document.documentElement.addEventListener('pointerenter', () => {
    before = window.frameElement.ownerDocument.activeElement;
    if (before === window.frameElement) before = null;
    else if (!before || !before.closest('input,textarea,select,[contenteditable=true]')) window.focus();
  });
  document.documentElement.addEventListener('pointerdown', () => { before = null; });
  document.documentElement.addEventListener('pointerleave', () => {
    if (before && before.isConnected) before.focus({ preventScroll: true });
    before = null;
  });
} catch (error) {}
})();
"""


def inspect_study(inspection: Inspection, worst: int = 30, max_bytes: int = FRAGMENT_BYTES) -> widgets.VBox:
    """Live viewer for a notebook: choose a study, jump to errors and fallbacks; needs a running kernel.

    Opens on a study with predictions, if there is one. Everything within a study happens in the browser (study_html).

    Parameters
    ----------
    inspection : Inspection
    worst : int
        How many errors to list.
    max_bytes : int
        Of one study's slices, see FRAGMENT_BYTES.

    Returns
    -------
    ipywidgets.VBox
        Its `.controls` are the widgets by name, and its `.place` holds the page.

    Raises
    ------
    ValueError
        There is no study.
    """
    import ipywidgets as widgets

    first = inspection.first_study()
    errors, back = _jumps(inspection, worst)
    why = {place[0]: text for text, place in back}
    wide = {"style": {"description_width": "110px"}, "layout": widgets.Layout(width="min(620px, 98%)")}
    studies = sorted(inspection.paths)

    def jumps(description, options):
        options = [(f"choose one of {len(options)}", None), *options] if options else [("none", None)]
        return widgets.Dropdown(description=description, options=options, disabled=len(options) == 1, **wide)

    controls = {
        "study": widgets.Dropdown(description="study", options=studies, value=first, **wide),
        "previous": widgets.Button(description="previous", layout=widgets.Layout(width="90px")),
        "next": widgets.Button(description="next", layout=widgets.Layout(width="90px")),
        "errors": jumps("worst errors", errors),
        "fallbacks": jumps("fell back", back),
        "detections": widgets.Checkbox(
            description="run the detectors on each study", value=False, indent=False, disabled=not inspection.detectors
        ),
    }
    said, place = widgets.HTML(), widgets.VBox(layout=widgets.Layout(overflow="hidden"))
    state = {"start": (3, 0), "busy": False}

    def show(change=None):
        if state["busy"]:
            return
        study_id = controls["study"].value
        said.value = f"study {study_id} &hellip;"
        try:
            page, problems = inspection.study_html(
                study_id, controls["detections"].value, page=True, max_bytes=max_bytes, start=state["start"]
            )
        except Exception as error:
            # One study that cannot be shown must not end the look at the others.
            said.value = html.escape(f"study {study_id} cannot be shown ({type(error).__name__}: {error})")
            place.children = ()
            return
        said.value = html.escape("; ".join([*problems, *([why[study_id]] if study_id in why else [])]))
        # A new widget, not a new value: Jupyter's limit on messages spares those that open one.
        old, place.children = place.children, (widgets.HTML(_frame(page), layout=widgets.Layout(margin="0")),)
        for widget in old:
            widget.close()

    def go(study_id, start):
        """Show a study once, at a level and condition."""
        state["start"], state["busy"] = start, True
        controls["study"].value = study_id
        state["busy"] = False
        show()

    def jumped(change):
        if change["new"] is not None:
            study_id, level, condition = change["new"]
            go(study_id, (3, 0) if level is None else (level, condition))

    def step(by):
        go(studies[(studies.index(controls["study"].value) + by) % len(studies)], state["start"])

    controls["study"].observe(show, "value")
    controls["detections"].observe(show, "value")
    controls["errors"].observe(jumped, "value")
    controls["fallbacks"].observe(jumped, "value")
    controls["previous"].on_click(lambda _: step(-1))
    controls["next"].on_click(lambda _: step(1))
    show()
    top = widgets.HBox([controls["study"], controls["previous"], controls["next"], controls["detections"]])
    viewer = widgets.VBox([top, controls["errors"], controls["fallbacks"], said, place])
    viewer.controls, viewer.place = controls, place
    return viewer


def _jumps(inspection, count):
    """Options of the two lists to jump from: worst errors, studies that fell back: lists of (text, place)."""
    worst, truths, paths = [], inspection.truths, inspection.paths
    said = next(iter(inspection.predicted.values()), {})
    both = [study_id for study_id in said if study_id in truths and study_id in paths]
    if both:
        grades, said = np.array([truths[s] for s in both]), np.array([said[s] for s in both], float)
        # What a member does not say is no error of it.
        grades = np.where(np.isfinite(said).all(-1), grades, -1)
        for rank, row in enumerate(worst_rows(both, grades, np.nan_to_num(said, nan=1 / 3), count).itertuples(), 1):
            text = f"{rank}. study {row.study_id}: {LEVEL_NAMES[row.level]} {CONDITION_NAMES[row.condition].lower()}"
            place = (int(row.study_id), int(row.level), int(row.condition))
            worst.append((f"{text}, label {GRADES[int(row.grade)]}, loss {row.loss:.2f}", place))
    back = [
        (f"study {row.study_id}: {row.why}"[:160], (int(row.study_id), None, None))
        for row in fallen_back(inspection.levels, inspection.log).itertuples()
        if row.study_id in paths
    ]
    return worst, back


def _frame(page):
    """A page as a frame of its own within a notebook: widgets run no scripts, frames do."""
    page = page.replace("</body>", f"<script>{_FRAME_SCRIPT}</script></body>")
    return (
        "<iframe title='study' style='width:100%;height:1500px;border:0;display:block' "
        f'srcdoc="{html.escape(page)}"></iframe>'
    )
