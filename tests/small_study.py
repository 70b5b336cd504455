"""A study of noise with a bright ball around the origin: two sagittal series, two axial stacks, one of them tilted."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd

import utils
from lumbar.data.geometry import LevelBox
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume
from lumbar.names import DETECTION_COLUMNS
from lumbar.spine.vertebra import Vertebra

HEAD, LEFT, BACK = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])


def make_volume(description, series_id, slice_step, row_step, column_step, origin, shape):
    """Noise with a bright ball around the patient's origin, on a grid along the given steps (LPS mm)."""
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = slice_step, row_step, column_step, origin
    volume = Volume(np.zeros(shape, np.float32), affine, 7, series_id, description, 0, np.arange(shape[0]) + 1)
    xyz = volume.voxel_to_lps(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    noise = np.random.default_rng(series_id).random(shape) * 0.2
    return replace(volume, array=(noise + 0.8 * np.exp(-(xyz**2).sum(-1) / 900)).astype(np.float16))


def make_study():
    """Study 7."""
    sagittal = dict(
        slice_step=-5 * LEFT, row_step=-2 * HEAD, column_step=2 * BACK, origin=[20, -80, 100], shape=(9, 100, 80)
    )
    tilted = -0.97 * HEAD + 0.24 * BACK
    return Study(
        7,
        [
            make_volume("Sagittal T1", 11, **sagittal),
            make_volume("Sagittal T2/STIR", 12, **sagittal),
            make_volume("Axial T2", 13, -6 * HEAD, 2 * BACK, 2 * LEFT, [-64, -64, 60], (6, 64, 64)),
            make_volume(
                "Axial T2", 14, 6 * tilted, 2 * (0.97 * BACK + 0.24 * HEAD), 2 * LEFT, [-64, -64, -20], (6, 64, 64)
            ),
        ],
    )


def make_boxes(second=0.0):
    """Five level boxes below each other; the first was found with little confidence.

    second: above 0, the share of a second numbering, which counts one farther down.
    """
    names = (*utils.LEVELS[1:], "s1_s2")
    return [
        LevelBox(
            level,
            np.array([0.0, 0.0, 70.0 - 35 * n]),
            np.stack([HEAD, LEFT, BACK]),
            np.array([30.0, 60.0, 50.0]),
            0.9 if n else 0.2,
            Source.T2 | Source.UNCERTAIN if second else Source.T2,
            names[n] if second else "",
            second,
        )
        for n, level in enumerate(utils.LEVELS)
    ]


def make_vertebrae():
    """Six bodies between the boxes' centres, L1 to S1; the last was not seen."""
    square = np.array([[0.0, -15, 12], [0, 15, 12], [0, 15, -12], [0, -15, -12]])
    return [
        Vertebra(
            square + [0, 0, 87.5 - 35 * n],
            40.0,
            0.9,
            name,
            Source.T2 | Source.EXTRAPOLATED if name == "S1" else Source.T2,
        )
        for n, name in enumerate(("L1", "L2", "L3", "L4", "L5", "S1"))
    ]


def make_points():
    """Two label points, as read_coordinates has them."""
    return pd.DataFrame(
        {
            "study_id": [7, 7],
            "series_id": [12, 13],
            "instance_number": [5, 2],
            "condition": ["spinal_canal_stenosis", "left_subarticular_stenosis"],
            "level": ["l3_l4", "l1_l2"],
            "x_px": [50.0, 40.0],
            "y_px": [50.0, 40.0],
        }
    )


def make_detections():
    """A detection on the middle slice of the T2 series and one beside each other on an axial slice."""
    rows = [
        [7, 12, 5, "spinal_canal_stenosis", "l3_l4", 50.0, 50.0, 10.0, 10.0, 0.1, 0.2, 0.71],
        [7, 13, 2, "left_subarticular_stenosis", "l1_l2", 36.0, 40.0, 8.0, 8.0, 0.63, 0.2, 0.1],
        [7, 13, 2, "right_subarticular_stenosis", "l1_l2", 28.0, 40.0, 8.0, 8.0, 0.1, 0.52, 0.1],
    ]
    return pd.DataFrame(rows, columns=DETECTION_COLUMNS)


def make_probabilities(seed=0):
    """((5, 5, 3) probabilities, (5, 5) grades, one of them missing)."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([2, 1, 0.5], (5, 5))
    truth = rng.integers(0, 3, (5, 5))
    truth[4, 0] = -1
    return probabilities, truth


def no_network(page):
    """What a browser would fetch: sources, links, imports and urls that are not inline."""
    fetched = re.findall(r"""(?:\bsrc|\bhref|\baction)\s*=\s*["']?([^"'\s>]+)""", page)
    fetched += re.findall(r"""url\(\s*["']?([^"')]+)""", page) + re.findall(r"""@import\s+["']?([^"';]+)""", page)
    fetched += re.findall(r"""\bimport\(?\s*["']([^"']+)""", page)
    return [target for target in fetched if not target.startswith(("data:", "#", "'data:"))]
