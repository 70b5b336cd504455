"""A study as a page that opens offline in any browser, or as a fragment for a notebook or report.

viewer.js draws what viewer_data gives it, so nothing waits for a kernel, the page also works without one, and neither
needs a library beyond what shows an HTML page.

May use: slices, viewer_data, spine, data, names.
"""

import html
import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.geometry import LevelBox
from ..data.source import Source
from ..data.volume import Study
from ..names import CONDITIONS, DESCRIPTIONS, GRADES, LEVELS
from ..spine.vertebra import Vertebra
from .slices import CONDITION_NAMES, LEVEL_NAMES, SEVERITY_COLOURS, level_name
from .viewer_data import tilt_caption, viewer_data

PAGE_BYTES = 6_000_000  # for the slices' pictures of a page: with the rest it stays below 10 MB, which mail takes
FRAGMENT_BYTES = 2_000_000  # of a fragment in a notebook: Jupyter drops more than 3 MB in three seconds

_KEYS = (
    (
        "wheel, slider, arrow keys",
        "turn the slices of the image under the mouse (framed), without a mouse of the one that has the focus or on "
        "which the condition is graded; Page up and down: five; space, shift space: the page",
    ),
    ("click or drag", "the other series follow to that place; dashed white: where their slices cut this one"),
    ("1 2 3 4 5", "the level, L1/L2 to L5/S1"),
    ("c, shift c", "next, previous condition"),
    ("z", "closer, around the marked place"),
    ("o", "all outlines off and on"),
    ("+ &minus; 0, shift and drag", "contrast and brightness; 0: as at first"),
    ("in space", "drag or arrow keys turn, wheel or + &minus; come closer"),
)


_NOTE = "<p style='font:13px/1.5 system-ui,sans-serif;margin:8px 16px'>Research software, not a medical device.</p>"


def study_html(
    study: Study,
    boxes: Iterable[LevelBox] | None = None,
    points: pd.DataFrame | None = None,
    probabilities: np.ndarray | Mapping[str, np.ndarray] | None = None,
    truth: np.ndarray | None = None,
    title: str | None = None,
    page: bool = False,
    max_bytes: int | None = None,
    vertebrae: Iterable[Vertebra] | None = None,
    detections: pd.DataFrame | None = None,
    start: tuple[int, int] = (3, 0),
) -> str:
    """A study to look through in any browser, offline: one file or fragment with pictures, style and script inside.

    Three linked panels of slices, the chosen level's crop in three planes along its disc, the study in space, and a
    table of all cells; viewer.js draws them. A click in one series moves the others to the same point in the patient.
    Shows no id but the study's, in `title`.

    Parameters
    ----------
    study : Study
        Normalised.
    boxes : iterable of LevelBox, optional
        Outlined; dashed below a confidence of 0.5.
    points : DataFrame, optional
        Label points as read_coordinates has them (any studies).
    probabilities : (5, 5, 3) array or mapping of str to such, optional
        By condition, level and severity; by name of who predicts. NaN where nothing is said.
    truth : (5, 5) int array, optional
        Grades of this study by condition and level, -1 missing.
    title : str, optional
        Any text, escaped here; default: `Study <id>`.
    page : bool
        A whole page instead of a fragment for a notebook or report; several fragments on a page do not disturb each
        other.
    max_bytes : int, optional
        For the slices' pictures, which become coarser to fit, and fewer where that is not enough (default PAGE_BYTES,
        FRAGMENT_BYTES); crops and the rest add about 0.7 MB.
    vertebrae : iterable of Vertebra, optional
    detections : DataFrame, optional
        Table of study_detections (any studies).
    start : (2,) tuple of int
        Level and condition shown first, indices.

    Returns
    -------
    str
        The HTML text.
    """
    boxes, vertebrae = list(boxes or ()), list(vertebrae or ())
    points, detections = (
        None if table is None else table[table["study_id"] == study.study_id] for table in (points, detections)
    )
    members = _by_member(probabilities)
    data = viewer_data(
        study, boxes, points, vertebrae, detections, max_bytes or (PAGE_BYTES if page else FRAGMENT_BYTES)
    ) | _answers(members, truth, start)
    identity = f"viewer-{uuid.uuid4().hex}"
    style, script = _style_and_script(data, identity)
    name = html.escape(title or f"Study {study.study_id}")
    marks = [("boxes", "level boxes", boxes), ("bones", "vertebrae", vertebrae)]
    marks += [("points", "label points", points is not None and len(points))]
    marks += [("found", "detections", detections is not None and len(detections)), ("lines", "slice lines", True)]
    tag, heading, whole = ("main", "h1", " data-page") if page else ("section", "h3", "")
    fragment = (
        f"<style>{style}</style><{tag} class=lumbar-viewer id={identity}{whole} aria-label='{name}' "
        f"data-lm-suppress-shortcuts=true><div class=head><{heading} class=title>{name}</{heading}>{_picks(members)}"
        f"{_help()}</div>{_doubt(boxes)}{_answer(data)}{_tools(marks)}"
        f"<div class=panels>{_figures(data)}</div>{_below(data, boxes)}"
        f"{_tables(members, truth, always=bool(boxes))}{_legend() if members else ''}"
        f"<noscript>The images need JavaScript.</noscript>{_grey_filter(identity)}</{tag}><script>{script}</script>"
    )
    if not page:
        return fragment
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>{name}</title></head>"
        f"<body>{fragment}{_NOTE}</body></html>\n"
    )


