"""What a report's figures and tables show, in sentences: its summary, and its pictures' alternative texts.

May use: page, report, slices, names.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..names import GRADES, GROUPS
from .page import section_id, table_html
from .report import TERM_NAMES, in_doubt, interval_text, second_shares
from .slices import CONDITION_NAMES, LEVEL_NAMES

YARDSTICKS = ("Uniform", "Class prior", "Perfect reader")
HIDDEN_STUDIES, HIDDEN_HOURS = 720, 9  # of the competition's scoring run


class Finding(NamedTuple):
    """A sentence, the report's section that it is from, and whether it asks for attention."""

    section: str
    text: str
    alarm: bool = False


def best_member(scores: pd.DataFrame, name: str) -> tuple[str, float] | None:
    """The member with the lowest score of a score_table and that score; None without one that grades everything."""
    totals = scores["total"].drop([*YARDSTICKS, name], errors="ignore").dropna()
    return (str(totals.idxmin()), float(totals.min())) if len(totals) else None


def headline_table(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """The score and what to compare it with: DataFrame, one row a score_table. name: of the prediction meant."""
    rows = {}
    for split, scores in tables.items():
        total, prior = scores.loc[name, "total"], scores.loc["Class prior", "total"]
        best = best_member(scores, name)
        rows[split] = {name: total, "95% interval": interval_text(scores.loc[name, "low"], scores.loc[name, "high"])}
        if name != "Class prior":
            rows[split] |= {"Class prior": prior, "Lower by": f"{1 - total / prior:.0%}"}
        if best:
            rows[split] |= {"Best member": best[0], "its score": best[1]}
        if "Perfect reader" in scores.index:
            rows[split] |= {"Perfect reader": scores.loc["Perfect reader", "total"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Studies")


def score_findings(tables: Mapping[str, pd.DataFrame], name: str) -> list[Finding]:
    """How a prediction stands against the class prior and against its best member. tables: score_table by split."""
    totals = {split: float(scores.loc[name, "total"]) for split, scores in tables.items()}
    if name == "Class prior":
        told = ", ".join(f"{split}: {total:.3f}" for split, total in totals.items())
        return [Finding("Scores", f"There is no ensemble. The class prior scores ({told}).", True)]
    gains, ranks, worse, behind = [], [], False, False
    for split, scores in tables.items():
        prior, best = float(scores.loc["Class prior", "total"]), best_member(scores, name)
        gain = 1 - totals[split] / prior
        worse |= gain <= 0
        way = "below" if gain > 0 else "above"
        gains.append(f"{split}: {totals[split]:.3f}, {abs(gain):.0%} {way} the class prior ({prior:.3f})")
        if best:
            lag = totals[split] - best[1]
            behind |= lag > 0
            way = "behind" if lag > 0 else "ahead of"
            ranks.append(f"{split}: {abs(lag):.3f} {way} {best[0]} ({best[1]:.3f})")
    found = [Finding("Scores", f"The {name.lower()}'s score. {'; '.join(gains)}.", worse)]
    if ranks:
        text = f"The {name.lower()} and its best member. {'; '.join(ranks)}."
        found.append(Finding("What each step of the ensemble gains", text, behind))
    return found


def scores_text(scores: pd.DataFrame) -> str:
    """`A 0.335, B 0.412; class prior 0.933`: a score_table's totals, best first, yardsticks after.

    Parameters
    ----------
    scores : DataFrame
        Of score_table. Predictions whose total is NaN are left out.

    Returns
    -------
    str
        The names of YARDSTICKS are in lower case.
    """
    totals = scores["total"].dropna().sort_values()
    own = [f"{name} {totals[name]:.3f}" for name in totals.index if name not in YARDSTICKS]
    yardsticks = [f"{name.lower()} {totals[name]:.3f}" for name in totals.index if name in YARDSTICKS]
    return "; ".join(", ".join(part) for part in (own, yardsticks) if part)


def grid_finding(losses: np.ndarray, prior: np.ndarray) -> Finding:
    """Where a prediction gains most and least over the class prior.

    Parameters
    ----------
    losses, prior : (5, 5) array
        By condition and level, of cell_losses: the prediction's and the class prior's; NaN where nothing is graded.

    Returns
    -------
    Finding
        It asks for attention unless the prediction is better everywhere, the same as the prior, or nothing is graded.
    """
    section = "Where it is good and where not"
    gain = np.asarray(prior, float) - np.asarray(losses, float)
    if not np.isfinite(gain).any():
        return Finding(section, "No condition and level is graded.")
    if not np.nan_to_num(gain).any():
        return Finding(section, "Nowhere better or worse than the class prior.")
    least, most = (np.unravel_index(f(gain), gain.shape) for f in (np.nanargmin, np.nanargmax))

    def cell(place):
        name = f"{LEVEL_NAMES[place[1]]} {CONDITION_NAMES[place[0]].lower()}"
        return f"{name} ({losses[place]:.2f}, prior {prior[place]:.2f})"

    better, count = int((gain > 0).sum()), int(np.isfinite(gain).sum())
    text = (
        f"Better than the class prior in {better} of {count} combinations of condition and level; the largest gain is "
        f"at {cell(most)}, the {'smallest' if better == count else 'largest loss'} at {cell(least)}."
    )
    return Finding(section, text, better < count)


def _shares(grades, probabilities):
    """(n,) grades with a prediction, and (n, 3) those predictions."""
    grades, probabilities = np.reshape(grades, -1), np.reshape(probabilities, (-1, 3))
    known = (grades >= 0) & np.isfinite(probabilities).all(-1)
    return grades[known], probabilities[known]


def confusion_text(grades: np.ndarray, probabilities: np.ndarray) -> str:
    """`98% of 50 normal/mild, 40% of 10 moderate, 71% of 7 severe are called that`.

    Parameters
    ----------
    grades : (...) int array
        -1 missing.
    probabilities : (..., 3) array
        By severity; where one is NaN, the grade is left out.

    Returns
    -------
    str
        `nothing is graded` if no grade has a prediction.
    """
    truth, p = _shares(grades, probabilities)
    guess = p.argmax(1) if len(p) else truth
    shares = [
        f"{(guess[truth == k] == k).mean():.0%} of {(truth == k).sum()} {name.lower()}"
        for k, name in enumerate(GRADES)
        if (truth == k).any()
    ]
    return f"{', '.join(shares)} are called that" if shares else "nothing is graded"


def severe_finding(grades: np.ndarray, probabilities: np.ndarray) -> Finding:
    """How many of the severe gradings would be called severe, by group. (n, 5, 5) grades, (n, 5, 5, 3)."""
    parts, least = [], 1.0
    for group, members in GROUPS.items():
        truth, p = _shares(np.asarray(grades)[:, list(members)], np.asarray(probabilities)[:, list(members)])
        severe = p[truth == 2]
        if len(severe):
            called = int((severe.argmax(1) == 2).sum())
            least = min(least, called / len(severe))
            parts.append(f"{TERM_NAMES[group].lower()} {called} of {len(severe)}")
    text = f"Severe cases that would be called severe: {', '.join(parts)}." if parts else "There is no severe case."
    return Finding("Most probable grade and label", text, least < 0.5)


def calibration_text(grades: np.ndarray, probabilities: np.ndarray) -> str:
    """`severe 18% predicted, 12% true`, by grade.

    Parameters
    ----------
    grades : (...) int array
        -1 missing.
    probabilities : (..., 3) array
        By severity; where one is NaN, the grade is left out.

    Returns
    -------
    str
        Mean probability and frequency of each of GRADES; `nothing is graded` if no grade has a prediction.
    """
    truth, p = _shares(grades, probabilities)
    if not len(truth):
        return "nothing is graded"
    return ", ".join(
        f"{name.lower()} {p[:, k].mean():.0%} predicted, {(truth == k).mean():.0%} true"
        for k, name in enumerate(GRADES)
    )


def calibration_finding(grades: np.ndarray, probabilities: np.ndarray) -> Finding:
    """The grade whose mean probability is farthest from its frequency. (n, 5, 5) grades, (n, 5, 5, 3)."""
    worst: tuple[float, str] = (-1.0, "There is nothing to compare.")
    for group, members in GROUPS.items():
        truth, p = _shares(np.asarray(grades)[:, list(members)], np.asarray(probabilities)[:, list(members)])
        for k, name in enumerate(GRADES):
            if len(truth):
                said, came = p[:, k].mean(), (truth == k).mean()
                text = (
                    f"Farthest from what comes true: {TERM_NAMES[group].lower()}, {name.lower()}, predicted with "
                    f"{said:.0%} on average and true in {came:.0%} (the metric rewards expecting the worse)."
                )
                worst = max(worst, (abs(float(said - came)), text))
    return Finding("Calibration", worst[1])


def numbering_text(levels: pd.DataFrame) -> str:
    """How many of a levels.csv's studies have a second numbering, and how likely that is there.

    Parameters
    ----------
    levels : DataFrame
        levels.csv; earlier ones without second and second_share will do.

    Returns
    -------
    str
        `in doubt in 2 of 4 studies, with a second numbering in 2 (50%), which is 30% likely on average`.
    """
    studies = levels.assign(doubt=levels["source"].map(in_doubt))
    studies = studies.assign(share=second_shares(levels)).groupby("study_id")[["doubt", "share"]].max()
    there = studies["share"].dropna()
    text = (
        f"in doubt in {int(studies['doubt'].sum())} of {len(studies)} studies, with a second numbering in {len(there)} "
    )
    text += f"({len(there) / max(len(studies), 1):.0%})"
    return text + (f", which is {there.mean():.0%} likely on average" if len(there) else "")


def levels_finding(compared: pd.DataFrame, levels: Mapping[str, pd.DataFrame]) -> Finding:
    """Whether the boxes lie at the right disc, and where the numbering is doubtful.

    compared: of level_label_table; levels: levels.csv by what its studies are called.
    """
    right = (compared["nearest"] == compared["level"]).mean() if len(compared) else np.nan
    text = f"{right:.1%} of {len(compared)} label points lie at the disc of their level. " if len(compared) else ""
    text += " ".join(f"Numbering of the {title} set: {numbering_text(table)}." for title, table in levels.items())
    doubtful = any(second_shares(table).notna().any() for table in levels.values())
    return Finding("Levels", text, doubtful or right < 0.95)


def left_out_finding(met: Mapping[str, pd.Series], log: pd.DataFrame | None) -> Finding:
    """How much was left out or doubtful, and how many rows rest on a prior. met: sentences by title; log: of 05."""
    said = {title: int(sentences.dropna().astype(bool).sum()) for title, sentences in met.items()}
    told = ", ".join(f"{title.lower()} {count}" for title, count in said.items())
    text = f"Reports of something left out or doubtful: {told}." if any(said.values()) else "Nothing was left out."
    prior = 0
    if log is not None:
        prior = int(log["prior_rows"].sum())
        text += f" {prior} of {25 * len(log)} test rows rest on the class prior alone."
    return Finding("What was left out and why", text, prior > 0)


def time_finding(log: pd.DataFrame) -> Finding:
    """How long inference takes.

    Parameters
    ----------
    log : DataFrame
        inference_log.csv: its column seconds, of one study a row.

    Returns
    -------
    Finding
        It asks for attention if HIDDEN_STUDIES studies would take more than HIDDEN_HOURS hours.
    """
    hours = HIDDEN_STUDIES * log["seconds"].mean() / 3600
    text = (
        f"Inference takes {log['seconds'].mean():.1f} s a study (slowest of {len(log)}: {log['seconds'].max():.1f} s); "
        f"at that pace the {HIDDEN_STUDIES} hidden studies take {hours:.1f} of the {HIDDEN_HOURS} hours."
    )
    return Finding("Time", text, hours > HIDDEN_HOURS)


def worst_finding(worst: pd.DataFrame) -> Finding:
    """The costliest prediction. worst: of worst_rows."""
    section = "The worst predictions"
    return Finding(
        section, f"The costliest: {example_text(next(worst.itertuples()))}." if len(worst) else "None is wrong."
    )


def example_text(row) -> str:
    """A row of worst_rows in words.

    Parameters
    ----------
    row : namedtuple
        Of the table's itertuples.

    Returns
    -------
    str
        `study 7, L5/S1 left foramen, labelled severe, which was given 5%`.
    """
    return (
        f"study {row.study_id}, {LEVEL_NAMES[row.level]} {CONDITION_NAMES[row.condition].lower()}, labelled "
        f"{GRADES[row.grade].lower()}, which was given {np.exp(-row.loss):.0%}"
    )


def curves_text(runs: Mapping[str, pd.DataFrame], x: str) -> str:
    """Where each training history begins and ends, and its best held-out score.

    Parameters
    ----------
    runs, x
        As plot_learning_curves takes histories and x. Of a history's columns loss and train/cls_loss (begin and end),
        total (its lowest) and metrics/mAP50(B) (its highest) are told.

    Returns
    -------
    str
        `no figures` if there are none.
    """
    parts = []
    for name, history in runs.items():
        for column, words, best in (
            ("loss", "training loss", None),
            ("train/cls_loss", "training loss", None),
            ("total", "held-out score", "idxmin"),
            ("metrics/mAP50(B)", "mAP50", "idxmax"),
        ):
            if column not in history:
                continue
            values = pd.to_numeric(history[column], errors="coerce").dropna()
            if len(values) and best:
                place = getattr(values, best)()
                parts.append(f"{name} {words} best at {x} {history.loc[place, x]:g} with {values[place]:.3f}")
            elif len(values):
                parts.append(f"{name} {words} from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}")
    return "; ".join(parts) or "no figures"


def report_findings(
    tables: Mapping[str, pd.DataFrame],
    name: str,
    losses: tuple[np.ndarray, np.ndarray],
    graded: tuple[np.ndarray, np.ndarray],
    located: tuple[pd.DataFrame, Mapping[str, pd.DataFrame]],
    worst: pd.DataFrame,
    met: Mapping[str, pd.Series],
    log: pd.DataFrame | None,
) -> list[Finding]:
    """All findings of a report.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Name of a split -> its score_table, which has a row `Class prior`.
    name : str
        Of the prediction meant, a row of each of these tables.
    losses : pair of (5, 5) arrays
        The arguments of grid_finding.
    graded : pair of (n, 5, 5) int and (n, 5, 5, 3) arrays
        Grades, -1 missing, and the prediction's probabilities, NaN where there are none.
    located : pair of DataFrame and mapping
        The table of level_label_table, and levels.csv by what its studies are called.
    worst : DataFrame
        Of worst_rows.
    met : mapping of str to Series
        Title of a set of studies -> sentences on what was left out or doubtful, NaN or empty where nothing was.
    log : DataFrame, optional
        inference_log.csv; None: nothing is said of test rows on the class prior and of time.

    Returns
    -------
    list of Finding
        In the order of the report's sections.
    """
    return [
        *score_findings(tables, name),
        grid_finding(*losses),
        severe_finding(*graded),
        calibration_finding(*graded),
        levels_finding(*located),
        worst_finding(worst),
        left_out_finding(met, log),
        *([] if log is None else [time_finding(log)]),
    ]


def summary_html(
    tables: Mapping[str, pd.DataFrame], name: str, findings: Iterable[Finding], sections: Sequence[str]
) -> str:
    """A report's summary and contents: the score, what asks for attention first, each with a link to its section.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Name of a split -> its score_table with intervals (draws above 0) and a row `Class prior`.
    name : str
        Of the prediction meant, a row of each of these tables.
    findings : iterable of Finding
    sections : sequence of str
        The headings that follow.

    Returns
    -------
    str
        HTML for a page that has these headings; texts are escaped.
    """
    ordered = sorted(findings, key=lambda finding: not finding.alarm)

    def link(section):
        return f'<a href="#{html.escape(section_id(section))}">{html.escape(section)}</a>'

    items = "".join(
        f"<li>{'<strong>Look here.</strong> ' if finding.alarm else ''}{html.escape(finding.text)} "
        f"<span class=to>&rarr;&nbsp;{link(finding.section)}</span></li>"
        for finding in ordered
    )
    contents = "".join(f"<li>{link(section)}</li>" for section in sections)
    return (
        table_html(headline_table(tables, name), "The score, a weighted log loss: lower is better.")
        + f"<h3>What to look at</h3><ul>{items}</ul><h3>Contents</h3><ol class=contents>{contents}</ol>"
    )
