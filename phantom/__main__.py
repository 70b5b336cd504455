"""The command line: python -m phantom OUT, and the phantom's figure.

May use: anatomy, dataset, hardship, scanner.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .anatomy import RECESS_U_MM, TRUTH_VERTEBRAE
from .dataset import READERS, make_dataset, simulate
from .hardship import HARD, Hardship
from .scanner import acquire_study


def _panel(ax, image, title, centre=None, half_mm=None, spacing_mm=1.0, window=None):
    """Show a slice, or the square of +-half_mm around a pixel (x, y)."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=window or np.percentile(image, 98), interpolation="bicubic")
    if centre is not None:
        r = half_mm / spacing_mm
        ax.set_xlim(centre[0] - r, centre[0] + r)
        ax.set_ylim(centre[1] + r, centre[1] - r)
    ax.set_title(title, fontsize=10)
    ax.set_xticks([]), ax.set_yticks([])


def figure(out_png: str | Path, seed: int = 3) -> None:
    """Draw one study in three planes, and one level healthy beside the same level severe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def study(severity):
        anatomy, _, _, grids, plans, rng = simulate(seed, severity=severity, anomalies="none")
        return anatomy, plans, acquire_study(rng, anatomy, grids, plans)

    def cut(made, key):
        anatomy, plans, stacks = made
        kind = "Sagittal T2/STIR" if key[0] == 0 else "Sagittal T1" if key[0] < 3 else "Axial T2"
        i = [p.description for p in plans].index(kind)
        k, x, y, _ = plans[i].project(anatomy.points_mm()[key])
        return stacks[i][k], (x, y), plans[i].spacing_mm[0], plans[i], k

    level = 3
    mild = np.full((5, 5), 0.1)
    ill = {name: mild.copy() for name in ("canal", "foramen", "recess")}
    ill["canal"][0, level] = ill["foramen"][1, level] = ill["recess"][3, level] = 2.6
    healthy, made = study(mild), {k: study(v) for k, v in ill.items()}

    fig = plt.figure(figsize=(15, 11.6), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=[1.0, 1.85])
    top, bottom = parts
    axes = top.subplots(1, 4)
    anatomy, plans, stacks = healthy
    t1 = next(i for i, p in enumerate(plans) if p.description == "Sagittal T1")
    image, _, _, plan, k = cut(healthy, (0, 2))
    j = plans[t1].project(anatomy.points_mm()[0, 2])[0]
    _panel(axes[0], stacks[t1][j], "Sagittal T1, middle")
    _panel(axes[1], image, f"Sagittal {plan.contrast}, middle")
    for ax, p, i in ((axes[0], plans[t1], j), (axes[1], plan, k)):
        for v in anatomy.vertebrae:
            q = v.centre_mm - p.position_mm[i]
            x, y = q @ p.row_cosine[i] / p.spacing_mm[1], q @ p.column_cosine[i] / p.spacing_mm[0]
            if 0 < y < p.shape[0] and v.name in TRUTH_VERTEBRAE:
                ax.text(x, y, v.name, color="gold", fontsize=8, ha="center", va="center")
    _panel(axes[2], cut(healthy, (1, 2))[0], "Sagittal T1 through the left foramina")
    _panel(axes[3], cut(healthy, (3, 2))[0], "Axial T2 at L3/L4")
    axes = bottom.subplots(2, 4)
    shows = (
        ("canal", (0, level), 42, "Canal, sagittal T2"),
        ("canal", (3, level), 42, "Canal, axial T2"),
        ("foramen", (1, level), 38, "Left foramen, sagittal T1"),
        ("recess", (3, level), 34, "Left recess, axial T2"),
    )
    for column, (which, key, half, title) in enumerate(shows):
        for row, (one, word) in enumerate(((healthy, "healthy"), (made[which], "severe"))):
            image, (x, y), spacing, *_ = cut(one, key)
            if which == "canal" and key[0] == 3:
                x -= RECESS_U_MM / spacing
            r = int(half / spacing)
            inside = image[max(0, int(y) - r) : int(y) + r, max(0, int(x) - r) : int(x) + r]
            window = 1.05 * np.percentile(inside, 99)
            _panel(axes[row, column], image, f"{title}: {word}", (x, y), half, spacing, window)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out_png, dpi=80)
    plt.close(fig)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m phantom", description="Synthetic lumbar MRI in the competition's layout."
    )
    parser.add_argument("out", nargs="?", help="folder to write")
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prevalence", type=float, default=1.0, help="factor on the odds of disease")
    parser.add_argument("--transitional", type=float, default=0.03, help="share of transitional vertebrae")
    parser.add_argument("--compress", choices=("none", "rle", "j2k"), default="none")
    parser.add_argument("--anomalies", choices=("real", "none"), default="real")
    parser.add_argument("--variety", choices=("standard", "wide"), help="spread of spines (standard)")
    parser.add_argument(
        "--readers",
        choices=tuple(READERS),
        default="from above",
        help="how transitional spines are numbered: %(default)s, or so that the last full disc is L5/S1",
    )
    easy = Hardship()
    hard = f"wide variety, motion {HARD.motion}, slips {HARD.slips}, scatter {HARD.scatter_mm} mm, unless given"
    parser.add_argument("--hard", action="store_true", help=hard)
    parser.add_argument(
        "--motion",
        type=float,
        help=f"share of series with artefacts; half as many are torn, all lie beside their headers ({easy.motion:g})",
    )
    parser.add_argument(
        "--slips",
        type=float,
        help=f"share of training levels named by a neighbour's name, and of grades one off ({easy.slips:g})",
    )
    parser.add_argument("--scatter", type=float, metavar="MM", help=f"of label points ({easy.scatter_mm:g})")
    parser.add_argument("--figure", metavar="PNG", help="draw an example instead")
    a = parser.parse_args(arguments)
    if a.figure:
        figure(a.figure)
        return 0
    if not a.out:
        parser.error("OUT is missing")
    if a.train + a.test < 1:
        parser.error("--train and --test are both 0: there is nothing to make")
    base = HARD if a.hard else easy
    given = {"motion": a.motion, "slips": a.slips, "scatter_mm": a.scatter}
    try:
        hardship = replace(base, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        parser.error(str(error))
    try:
        floor = make_dataset(
            a.out,
            a.train,
            a.test,
            a.seed,
            a.workers,
            a.prevalence,
            a.transitional,
            a.compress,
            a.anomalies,
            variety=a.variety or ("wide" if a.hard else "standard"),
            readers=a.readers,
            hardship=hardship,
        )
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    print("floor (score of a reader who knows the anatomy): " + ", ".join(f"{k} {v:.4f}" for k, v in floor.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