def _by_member(probabilities: np.ndarray | Mapping[str, np.ndarray] | None) -> Mapping[str, np.ndarray]:
    """dict name -> (5, 5, 3) from what study_html takes as probabilities."""
    if probabilities is None:
        return {}
    return probabilities if isinstance(probabilities, Mapping) else {"prediction": probabilities}


def _answers(members: Mapping[str, np.ndarray], truth: np.ndarray | None, start: Iterable[int]) -> dict[str, Any]:
    """What viewer.js shows of a cell that is chosen, and the one that it shows first."""
    return {
        "members": [
            [
                [row.round(4).tolist() if np.isfinite(row).all() else None for row in cells]
                for cells in np.asarray(p, float)
            ]
            for p in members.values()
        ],
        "names": [str(name) for name in members],
        "truth": None if truth is None else np.asarray(truth, int).tolist(),
        "start": [int(number) for number in start],
    }


def _help() -> str:
    keys = "".join(f"<dt>{key}</dt><dd>{meaning}</dd>" for key, meaning in _KEYS)
    return f"<details><summary>Mouse and keys</summary><dl>{keys}</dl></details>"


def _picks(members: Mapping[str, np.ndarray]) -> str:
    several = _choice("member", "table of", members) if len(members) > 1 else ""
    return (
        f"<div class=picks>{_choice('level', 'level', LEVEL_NAMES)}"
        f"{_choice('condition', 'condition', CONDITION_NAMES)}{several}</div>"
    )


def _doubt(boxes: Sequence[LevelBox]) -> str:
    """A sentence on the numbering where stage 1 doubts it."""
    others = [box for box in boxes if box.second]
    if others:
        shares = {f"{box.second_share:.0%}" for box in others}
        alike = f" ({shares.pop()} likely)" if len(shares) == 1 else ""
        names = ", ".join(
            f"{level_name(box.level)} would be {level_name(box.second)}"
            + ("" if alike else f" ({box.second_share:.0%} likely)")
            for box in others
        )
        doubted = any(Source.UNCERTAIN in box.source for box in boxes)
        which = "The numbering of the levels is in doubt." if doubted else "A second numbering is possible."
        text = f"<b>{which}</b> By the second one{alike} {html.escape(names)}."
    elif any(Source.UNCERTAIN in box.source for box in boxes):
        text = "<b>The numbering of the levels is in doubt.</b>"
    elif boxes and all(box.source & (Source.PRIOR | Source.AXIAL) for box in boxes):
        text = "<b>The levels are guessed</b>, no sagittal image showed a vertebra: their numbering is not known."
    else:
        return ""
    return f"<p class=doubt>{text}</p>"


def _tools(marks: Sequence[tuple[str, str, object]]) -> str:
    """The row of choices above the slices; marks: what may be drawn on them: (name, words, whether there is any)."""
    toggles = "".join(
        f"<label><input type=checkbox data-show={mark} checked> {text}</label>" for mark, text, there in marks if there
    )
    return (
        f"<div class=tools>{toggles}<label><input type=checkbox data-zoom> closer</label>"
        "<span><label>window: centre <input type=range data-grey=centre min=0 max=1 step=0.01 value=0.5></label>"
        "<label>width <input type=range data-grey=width min=0.05 max=2 step=0.01 value=1></label>"
        "<button data-reset>reset</button></span></div>"
    )


