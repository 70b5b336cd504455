"""Where a body's middle lies across the slices, from how it narrows and fades, also where the stack ends within it."""

import numpy as np
import pytest

from lumbar.spine.across import middle_across


def shown(middle_mm, step_mm=4.4, first=-11, last=11, depth_mm=34.0, half_mm=22.0, noise=0.02, seed=0):
    """What slices at first ... last steps from the patient's middle show of a round body: arguments of
    middle_across, and the index of its middle in the stack."""
    rng = np.random.default_rng(seed)
    index = np.arange(first, last + 1)
    away = np.abs(index * step_mm - middle_mm) / half_mm
    seen = away < 0.96 + rng.normal(0, 0.03, len(index))
    depth = depth_mm * (1 - 0.2 * np.minimum(away, 1) ** 3) * np.exp(rng.normal(0, noise, len(index)))
    sureness = (0.85 - 0.2 * np.maximum(away - 0.75, 0) / 0.25) * np.exp(rng.normal(0, noise, len(index)))
    arguments = (index[seen] - first).astype(float), depth[seen], sureness[seen], len(index), step_mm
    return arguments, middle_mm / step_mm - first


def errors_mm(**options):
    """(errors, stated standard deviations) in mm of 40 bodies with their middles within 10 mm of the patient's."""
    found = []
    for seed, middle_mm in enumerate(np.linspace(-10, 10, 40)):
        arguments, true = shown(middle_mm, seed=seed, **options)
        index, sd_mm = middle_across(*arguments)
        found.append(((index - true) * arguments[-1], sd_mm))
    return np.array(found).T


@pytest.mark.parametrize("step_mm", [0.9, 3.0, 4.4, 6.0])
def test_a_whole_body_is_placed_to_a_millimetre(step_mm):
    reach = int(40 / step_mm)
    error, sd_mm = errors_mm(step_mm=step_mm, first=-reach, last=reach)
    assert np.median(np.abs(error)) < 0.8 and np.abs(error).max() < 3.5 and sd_mm.max() < 2.5


def test_five_slices_tell_where_the_middle_lies():
    error, sd_mm = errors_mm(first=-2, last=2)
    centre = np.abs(np.linspace(-10, 10, 40))  # what the middle of the slices would be off
    assert np.median(np.abs(error)) < 0.5 * np.median(centre)
    # The error that is stated is of the size of the true one: neighbours can make up for it.
    assert 0.4 < np.sqrt(np.mean((error / sd_mm) ** 2)) < 1.4
    assert sd_mm.min() > errors_mm()[1].max()


def test_a_stack_that_ends_within_a_body():
    error, _ = errors_mm(first=-1, last=8)
    assert np.median(np.abs(error)) < 1.5 and abs(np.mean(error)) < 1.0


@pytest.mark.parametrize(
    "index, depth_mm, sureness, count",
    [
        ([3], [34], [0.8], 7),
        ([3, 4], [34, 33], [0.8, 0.7], 7),
        ([0], [34], [0.8], 1),
        ([2, 3, 4], [0, 0, 0], [0.3, 0.3, 0.3], 9),
        ([2, 3, 4], [34, 3000, 34], [0.8, 0.0, 0.8], 9),
        (range(40), [30] * 40, [0.5] * 40, 40),
    ],
    ids=str,
)
def test_odd_bodies_get_an_answer_among_their_slices(index, depth_mm, sureness, count):
    index, depth_mm, sureness = (np.array(list(values), float) for values in (index, depth_mm, sureness))
    middle, sd_mm = middle_across(index, depth_mm, sureness, count, 4.4)
    assert np.isfinite([middle, sd_mm]).all() and sd_mm > 0
    assert abs(middle - index.mean()) <= (count + 22) / 4.4
