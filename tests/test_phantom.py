"""The phantom: files, geometry, truth, and that disease shows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

import phantom
import utils
from lumbar.names import CLASS_COUNTS, DESCRIPTIONS, GRADES, LABEL_COLUMNS, SEVERITY_WEIGHTS
from phantom import dataset


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """1 + 1 studies, written by one process."""
    out = tmp_path_factory.mktemp("phantom") / "data"
    floor = phantom.make_dataset(out, train=1, test=1, seed=5, workers=1, prevalence=3, progress=False)
    return out, floor


def _anatomy(severity=None, seed=3, transitional=0.0):
    severity = np.full((5, 5), 0.1) if severity is None else severity
    return phantom.sample_anatomy(np.random.default_rng(seed), severity, transitional)


def _paint(anatomy):
    """The fine grid, coarser than usual: faster."""
    return phantom.paint(anatomy, (1.4, 1.2, 1.3), (16, 16, 20))[0]


@pytest.fixture(scope="session")
def severity_series():
    """The same spine at severity 0, 1, 2, 3 of one condition each: {(condition, severity): grid}."""
    grids = {}
    for condition in (0, 1, 3):
        for grade in (0, 1, 2, 3):
            if grade == 0 and condition:
                grids[condition, 0] = grids[0, 0]
                continue
            severity = np.full((5, 5), 0.05)
            severity[condition, 3] = grade
            anatomy = _anatomy(severity)
            grids[condition, grade] = anatomy, _paint(anatomy)
    return grids


def _amount(anatomy, grid, tissue, centre_mm, half_mm):
    """Volume of a tissue in mm3 inside a box around an LPS point."""
    box = grid.box(np.subtract(centre_mm, half_mm), np.add(centre_mm, half_mm))
    t = phantom.TISSUE[tissue]
    w = grid.share[box] / 255.0
    return float(((grid.under[box] == t) * (1 - w) + (grid.over[box] == t) * w).sum() * np.prod(grid.step_mm))


# ---- names and latent model ---------------------------------------------------------


@pytest.mark.slow
def test_workers_need_no_torch():
    code = "import sys, phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(phantom.__file__).parents[1]).returncode == 0


def test_grades_have_the_real_frequencies():
    _, grade = phantom.sample_severity(np.random.default_rng(0), 20000)
    counts = np.array(CLASS_COUNTS)
    for k in range(3):
        expected = counts[..., k] / counts.sum(-1)
        assert np.abs((grade == k).mean(0) - expected).max() < 0.015


@pytest.mark.slow
def test_grades_have_the_real_correlations():
    from scipy.stats import spearmanr

    _, grade = phantom.sample_severity(np.random.default_rng(1), 30000)
    r = spearmanr(grade.reshape(-1, 25)).statistic.reshape(5, 5, 5, 5)

    def mean(a, b, apart=0):
        return np.mean([r[a, i, b, i + apart] for i in range(5 - apart)])

    for value, target in (
        (mean(1, 2), 0.31),
        (mean(3, 4), 0.48),
        (mean(0, 3), 0.48),
        (mean(0, 1), 0.26),
        (mean(1, 3), 0.34),
        (np.mean([mean(c, c, 1) for c in range(5)]), 0.385),
        (np.mean([mean(c, c, 2) for c in range(5)]), 0.24),
    ):
        assert abs(value - target) < 0.05


def test_prevalence_three_leaves_about_sixty_percent_normal():
    _, grade = phantom.sample_severity(np.random.default_rng(2), 4000, prevalence=3)
    assert 0.55 < (grade == 0).mean() < 0.65


def test_perfect_reader_beats_the_prior_but_is_not_perfect():
    latent, grade = phantom.sample_severity(np.random.default_rng(3), 3000)
    p = phantom.perfect_reader(latent)
    assert np.allclose(p.sum(-1), 1)
    best = utils.score_arrays(grade, p)["total"]
    prior = utils.score_arrays(grade, np.broadcast_to(utils.class_prior(grade), p.shape))["total"]
    assert 0.25 < best < 0.40
    assert best < 0.55 * prior


def test_perfect_reader_follows_its_own_reader():
    """Where the latent sits on the moderate threshold, half the grades are above it."""
    cut = phantom.grade_thresholds()[0, 3, 0] / phantom.READER_RELIABILITY
    p = phantom.perfect_reader(np.full((1, 5, 5), cut))[0, 0, 3] / np.array(SEVERITY_WEIGHTS)
    assert p[0] / p.sum() == pytest.approx(0.5, abs=1e-6)


# ---- files --------------------------------------------------------------------------


@pytest.mark.slow
def test_layout_and_columns(made):
    out, _ = made
    train = pd.read_csv(out / "train.csv")
    assert list(train.columns) == ["study_id", *LABEL_COLUMNS] and len(train) == 1
    values = set(pd.unique(train.drop(columns="study_id").to_numpy().ravel()))
    assert values - {np.nan} <= set(GRADES) | {v for v in values if v != v}
    points = pd.read_csv(out / "train_label_coordinates.csv")
    assert list(points.columns) == ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
    assert set(points["level"]) <= {"L1/L2", "L2/L3", "L3/L4", "L4/L5", "L5/S1"}
    assert "Left Neural Foraminal Narrowing" in set(points["condition"])
    for split, n in (("train", 1), ("test", 1)):
        series = pd.read_csv(out / f"{split}_series_descriptions.csv")
        assert list(series.columns) == ["study_id", "series_id", "series_description"]
        assert series["study_id"].nunique() == n
        assert set(series["series_description"]) <= set(DESCRIPTIONS)
        on_disk = {(int(p.parent.name), int(p.name)) for p in (out / f"{split}_images").glob("*/*")}
        assert on_disk == set(zip(series["study_id"], series["series_id"]))
    for row in points.itertuples():
        assert (out / "train_images" / str(row.study_id) / str(row.series_id) / f"{row.instance_number}.dcm").exists()
    sample = pd.read_csv(out / "sample_submission.csv")
    assert list(sample.columns) == ["row_id", "normal_mild", "moderate", "severe"] and len(sample) == 25
    assert pd.read_csv(out / "phantom_test_labels.csv").shape == (1, 26)
    vertebrae = pd.read_csv(out / "phantom_vertebrae.csv")
    assert set(vertebrae["vertebra"]) == set(phantom.TRUTH_VERTEBRAE)
    assert not (out / ".studies").exists()


@pytest.mark.slow
def test_perfect_submission_scores_the_floor(made):
    out, floor = made
    score = utils.competition_score(pd.read_csv(out / "phantom_test_labels.csv"), phantom.perfect_submission(out))
    assert score["total"] == pytest.approx(floor["test"])


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(made, tmp_path):
    out, _ = made
    other = tmp_path / "again"
    phantom.make_dataset(other, train=1, test=1, seed=5, workers=2, prevalence=3, progress=False)
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert all((out / n).read_bytes() == (other / n).read_bytes() for n in names)


@pytest.mark.slow
def test_refuses_another_data_set_and_keeps_a_finished_one(made, tmp_path):
    out, floor = made
    with pytest.raises(FileExistsError, match="another data set"):
        phantom.make_dataset(out, train=1, test=1, seed=6, workers=1, prevalence=3, progress=False)
    assert phantom.make_dataset(out, train=1, test=1, seed=5, workers=1, prevalence=3, progress=False) == floor
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        phantom.make_dataset(tmp_path, train=1, test=0, progress=False)


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    real, calls = dataset._make_study, []

    def fragile(job):
        calls.append(job["index"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return dict(
            study_id=job["study_id"],
            split="train",
            index=job["index"],
            series=[],
            points=[],
            vertebrae=[],
            latent=np.zeros((5, 5)).tolist(),
            severity=np.zeros((5, 5)).tolist(),
            grade=np.zeros((5, 5), int).tolist(),
            variant="none",
        )

    monkeypatch.setattr(dataset, "_make_study", fragile)
    with pytest.raises(KeyboardInterrupt):
        phantom.make_dataset(tmp_path / "d", train=2, test=0, workers=1, progress=False)
    assert not (tmp_path / "d" / "train.csv").exists()
    floor = phantom.make_dataset(tmp_path / "d", train=2, test=0, workers=1, progress=False)
    assert calls == [1, 2, 1, 2] and "train" in floor
    monkeypatch.setattr(dataset, "_make_study", real)
    job = dict(out=str(tmp_path / "e"), study_id=7)
    (tmp_path / "e" / ".studies").mkdir(parents=True)
    (tmp_path / "e" / ".studies" / "7.json").write_text('{"study_id": 7}')
    assert dataset._make_study(job) == {"study_id": 7}


# ---- DICOM --------------------------------------------------------------------------


@pytest.mark.slow
def test_geometry_is_the_same_in_simpleitk(made):
    sitk = pytest.importorskip("SimpleITK")
    out, _ = made
    seen = set()
    for folder in (out / "train_images").glob("*/*"):
        path = sorted(folder.iterdir())[len(list(folder.iterdir())) // 2]
        ds, image = pydicom.dcmread(path), sitk.ReadImage(str(path))
        rows, columns = ds.pixel_array.shape
        assert image.GetSize()[:2] == (columns, rows)
        spacing = np.array(ds.PixelSpacing, float)
        cosines = np.array(ds.ImageOrientationPatient, float)
        x, y = columns - 5, 7
        ours = np.array(ds.ImagePositionPatient, float) + cosines[:3] * spacing[1] * x + cosines[3:] * spacing[0] * y
        theirs = image.TransformIndexToPhysicalPoint((x, y, 0))
        assert np.abs(ours - theirs).max() < 1e-3
        slope = float(ds.get("RescaleSlope", 1))
        assert np.array_equal(sitk.GetArrayFromImage(image)[0], ds.pixel_array * slope)
        seen.add("axial" if abs(cosines[0]) > 0.9 else "sagittal")
        if abs(cosines[0]) > 0.9:
            assert cosines[4] > 0.8  # rows run from front to back, columns to the left
        else:
            assert cosines[1] > 0.95 and cosines[5] < -0.95
    assert seen == {"axial", "sagittal"}


@pytest.mark.parametrize("compress", ["none", "rle"])
def test_pixels_survive_writing(tmp_path, compress):
    plan = phantom.SeriesPlan(
        "Axial T2",
        "T2",
        np.array([[0, 0, 0], [0, 0, 4.0]]),
        np.tile([1.0, 0, 0], (2, 1)),
        np.tile([0, 1.0, 0], (2, 1)),
        (0.7, 0.6),
        (20, 30),
        4.0,
        4.0,
        np.array([3, 7]),
        9,
    )
    image = np.random.default_rng(0).random((2, 20, 30)).astype(np.float32)
    phantom.write_series(
        tmp_path,
        plan,
        image,
        study_id=1,
        number=1,
        patient="PHANTOM^0001",
        rng=np.random.default_rng(0),
        compress=compress,
    )
    ds = pydicom.dcmread(tmp_path / "7.dcm")
    stored = ds.pixel_array.astype(float)
    assert np.corrcoef(stored.ravel(), image[1].ravel())[0, 1] > 0.9999
    assert ds.file_meta.TransferSyntaxUID.is_compressed == (compress == "rle")
    assert ds.ImagePositionPatient[2] == 4 and list(ds.PixelSpacing) == [0.7, 0.6]


@pytest.mark.slow
def test_dciodvfy_finds_no_error(made, tmp_path):
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian: dicom3tools) is not installed")
    out, _ = made
    files = [sorted(f.iterdir())[0] for f in (out / "train_images").glob("*/*")]
    plan = phantom.SeriesPlan(
        "Sagittal T2/STIR",
        "STIR",
        np.zeros((1, 3)),
        np.array([[0, 1.0, 0]]),
        np.array([[0, 0, -1.0]]),
        (1.0, 1.0),
        (8, 8),
        4.0,
        4.0,
        np.array([1]),
        9,
    )
    kinds = set()
    for seed in range(40):  # signed, unsigned, 12 and 16 bit, with and without slope
        phantom.write_series(
            tmp_path / str(seed),
            plan,
            np.ones((1, 8, 8), np.float32),
            study_id=1,
            number=1,
            patient="PHANTOM^0001",
            rng=np.random.default_rng(seed),
        )
        ds = pydicom.dcmread(tmp_path / str(seed) / "1.dcm")
        kinds.add((ds.PixelRepresentation, ds.BitsStored, "RescaleSlope" in ds))
        files.append(tmp_path / str(seed) / "1.dcm")
    assert len(kinds) >= 4
    for path in files:
        result = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]
        assert not errors, (path, errors)


# ---- truth --------------------------------------------------------------------------


@pytest.mark.slow
def test_left_points_lie_on_the_patients_left(made):
    out, _ = made
    points = pd.read_csv(out / "train_label_coordinates.csv")
    checked = set()
    for (study, level), group in points.groupby(["study_id", "level"]):
        lps = {}
        for row in group.itertuples():
            ds = pydicom.dcmread(
                out / "train_images" / str(study) / str(row.series_id) / f"{row.instance_number}.dcm",
                stop_before_pixels=True,
            )
            c = np.array(ds.ImageOrientationPatient, float)
            spacing = np.array(ds.PixelSpacing, float)
            lps[row.condition] = (
                np.array(ds.ImagePositionPatient, float) + c[:3] * spacing[1] * row.x + c[3:] * spacing[0] * row.y
            )
        for kind in ("Neural Foraminal Narrowing", "Subarticular Stenosis"):
            if f"Left {kind}" in lps and f"Right {kind}" in lps:
                assert lps[f"Left {kind}"][0] > lps[f"Right {kind}"][0] + 8
                checked.add(kind)
    assert len(checked) == 2


def test_points_lie_in_their_tissue():
    anatomy = _anatomy()
    grid = _paint(anatomy)
    points = anatomy.points_mm()
    csf = [_amount(anatomy, grid, "csf", points[0, level], 3) for level in range(5)]
    roots = [_amount(anatomy, grid, "root", points[0, level], 3) for level in range(5)]
    box = np.prod(2 * np.ceil(3 / grid.step_mm) * grid.step_mm)
    assert min(a + b for a, b in zip(csf, roots)) > 0.6 * box
    for condition in (1, 2):
        for level in range(5):
            assert (
                _amount(anatomy, grid, "fat", points[condition, level], 5)
                + _amount(anatomy, grid, "root", points[condition, level], 5)
                > 350
            )
    assert points[1, 2][0] > points[0, 2][0] + 10 and points[2, 2][0] < points[0, 2][0] - 10
    assert points[3, 2][0] > points[0, 2][0] + 5 and points[4, 2][0] < points[0, 2][0] - 5


def test_vertebrae_are_where_the_marrow_is():
    anatomy = _anatomy()
    grid = _paint(anatomy)
    for name in ("T12", "L1", "L3", "L5", "S1"):
        v = anatomy.vertebra(name)
        marrow = sum(_amount(anatomy, grid, t, v.centre_mm - v.frame[:, 1] * 6, 4) for t in ("marrow", "fatty_marrow"))
        assert marrow > 400
        a_s, p_s, p_i, a_i = v.corners_mm()
        assert a_s[1] < p_s[1] and a_i[1] < p_i[1] and a_s[2] > a_i[2] and p_s[2] > p_i[2]
    z = [anatomy.vertebra(n).centre_mm[2] for n in phantom.TRUTH_VERTEBRAE]
    assert all(a > b for a, b in zip(z, z[1:]))


@pytest.mark.slow
def test_canal_points_have_the_real_proportions():
    """Spacings .270 .265 .249 .216 and sagittal offsets 0 -.054 -.089 -.078 -.019 of the path."""
    spacings, offsets = [], []
    for seed in range(80):
        anatomy = _anatomy(seed=seed)
        p = np.array([anatomy.points_mm()[0, level] for level in range(5)])[:, 1:]
        step = np.linalg.norm(np.diff(p, axis=0), axis=1)
        spacings.append(step / step.sum())
        offsets.append((p[:, 0] - p[0, 0]) / step.sum())
    assert np.abs(np.mean(spacings, 0) - [0.270, 0.265, 0.249, 0.216]).max() < 0.02
    assert np.abs(np.mean(offsets, 0) - [0, -0.054, -0.089, -0.078, -0.019]).max() < 0.035


def test_transitional_spines_exist():
    kinds = {_anatomy(seed=seed, transitional=1.0).variant for seed in range(12)}
    assert kinds == {"sacralised L5", "lumbarised S1"}
    assert {_anatomy(seed=seed).variant for seed in range(12)} == {"none"}


# ---- disease shows ------------------------------------------------------------------


@pytest.mark.slow
def test_canal_stenosis_narrows_the_sac(severity_series):
    csf = []
    for grade in range(4):
        anatomy, grid = severity_series[0, grade]
        csf.append(_amount(anatomy, grid, "csf", anatomy.canal_to_lps(0.0, 0.0, anatomy.disc_s_mm[3]), (13, 9, 3)))
    assert csf[0] > 1.2 * csf[1] > 1.2 * 1.2 * csf[2] and csf[3] < 0.3 * csf[0]


@pytest.mark.slow
def test_foraminal_narrowing_takes_the_fat_on_its_side_only(severity_series):
    fat = {1: [], -1: []}
    for grade in range(4):
        anatomy, grid = severity_series[1, grade]
        for side in fat:
            at = anatomy.canal_to_lps(side * 17.5, phantom.FORAMEN_V_MM, anatomy.disc_s_mm[3] + phantom.FORAMEN_RISE_MM)
            fat[side].append(_amount(anatomy, grid, "fat", at, (4, 5.5, 7)))
    left, right = fat[1], fat[-1]
    assert left[0] > 1.15 * left[1] > 1.15 * 1.15 * left[2] and left[3] < 0.5 * left[0]
    assert min(right) > 0.85 * max(right)


@pytest.mark.slow
def test_subarticular_stenosis_closes_the_recess_on_its_side_only(severity_series):
    free = {1: [], -1: []}
    for grade in range(4):
        anatomy, grid = severity_series[3, grade]
        for side in free:
            front = phantom.sac_section(anatomy, anatomy.disc_s_mm[3])["front"]
            at = anatomy.canal_to_lps(side * (phantom.RECESS_U_MM + 0.5), front + 3, anatomy.disc_s_mm[3])
            free[side].append(sum(_amount(anatomy, grid, t, at, (4.5, 4, 3)) for t in ("fat", "csf")))
    left, right = free[1], free[-1]
    assert left[0] > 1.1 * left[1] > 1.1 * 1.1 * left[2] and left[3] < 0.45 * left[0]
    assert min(right) > 0.85 * max(right)


@pytest.mark.slow
def test_conditions_are_separable(severity_series):
    """A narrow canal leaves the foramina open, a narrow foramen the canal."""
    healthy, narrow_canal, narrow_foramen = (severity_series[k] for k in ((0, 0), (0, 3), (1, 3)))

    def canal(item):
        return _amount(*item, "csf", item[0].canal_to_lps(0.0, 0.0, item[0].disc_s_mm[3]), (13, 9, 3))

    def foramen(item):
        return _amount(
            *item,
            "fat",
            item[0].canal_to_lps(17.5, phantom.FORAMEN_V_MM, item[0].disc_s_mm[3] + phantom.FORAMEN_RISE_MM),
            (4, 5.5, 7),
        )

    assert foramen(narrow_canal) > 0.8 * foramen(healthy)
    assert canal(narrow_foramen) > 0.8 * canal(healthy)


def test_a_painted_ball_has_its_volume():
    grid = phantom.TissueGrid.empty((0, 0, 0), (10, 10, 10), (1, 1, 1), "fat")
    box = grid.box((0, 0, 0), (10, 10, 10))
    x, y, z = grid.coordinates(box)
    grid.lay(box, np.sqrt((x - 5) ** 2 + (y - 5) ** 2 + (z - 5) ** 2) - 3.2, "marrow")
    marrow, share = phantom.TISSUE["marrow"], grid.share / 255
    volume = ((grid.under == marrow) * (1 - share) + (grid.over == marrow) * share).sum()
    assert volume == pytest.approx(4 / 3 * np.pi * 3.2**3, rel=0.04)


# ---- wide variety -------------------------------------------------------------------

MARROW = ("marrow", "fatty_marrow", "red_marrow", "oedema", "sclerosis", "haemangioma", "lesion")


def _wide(seed, severity=0.3):
    return phantom.sample_anatomy(np.random.default_rng(seed), np.full((5, 5), severity), 0.1, variety="wide")


def _share(grid, tissues, point_mm):
    """Share of tissues in the voxel at an LPS point."""
    i = tuple(np.round((np.asarray(point_mm) - grid.origin_mm) / grid.step_mm).astype(int))
    among = [phantom.TISSUE[t] for t in tissues]
    w = grid.share[i] / 255
    return (grid.under[i] in among) * (1 - w) + (grid.over[i] in among) * w


def test_the_standard_variety_is_what_it_was():
    # Labels and greys of one spine as they were before there was another variety. Not bit for bit: the last digits are
    # those of NumPy's build and of the processor.
    anatomy = phantom.sample_anatomy(np.random.default_rng(3), np.full((5, 5), 0.7), 1.0)
    whole, canal = phantom.paint(anatomy, (2, 2, 2.2), (6, 6, 8))
    assert whole.under.shape == (51, 70, 158) and canal.under.shape == (41, 54, 48)
    voxels = [np.bincount(grid.under.ravel(), minlength=19)[[1, 2, 6, 7, 17]] for grid in (whole, canal)]
    expected = [[124508, 102129, 38481, 25812, 249545], [24157, 7449, 832, 81, 35638]]
    np.testing.assert_allclose(voxels, expected, rtol=2e-3, atol=3)
    assert whole.share.mean() == pytest.approx(179.587, abs=0.02)
    assert canal.share.mean() == pytest.approx(121.865, abs=0.02)
    rng = np.random.default_rng(4)
    for kind, mean, spread in (("T1", 0.7166, 0.2865), ("T2", 0.5012, 0.2724), ("STIR", 0.1238, 0.1141)):
        image = phantom.render(whole, phantom.contrast_table(kind, rng))
        assert image.mean() == pytest.approx(mean, abs=5e-4) and image.std() == pytest.approx(spread, abs=5e-4)


@pytest.mark.slow
def test_the_wide_variety_is_another_one_and_repeats():
    standard, wide, again = _anatomy(), _wide(3, 0.1), _wide(3, 0.1)
    assert standard.seed == wide.seed  # it draws from a generator of its own
    assert not standard.wide and wide.wide
    assert np.abs(standard.path_mm[:50] - wide.path_mm[:50]).max() > 0.5
    for a, b in zip(_paint(wide).__dict__.values(), _paint(again).__dict__.values()):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="variety"):
        phantom.sample_anatomy(np.random.default_rng(0), np.zeros((5, 5)), variety="broad")


def test_wide_spines_vary_and_hold_together():
    spines = [_wide(seed) for seed in range(60)]
    slopes, slips, losses = [], [], []
    for a in spines:
        z = [v.centre_mm[2] for v in a.vertebrae[:11]]
        assert all(p > q for p, q in zip(z, z[1:]))
        back = a.vertebra("S1").frame[:, 2]
        slopes.append(np.degrees(np.arctan2(-back[1], back[2])))
        slips.append(max(abs(d.shape["slip"]) for d in a.discs))
        losses.append(min(np.degrees(v.wedge) for v in a.vertebrae[2:9]))
        for v in a.vertebrae[:11]:
            a_s, p_s, p_i, a_i = v.corners_mm()
            up = v.frame[:, 2]
            assert (a_s - a_i) @ up > 4 and (p_s - p_i) @ up > 4
        for d in a.discs[2:10]:  # end plates do not pass through each other
            upper = a.vertebrae[phantom.VERTEBRAE.index(d.above)].corners_mm()
            lower = a.vertebrae[phantom.VERTEBRAE.index(d.above) + 1].corners_mm()
            assert (upper[3] - lower[0]) @ d.frame[:, 2] > -0.5 and (upper[2] - lower[1]) @ d.frame[:, 2] > -0.5
    assert min(slopes) < 22 and max(slopes) > 48
    assert max(slips) > 5 and min(losses) < -12


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 5, 6])
def test_wide_corners_are_the_painted_bodies_corners(seed):
    anatomy = _wide(seed)
    anatomy.wide["screws"] = []
    grid = phantom.paint(anatomy, (1.0, 0.8, 0.8), (8, 8, 10))[0]
    inside, beyond = [], []
    for v in anatomy.vertebrae[4:11]:
        left, back, up = v.frame.T
        for k, corner in enumerate(v.corners_mm()):
            inward = back * (1 if k in (0, 3) else -1)
            inner = corner + (up * -3.0 if k < 2 else up * 3.0)
            inside.append(_share(grid, MARROW, inner + inward * 3.0))
            if not v.shape["lips"] and v.name != "S1":
                beyond.append(_share(grid, MARROW, inner - inward * 2.5))
    assert np.mean(np.array(inside) > 0.3) > 0.96
    assert np.mean(np.array(beyond) < 0.5) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("seed", [21, 22, 23])
def test_wide_studies_are_simulated(seed):
    anatomy, _, _, grids, plans, rng = phantom.simulate(seed, anomalies="none", variety="wide")
    plan = next(p for p in plans if p.description == "Sagittal T1")
    stack = phantom.acquire_study(rng, anatomy, grids, [plan])[0]
    assert np.isfinite(stack).all() and stack.std() > 0.02
    assert set(anatomy.points_mm()) == {(c, k) for c in range(5) for k in range(5)}


def test_fat_suppression_and_proton_density():
    grey = {k: dict(zip(phantom.TISSUES, phantom.contrast_table(k))) for k in ("T1", "T1FS", "T2", "T2FS", "PD")}
    for full, quiet in (("T1", "T1FS"), ("T2", "T2FS")):
        for tissue in ("fat", "fatty_marrow"):
            assert grey[quiet][tissue] < 0.3 * grey[full][tissue]
    assert grey["PD"]["fat"] > grey["PD"]["csf"] > grey["PD"]["muscle"] > grey["PD"]["cortex"]
    # The tissues that were there before draw the same numbers from the same generator.
    rng = np.random.default_rng(1)
    phantom.contrast_table("T1", rng)
    other = np.random.default_rng(1)
    other.normal(0, 1, phantom.STANDARD_TISSUES + 1)
    assert rng.random() == other.random()


@pytest.mark.slow
def test_command_line_knows_the_variety(tmp_path):
    out = tmp_path / "wide"
    phantom.make_dataset(out, train=1, test=0, seed=2, workers=1, progress=False, variety="wide")
    assert json.loads((out / "phantom.json").read_text())["variety"] == "wide"
    with pytest.raises(FileExistsError):
        phantom.make_dataset(out, train=1, test=0, seed=2, workers=1, progress=False)