def _choice(name: str, text: str, options: Iterable[object]) -> str:
    items = "".join(f"<option value={number}>{html.escape(str(item))}</option>" for number, item in enumerate(options))
    return f"<label>{text} <select data-pick={name}>{items}</select></label>"


def _figures(data: Mapping[str, Any]) -> str:
    """The three panels of slices."""
    figures = []
    for number, (description, frames) in enumerate(zip(DESCRIPTIONS, data["panels"])):
        if not frames:
            figures.append(
                f"<figure><figcaption><b>{description}</b></figcaption>"
                "<div class=none>no such series in this study</div></figure>"
            )
            continue
        stacks = list(dict.fromkeys(frame["s"] for frame in frames))
        series = "".join(
            f"<option value={stack}>stack {place} of {len(stacks)}</option>" for place, stack in enumerate(stacks, 1)
        )
        figures.append(
            f"<figure data-panel={number}><figcaption><b>{description}</b>"
            + (f"<select aria-label='stack of {description}'>{series}</select>" if len(stacks) > 1 else "")
            + f"<span></span></figcaption><div class=picture><canvas class=grey></canvas>"
            f"<svg tabindex=0 role=img aria-label='{description}'><g></g></svg></div>"
            f"<input type=range min=0 max={len(frames) - 1} value={len(frames) // 2} "
            "aria-label='slice of {description}'></figure>".replace("{description}", description)
        )
    return "".join(figures)


def _below(data: Mapping[str, Any], boxes: Sequence[LevelBox]) -> str:
    """What stands below the slices: the crops, the study in space, where the levels are from."""
    crops = _crops_figure() if data["crops"] else ""
    space = _space_figure() if any(data["panels"]) else ""
    return f"<div class=below>{crops}{space}{_sources(boxes)}</div>"


def _crops_figure() -> str:
    names = "".join(f"<b>{description}</b>" for description in DESCRIPTIONS)
    cells = "".join(
        f"<svg role=img aria-label='{plane} plane of the crop, {description}'>"
        "<image class=grey preserveAspectRatio=none></image><g></g></svg>"
        for plane, description in itertools.product(("sagittal", "coronal", "axial"), DESCRIPTIONS)
    )
    return (
        "<figure><figcaption><b>The level along its disc</b><span class=crop-caption></span></figcaption>"
        f"<div class=crops>{names}{cells}</div><div class=row>Planes through the condition&rsquo;s place. "
        "Black: no slice there.</div></figure>"
    )


def _space_figure() -> str:
    shown = "".join(
        f"<label><input type=checkbox data-show={name}{state}> {text}</label>"
        for name, text, state in (("planes", "slices", " checked"), ("cloud", "points", ""))
    )
    looks = "".join(f"<button data-look={name}>{name}</button>" for name in ("oblique", "front", "left", "above"))
    return (
        "<figure class=space><figcaption><b>In space</b><span>the slices as chosen, level boxes, vertebrae</span>"
        "</figcaption><canvas tabindex=0 role=img aria-label='the study in space'></canvas>"
        f"<div class=row>{shown}<span>from {looks}</span></div></figure>"
    )


def _answer(data: Mapping[str, Any]) -> str:
    """The chosen cell's probabilities and label; "" without either."""
    if not data["members"] and not data["truth"]:
        return ""
    heads = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in data["names"])
    title, label = ("Predicted and read", "<th scope=col>Label</th>") if data["truth"] else ("Predicted", "")
    return (
        f"<figure class=answer style='--members:{len(data['members'])}'><figcaption><b>{title}</b>"
        "<span class=answer-caption aria-live=polite></span></figcaption>"
        f"<table><thead><tr><th scope=col>Grade</th>{heads}{label}</tr></thead>"
        "<tbody class=grades></tbody></table>"
        + ("" if data["members"] else "<p>No prediction of this study was given.</p>")
        + "</figure>"
    )


