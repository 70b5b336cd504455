"""Stage 1 on real lumbar MR: which levels are named right, which are said to be in doubt, and whether doubt is honest.

    python tests/benchmarks/bench_real.py FOLDER [--weights spinenet.safetensors] [--out real.csv] [--sheet real.png]

FOLDER holds NAME.npz with `image` uint8 (slice, row, column), rows to the feet, columns to the back, pixels of 1 mm,
slices 4 mm apart, and truth.csv with volume, description, kind (`body` or `level`), name and x_mm, y_mm, z_mm. A level
is right where its centre lies within half a body's height of the true one; a level without a true centre does not
count. Without the folder nothing is measured. --sheet draws the volumes that are wrong or in doubt.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.data.source import Source  # noqa: E402
from lumbar.data.volume import Study, Volume  # noqa: E402
from lumbar.look.plot_images import plot_slice, plot_vertebrae  # noqa: E402
from lumbar.names import LEVEL_VERTEBRAE, progress  # noqa: E402
from lumbar.spine import naming  # noqa: E402
from lumbar.spine.levels import locate_levels  # noqa: E402
from lumbar.spine.placement import Placement  # noqa: E402
from lumbar.spine.spinenet import load_spinenet  # noqa: E402

RIGHT_MM = 13.0  # half a body's height


def read_volume(path, description):
    """A Study of the one volume, on the kit's grey scale; patient coordinates are centred on it."""
    image = np.load(path)["image"].astype(np.float32)
    n, rows, columns = image.shape
    affine = np.array(
        [[4.0, 0, 0, -2.0 * (n - 1)], [0, 0, 1, -(columns - 1) / 2], [0, -1, 0, (rows - 1) / 2], [0, 0, 0, 1]]
    )
    return normalise_study(Study(1, [Volume(image, affine, 1, 1, description, 0, np.arange(n) + 1)]))


def true_levels(rows):
    """dict level -> (3,) centre in millimetres, of the levels that the truth has."""
    where = {row.name_: np.array([row.x_mm, row.y_mm, row.z_mm]) for row in rows.itertuples()}
    levels = {}
    for level, (upper, lower) in LEVEL_VERTEBRAE.items():
        if level in where:
            levels[level] = where[level]
        elif upper in where and lower in where:
            levels[level] = (where[upper] + where[lower]) / 2
    return levels


def judge(boxes, truth):
    """A row of the table: how many of the true levels are right, whether all are, doubt, the second numbering."""
    right = {}
    for box in boxes:
        if box.level in truth:
            # Across the slices the truth's side is not known.
            right[box.level] = np.linalg.norm((box.center_lps_mm - truth[box.level])[1:]) < RIGHT_MM
    second = next((box for box in boxes if box.second), None)
    return {
        "levels": len(right),
        "right": sum(right.values()),
        "all_right": all(right.values()),
        "doubtful": any(Source.UNCERTAIN in box.source for box in boxes if box.level in truth),
        "second_share": second.second_share if second else 0.0,
        "confidence": float(np.median([box.confidence for box in boxes])),
    }


@contextlib.contextmanager
def every_second_numbering():
    """Let stage 1 say of every second numbering how likely it is, also of those that it leaves out as too unlikely:
    else a curve would take what is said at .90 and above for certain."""
    with mock.patch.object(naming, "_LEAST_SHARE", 0.0):
        yield


def reliability(table, edges=(0.0, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)):
    """How often the first numbering is right, by how likely it is said to be."""
    said = 1 - table["second_share"]
    bins = pd.cut(said, edges, include_lowest=True)
    return (
        table.groupby(bins, observed=True)
        .agg(chains=("all_right", "size"), right=("all_right", "mean"))
        .reset_index(names="said")
    )


def draw_sheet(path, cases, columns=5):
    """A PNG of (title, study, bodies found, dict level -> true centre): the middle slice of each, truth as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (title, study, bodies, truth) in zip(axes.flat, cases):
        volume = study.volumes[0]
        middle = volume.lps_to_voxel(np.mean([body.center_lps_mm for body in bodies], 0))[0] if bodies else 0
        index = int(np.clip(round(middle), 0, len(volume.array) - 1))
        plot_slice(ax, volume, index)
        plot_vertebrae(ax, volume, index, bodies)
        for level, center in truth.items():
            _, row, column = volume.lps_to_voxel(center)
            ax.plot(column, row, "x", color="lime")
            ax.annotate(level, (column, row), (6, 0), textcoords="offset points", color="lime", fontsize=7, va="center")
        ax.set_title(title, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measure(folder, weights, sheet=None):
    """The table of judge's rows, one a volume; sheet: a file for draw_sheet of those that are wrong or in doubt."""
    placement = Placement.of(load_spinenet(weights))
    truth = pd.read_csv(folder / "truth.csv").rename(columns={"name": "name_"})
    rows, odd = [], []
    for volume, known in progress(truth.groupby("volume"), "volumes", truth["volume"].nunique()):
        study = read_volume(folder / f"{volume}.npz", known["description"].iloc[0])
        with every_second_numbering():
            boxes, bodies = locate_levels(study, placement)
        levels = true_levels(known)
        row = {"volume": volume, "set": volume.split("_")[0], **judge(boxes, levels)}
        rows.append(row)
        if not row["all_right"] or row["doubtful"]:
            said = f"in doubt, second {row['second_share']:.2f}" if row["doubtful"] else "sure"
            odd.append((f"{volume}: {'right' if row['all_right'] else 'wrong'}, {said}", study, bodies, levels))
    if sheet and odd:
        draw_sheet(sheet, odd)
    return pd.DataFrame(rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "spinenet_phantom.safetensors")
    parser.add_argument("--out", type=Path, help="the table as CSV")
    parser.add_argument("--sheet", type=Path, help="a picture of those that are wrong or in doubt")
    options = parser.parse_args(arguments)
    if not (options.folder / "truth.csv").is_file():
        print(f"{options.folder} has no truth.csv: nothing is measured")
        return
    table = measure(options.folder, options.weights, options.sheet)
    if options.out:
        table.to_csv(options.out, index=False)
    print(table[~table["all_right"] | table["doubtful"]].round(3).to_string(index=False))
    groups = table.groupby("set")
    summary = pd.DataFrame(
        {
            "volumes": groups.size(),
            "levels": groups["levels"].sum(),
            "levels right": groups["right"].sum(),
            "all right": groups["all_right"].sum(),
            "right, yet doubtful": groups.apply(lambda g: int((g["all_right"] & g["doubtful"]).sum())),
            "wrong": groups.apply(lambda g: int((~g["all_right"]).sum())),
            "wrong and doubtful": groups.apply(lambda g: int((~g["all_right"] & g["doubtful"]).sum())),
        }
    )
    summary.loc["all"] = summary.sum()
    print(summary.to_string())
    print(reliability(table).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
