"""Pictures of what the slice network sees of one level.

May use: grade.slice_crops.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..grade.slice_crops import LOOKS

_NAMES = ("canal", "canal", "left foramen", "right foramen", "left subarticular", "right subarticular")


def plot_looks(axes: np.ndarray, inputs: ArrayLike) -> np.ndarray:
    """Draw the looks at one level: neighbouring slices from left to right, black where there is none.

    Parameters
    ----------
    axes : (2, 3 * slices) array of Axes
        From left to right canal, foramina, subarticular; above canal on T2/STIR and left sides, below canal on axial T2
        and right sides.
    inputs : (6, slices, h, w) array-like
        By look and slice, as view_slices gives them of one level: 0 to 1, NaN where there is no slice.

    Returns
    -------
    axes : (2, 3 * slices) array of Axes
    """
    images = np.nan_to_num(np.asarray(inputs, np.float32))
    count = images.shape[1]
    for number, (look, name) in enumerate(zip(LOOKS, _NAMES, strict=True)):
        row, first = number % 2, number // 2 * count
        for k in range(count):
            ax = axes[row, first + k]
            ax.imshow(images[number, k], cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
        axes[row, first + count // 2].set_title(f"{name}, {look.description}", fontsize=8)
    return axes