def _sources(boxes: Sequence[LevelBox]) -> str:
    """Where the levels are from, and what a second numbering calls them; "" without levels."""
    doubted = any(box.second for box in boxes)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(level_name(box.level))}</th>"
        + (f"<td>{_second(box)}</td>" if doubted else "")
        + f"<td>{html.escape((str(box.source) or 'unknown').replace('+', ' + '))}</td>"
        f"<td>{box.confidence:.2f}</td><td>{tilt_caption(box)}</td></tr>"
        for box in boxes
    )
    if not rows:
        return ""
    second = "<th scope=col>Or</th>" if doubted else ""
    return (
        "<figure class=sources><figcaption><b>Where the levels are from</b></figcaption><table class=levels><thead><tr>"
        f"<th scope=col>Level</th>{second}<th scope=col>Found on</th><th scope=col>Sure</th><th scope=col>Tilt</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></figure>"
    )


def _second(box: LevelBox) -> str:
    return f"{html.escape(level_name(box.second))}, {box.second_share:.0%}" if box.second else "&ndash;"


def _tables(members: Mapping[str, np.ndarray], truth: np.ndarray | None, always: bool) -> str:
    """A table of all cells for each member; without any the labels' alone, if there are some or `always`."""
    tables = "".join(
        f"<div data-member={number}{' hidden' if number else ''}>{grade_table_html(p, truth)}</div>"
        for number, p in enumerate(members.values())
    )
    tables = tables or (grade_table_html(None, truth) if truth is not None or always else "")
    return (
        f"<div class=scroll tabindex=0 role=group aria-label='all levels and conditions'>{tables}</div>"
        if tables
        else ""
    )


def _legend() -> str:
    swatches = "".join(
        f"<i class=swatch style='background:{colour}'></i>{grade}" for grade, colour in zip(GRADES, SEVERITY_COLOURS)
    )
    return (
        f"<div class=legend>Probabilities:{swatches}. Bold: the label is not the most probable grade. "
        "A cell shows its place in all series.</div>"
    )


def _style_and_script(data: Mapping[str, Any], identity: str) -> tuple[str, str]:
    """viewer.css and viewer.js with the data in it, for the element of this id."""
    # Names come from outside: without this sign none of them can end the script.
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    here = Path(__file__).parent
    style, script = ((here / f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return style, script.replace("ROOT_ID", f"'{identity}'", 1).replace("data = DATA", f"data = {numbers}", 1)


def grade_table_html(probabilities: np.ndarray | None = None, truth: np.ndarray | None = None) -> str:
    """A study's 25 cells as an HTML table: most probable grade, its probability, a bar, the grade in the labels."""
    head = "".join(f"<th scope=col>{name}</th>" for name in ("Level", *CONDITION_NAMES))
    rows = []
    for number in range(len(LEVELS)):
        cells = [f"<th scope=row>{LEVEL_NAMES[number]}</th>"]
        for condition in range(len(CONDITIONS)):
            text, read = "", -1 if truth is None else int(truth[condition][number])
            if probabilities is not None and np.isfinite(probabilities[condition][number]).all():
                p = np.asarray(probabilities[condition][number], np.float64)
                guess = int(p.argmax())
                bar = "".join(
                    f"<i style='width:{100 * part:.1f}%;background:{colour}'></i>"
                    for part, colour in zip(p, SEVERITY_COLOURS)
                )
                spoken = ", ".join(f"{grade} {part:.0%}" for grade, part in zip(GRADES, p))
                text = f"<span title='{spoken}'>{GRADES[guess]} {p[guess]:.0%}</span>"
                if read >= 0:
                    text += f"<br><span class='{'miss' if read != guess else 'hit'}'>label: {GRADES[read]}</span>"
                text += f"<div class=bar aria-hidden=true>{bar}</div>"
            elif read >= 0:
                text = f"label: {GRADES[read]}"
            cells.append(f"<td tabindex=0 data-cell={number},{condition}>{text or '&ndash;'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _grey_filter(identity):
    """Window and level for all pictures of one viewer: a straight line from stored to shown grey."""
    functions = "".join(f"<feFunc{c} type=linear slope=1 intercept=0 data-grey></feFunc{c}>" for c in "RGB")
    return (
        f"<style>#{identity} .grey{{filter:url(#{identity}-grey)}}</style>"
        f"<svg width=0 height=0 style='position:absolute' aria-hidden=true>"
        f"<filter id={identity}-grey color-interpolation-filters=sRGB><feComponentTransfer>"
        f"{functions}</feComponentTransfer></filter></svg>"
    )
