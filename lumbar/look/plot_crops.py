"""Figures of crops as the networks see them, and their test-time views in words.

May use: names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..names import DESCRIPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence


def plot_level_crop(
    axes: np.ndarray,
    crop: np.ndarray,
    coverage: np.ndarray | None = None,
    extent_mm: Sequence[float] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Three planes through the middle of a level's crop, seen as radiologists do (patient's left at the right).

    Parameters
    ----------
    axes : (3, 3) or (3,) array of Axes
        Rows: channels T1, axial T2, T2/STIR; columns: sagittal, coronal, axial plane. (3,) for a crop of one channel.
    crop : (3, d, h, w) or (d, h, w) array
        Axes (channel, head-foot, front-back, right-left).
    coverage : bool array, optional
        Of the crop's shape; what no slice covers is tinted blue.
    extent_mm : (3,) sequence of float, optional
        Along (d, h, w), for proportions and the names of the axes.
    window : (2,) tuple of float
        Grey values that are black and white.

    Returns
    -------
    axes : array of Axes
        As given.
    """
    crop = np.asarray(crop, dtype=np.float32)
    axes = np.asarray(axes)
    crops = crop[None] if crop.ndim == 3 else crop
    covered = (
        np.ones(crops.shape, dtype=bool) if coverage is None else np.asarray(coverage, dtype=bool).reshape(crops.shape)
    )
    rows = axes.reshape(len(crops), 3)
    depth, height, width = crops.shape[1:]
    head_mm, back_mm, left_mm = extent_mm if extent_mm is not None else (depth, height, width)
    planes = (
        ("sagittal", np.s_[:, :, width // 2], (head_mm, back_mm), "AP"),
        ("coronal", np.s_[:, height // 2, :], (head_mm, left_mm), "RL"),
        ("axial", np.s_[depth // 2, :, :], (back_mm, left_mm), "RL"),
    )
    names = {"sagittal": ("head-foot", "front-back"), "coronal": ("head-foot", "left-right")}
    names["axial"] = ("front-back", "left-right")
    for channel, row in enumerate(rows):
        for ax, (name, cut, (tall_mm, wide_mm), sides) in zip(row, planes):
            ax.imshow(
                crops[channel][cut],
                cmap="gray",
                vmin=window[0],
                vmax=window[1],
                extent=(0, wide_mm, tall_mm, 0),
                interpolation="bilinear",
            )
            blank = np.zeros((*crops[channel][cut].shape, 4))
            blank[..., :] = (0.0, 0.45, 0.7, 0.45)
            blank[..., 3] *= ~covered[channel][cut]
            ax.imshow(blank, extent=(0, wide_mm, tall_mm, 0), interpolation="nearest")
            for x, letter in zip((0.05, 0.95), sides):
                ax.text(x, 0.5, letter, transform=ax.transAxes, color="white", fontsize=7, ha="center", va="center")
            ax.set_xticks([])
            ax.set_yticks([])
            if channel == 0:
                ax.set_title(name, fontsize=9)
            if extent_mm is not None:
                ax.set_ylabel(f"{names[name][0]}, {tall_mm:g} mm", fontsize=7)
            if extent_mm is not None and channel == len(rows) - 1:
                ax.set_xlabel(f"{names[name][1]}, {wide_mm:g} mm", fontsize=7)
        if len(rows) == 3:
            description = f"channel {channel}: {DESCRIPTIONS[channel]}"
            beside = {"xycoords": "axes fraction", "textcoords": "offset points", "rotation": 90, "va": "center"}
            row[0].annotate(description, (0, 0.5), (-30, 0), ha="center", fontsize=8, **beside)
    return axes


def plot_crop_gallery(axes: np.ndarray, crops: np.ndarray, titles: list[str], extent_mm: Sequence[float]) -> np.ndarray:
    """Show crops side by side: above the middle sagittal plane of T2/STIR, below an axial plane of axial T2.

    The axial plane is the same in all: the one nearest to the first crop's middle that axial slices cover, as far as
    they cover any.

    Parameters
    ----------
    axes : (2, n) array of Axes
    crops : (n, 3, d, h, w) array
        Axes (crop, channel as in DESCRIPTIONS, head-foot, front-back, right-left); 0 is black and 1 white.
    titles : list of str
        One for each crop.
    extent_mm : (3,) sequence of float
        Along (d, h, w).

    Returns
    -------
    axes : (2, n) array of Axes
    """
    crops = np.asarray(crops, dtype=np.float32)
    head_mm, back_mm, left_mm = extent_mm
    axes[0, 0].get_gridspec().set_height_ratios((head_mm, back_mm))
    covered = (crops[0, 1] > 0).mean((1, 2))
    places = np.flatnonzero(covered >= 0.8 * covered.max())
    place = places[np.argmin(np.abs(places - len(covered) // 2))]
    for number, (crop, title) in enumerate(zip(crops, titles, strict=True)):
        planes = ((crop[2, :, :, crop.shape[3] // 2], head_mm, back_mm), (crop[1, place], back_mm, left_mm))
        for ax, (plane, tall_mm, wide_mm) in zip(axes[:, number], planes, strict=True):
            ax.imshow(plane, cmap="gray", vmin=0, vmax=1, extent=(0, wide_mm, tall_mm, 0), interpolation="bilinear")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0, number].set_title(title, fontsize=8)
    axes[0, 0].set_ylabel("sagittal T2/STIR", fontsize=8)
    axes[1, 0].set_ylabel("axial T2", fontsize=8)
    return axes


def view_name(view: dict) -> str:
    """A test-time view (see TTA_VIEWS) in a few words, one a line: `plain`, or `mirrored,` `6% smaller`.

    Parameters
    ----------
    view : dict
        mirror, scale (above 1 is larger), shift_mm (foot, back, left), rotation_deg (about left, head and back); of
        SLICE_VIEWS slice (by how many the runs move) and shift_px (down and right in the image).

    Returns
    -------
    str
    """
    words = ["mirrored"] if view.get("mirror") else []
    if "scale" in view:
        words.append(f"{abs(view['scale'] - 1):.0%} {'larger' if view['scale'] > 1 else 'smaller'}")
    for amount, sides in zip(view.get("shift_mm", ()), (("foot", "head"), ("back", "front"), ("left", "right"))):
        words += [f"{abs(amount):g} mm to the {sides[int(amount < 0)]}"] if amount else []
    for amount, turned in zip(view.get("rotation_deg", ()), ("tilted", "twisted", "leant")):
        words += [f"{turned} by {amount:g}\N{DEGREE SIGN}"] if amount else []
    if moved := int(view.get("slice", 0)):
        words.append(f"{abs(moved)} slice{'s' * (abs(moved) > 1)} {'on' if moved > 0 else 'back'}")
    for amount, sides in zip(view.get("shift_px", ()), (("down", "up"), ("right", "left"))):
        words += [f"{abs(amount):g} px {sides[int(amount < 0)]}"] if amount else []
    return ",\n".join(words) or "plain"
