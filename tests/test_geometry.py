"""DICOM series to volumes, patient coordinates, crops. Random oblique series, checked against SimpleITK."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
import pytest
import small_study
import torch
from benchmarks.baselines import voxelise_point_cloud
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG2MPML,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.ndimage import binary_erosion, binary_fill_holes, map_coordinates

import utils
from lumbar.data import resample as resample_module
from lumbar.data.crop import Crop
from lumbar.data.dicom import read_slice, read_slices, read_study
from lumbar.data.geometry import LevelBox, boxes_to_table, coordinates_to_lps
from lumbar.data.greys import normalise_study
from lumbar.data.pixels import DECODERS, DicomProblem
from lumbar.data.resample import crop_affine, crop_level, crop_study, resample, sample_box
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume, save_study
from lumbar.limits import TookTooLong, cpu_limit
from lumbar.look.point_cloud import point_cloud


def rotation(rng):
    """A random rotation matrix (3, 3), determinant 1."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q[:, [1, 0, 2]]


def write_series(folder, array, affine, instances=None, **tags):
    """Write (n, h, w) integer pixels as one MR file a slice; affine as Volume's; the files are named by instance."""
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = generate_uid(), generate_uid()
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    for index, pixels in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = MRImageStorage, meta.MediaStorageSOPInstanceUID, "MR"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = series, series, frame
        ds.InstanceNumber = index + 1
        ds.ImagePositionPatient = [f"{v:.8g}" for v in affine[:3] @ [index, 0, 0, 1]]
        ds.ImageOrientationPatient = [f"{v:.10g}" for v in np.r_[affine[:3, 2] / steps[2], affine[:3, 1] / steps[1]]]
        ds.PixelSpacing = [f"{steps[1]:.8g}", f"{steps[2]:.8g}"]
        ds.SliceThickness = ds.SpacingBetweenSlices = f"{steps[0]:.8g}"
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = pixels.shape
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, int(pixels.min() < 0)
        ds.PixelData = pixels.astype("<i2" if pixels.min() < 0 else "<u2").tobytes()
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        name = index + 1 if instances is None else instances[index]
        ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)


def random_affine(rng, spacing=(4.4, 0.7, 0.6), plane="Sagittal"):
    """Slices along the normal of (row, column), up to 25 degrees oblique: the geometry of an ordinary MR series."""
    tilt = rotation(rng)
    while np.trace(tilt) < 1 + 2 * np.cos(np.deg2rad(25)):
        tilt = rotation(rng)
    # Columns of `axes`: direction of growing row index, of growing column index.
    upright = np.array([[0, 0, -1.0], [0, 1.0, 0]]) if plane == "Sagittal" else np.array([[0, 1.0, 0], [1.0, 0, 0]])
    axes = tilt @ upright.T
    affine = np.eye(4)
    affine[:3, 1], affine[:3, 2] = axes[:, 0] * spacing[1], axes[:, 1] * spacing[2]
    affine[:3, 0] = np.cross(axes[:, 1], axes[:, 0]) * spacing[0]
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


def read_one(root, description="Sagittal T1"):
    return read_study(root, {11: description})


@pytest.mark.parametrize("seed", range(4))
def test_affine_agrees_with_simpleitk(tmp_path, seed):
    import SimpleITK as sitk

    rng = np.random.default_rng(seed)
    array = rng.integers(0, 4000, (6, 12, 9))
    # Files in an order that says nothing about position, with gaps in their numbers.
    write_series(tmp_path / "5/11", array, random_affine(rng), instances=rng.permutation(np.arange(3, 40))[:6])
    (volume,) = read_one(tmp_path / "5").volumes
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "5/11")))
    image = reader.Execute()
    assert volume.array.shape == array.shape
    for ijk in rng.uniform(0, 5, (10, 3)):
        theirs = image.TransformContinuousIndexToPhysicalPoint([ijk[2], ijk[1], ijk[0]])
        ours = volume.voxel_to_lps(ijk)
        flipped = volume.voxel_to_lps([5 - ijk[0], ijk[1], ijk[2]])
        assert min(np.abs(ours - theirs).max(), np.abs(flipped - theirs).max()) < 1e-3
    pixels = sitk.GetArrayFromImage(image)
    assert (volume.array == pixels).all() or (volume.array == pixels[::-1]).all()


def test_every_voxel_keeps_its_place(tmp_path):
    rng = np.random.default_rng(1)
    array, affine = rng.integers(0, 4000, (5, 8, 7)), random_affine(rng)
    instances = [9, 2, 30, 4, 11]
    write_series(tmp_path / "5/11", array, affine, instances)
    (volume,) = read_one(tmp_path / "5").volumes
    for index, instance in enumerate(instances):
        position = volume.slice_of(instance)
        assert (volume.array[position] == array[index]).all()
        expected = affine[:3] @ [index, 3, 2, 1]
        np.testing.assert_allclose(volume.voxel_to_lps([position, 3, 2]), expected, atol=1e-4)


def test_patient_coordinates_and_back():
    rng = np.random.default_rng(0)
    volume = Volume(np.zeros((4, 5, 6)), random_affine(rng), 1, 2, "Sagittal T1", 0, np.arange(4))
    points = rng.uniform(-300, 300, (50, 3))
    np.testing.assert_allclose(volume.voxel_to_lps(volume.lps_to_voxel(points)), points, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, (4.4, 0.7, 0.6))


def test_blocks_of_different_tilt_become_volumes(tmp_path):
    rng = np.random.default_rng(2)
    first, second = random_affine(rng, plane="Axial"), random_affine(rng, plane="Axial")
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), first, [1, 2, 3, 4])
    write_series(tmp_path / "5/11", rng.integers(0, 99, (3, 6, 6)), second, [5, 6, 7])
    study = read_one(tmp_path / "5", "Axial T2")
    assert sorted(len(v.array) for v in study.volumes) == [3, 4]
    assert [v.block for v in study.volumes] == [0, 1]


@pytest.mark.parametrize("deep", [0.0, 2.2, 22.0])
def test_stacks_of_equal_tilt_beside_each_other_stay_apart(tmp_path, deep):
    # Two discs of the same tilt: one stack each, shifted within the plane, here also interleaved or contiguous.
    rng = np.random.default_rng(6)
    first = random_affine(rng, plane="Axial")
    second = first.copy()
    second[:3, 3] += first[:3, 1] / np.linalg.norm(first[:3, 1]) * 25 + first[:3, 0] / 4.4 * deep
    array = rng.integers(0, 99, (10, 6, 6))
    write_series(tmp_path / "5/11", array[:5], first, [1, 2, 3, 4, 5])
    write_series(tmp_path / "5/11", array[5:], second, [6, 7, 8, 9, 10])
    study = read_one(tmp_path / "5", "Axial T2")
    assert len(study.volumes) == 2
    for volume in study.volumes:
        for affine, numbers in ((first, range(1, 6)), (second, range(6, 11))):
            for index, number in enumerate(numbers):
                if (place := volume.slice_of(number)) is not None:
                    np.testing.assert_allclose(
                        volume.voxel_to_lps([place, 0, 0]), affine[:3] @ [index, 0, 0, 1], atol=1e-3
                    )


def test_a_stack_stepping_aside_a_little_is_one_volume(tmp_path):
    # Oblique slices whose positions follow the patient's axis: each lies a little aside of the one before.
    rng = np.random.default_rng(7)
    affine = random_affine(rng, plane="Axial")
    affine[:3, 0] += affine[:3, 1] / np.linalg.norm(affine[:3, 1]) * 1.6
    write_series(tmp_path / "5/11", rng.integers(0, 99, (6, 5, 5)), affine)
    (volume,) = read_one(tmp_path / "5", "Axial T2").volumes
    np.testing.assert_allclose(np.abs(volume.affine[:3, 0]), np.abs(affine[:3, 0]), atol=1e-4)


@pytest.mark.parametrize("aside_mm", [0.0, 0.4])
def test_a_spacing_with_a_sign_keeps_the_stack_together(tmp_path, aside_mm):
    rng = np.random.default_rng(17)
    affine = random_affine(rng)
    affine[:3, 0] += affine[:3, 1] / np.linalg.norm(affine[:3, 1]) * aside_mm
    write_series(tmp_path / "5/11", rng.integers(0, 99, (5, 6, 6)), affine, SpacingBetweenSlices="-4.4")
    (volume,) = read_one(tmp_path / "5").volumes
    assert len(volume.array) == 5


def test_a_series_of_another_plane_than_its_name_is_left_out(tmp_path):
    rng = np.random.default_rng(8)
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), random_affine(rng, plane="Axial"))
    study = read_one(tmp_path / "5", "Sagittal T1")
    assert not study.volumes and any("4 axial slices in a series called Sagittal T1" in p for p in study.problems)


def test_a_gap_cuts_a_series_and_a_repeated_slice_is_left_out(tmp_path):
    rng = np.random.default_rng(3)
    affine = random_affine(rng)
    far = affine.copy()
    far[:3, 3] += affine[:3, 0] * 9
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), affine, [1, 2, 3, 4])
    write_series(tmp_path / "5/11", rng.integers(0, 99, (3, 6, 6)), far, [5, 6, 7])
    write_series(tmp_path / "5/11", rng.integers(0, 99, (1, 6, 6)), affine, [8])
    study = read_one(tmp_path / "5")
    assert [len(v.array) for v in study.volumes] in ([4, 3], [3, 4])
    assert any("same place" in problem for problem in study.problems)


def test_rescale_signed_and_monochrome1(tmp_path):
    affine = random_affine(np.random.default_rng(0))
    array = np.arange(-50, 50).reshape(4, 5, 5)
    write_series(tmp_path / "5/11", array, affine, RescaleSlope="2.5", RescaleIntercept="-10")
    (volume,) = read_one(tmp_path / "5").volumes
    place = [volume.slice_of(i + 1) for i in range(4)]
    np.testing.assert_allclose(volume.array[place], array * 2.5 - 10)
    write_series(tmp_path / "6/11", array, affine, PhotometricInterpretation="MONOCHROME1")
    (inverted,) = read_study(tmp_path / "6", {11: "Sagittal T1"}).volumes
    assert inverted.array[place[0], 0, 0] > inverted.array[place[0], 4, 4]


def test_broken_files_are_named_with_their_reason(tmp_path):
    rng = np.random.default_rng(4)
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), random_affine(rng))
    folder = tmp_path / "5/11"
    (folder / "70.dcm").write_text("not a picture")
    ds = pydicom.dcmread(folder / "2.dcm")
    del ds.ImagePositionPatient
    ds.save_as(folder / "71.dcm")
    (folder / "72.dcm").write_bytes((folder / "3.dcm").read_bytes()[:-40])
    ds = pydicom.dcmread(folder / "2.dcm")
    ds.PixelSpacing = [0, 1]
    ds.save_as(folder / "73.dcm")
    text = (folder / "4.dcm").read_bytes()
    thickness = pydicom.dcmread(folder / "4.dcm")["SliceThickness"].value.original_string.encode()
    (folder / "74.dcm").write_bytes(text.replace(thickness, thickness.replace(b".", b","), 1))
    (tmp_path / "5/99").mkdir()
    study = read_study(tmp_path / "5", {11: "Sagittal T1", 12: "Axial T2", 13: "Localizer"})
    assert len(study.volumes) == 1 and study.volumes[0].array.shape == (4, 6, 6)
    said = "\n".join(study.problems)
    for words in (
        "70.dcm: no readable DICOM",
        "71.dcm: ImagePositionPatient is missing",
        "72.dcm: pixels cannot",
        "73.dcm: PixelSpacing",
        "series 12: no readable slice",
        "unknown series description 'Localizer'",
        "no Sagittal T2/STIR",
        "1 file is the same image at the same place as another (the first: 74, as 4) and left out",
        "series 99: not in the descriptions table",
    ):
        assert words in said


def linear_study(rng, slope):
    """Two oblique volumes whose intensity is slope @ position: what a crop must show anywhere inside."""
    volumes = []
    for description, tilt in (("Sagittal T1", 0.2), ("Axial T2", 0.3)):
        order = (
            [0, 2, 1] if description == "Sagittal T1" else [2, 1, 0]
        )  # which patient axis slices, rows, columns follow
        axes = np.eye(3)[order] + tilt * rng.uniform(-1, 1, (3, 3))
        axes = np.linalg.qr(axes.T)[0].T
        affine = np.eye(4)
        affine[:3, :3] = (axes * np.array([[4.0], [0.8], [0.7]])).T
        shape = np.array([30, 160, 160])
        affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        position = index @ affine[:3, :3].T + affine[:3, 3]
        volumes.append(Volume((position @ slope).astype(np.float32), affine, 1, 2, description, 0, np.arange(30)))
    return Study(1, volumes)


@pytest.mark.parametrize("seed", range(4))
def test_crop_of_a_linear_phantom_is_linear(seed):
    rng = np.random.default_rng(seed)
    slope = rng.uniform(-0.02, 0.02, 3)
    study = linear_study(rng, slope)
    axes = rotation(rng)
    box = LevelBox("l1_l2", rng.uniform(-5, 5, 3), axes, np.array([30.0, 40.0, 40.0]))
    shape, extent_mm, shift_mm = (24, 40, 36), (30.0, 44.0, 40.0), (-2.0, 5.0, -3.0)
    crop, covered = crop_level(study, box, Crop("level", shape, extent_mm, shift_mm))
    assert crop.shape == covered.shape == (3, *shape) and crop.dtype == np.float16
    head, left, back = axes
    center = box.center_lps_mm - shift_mm[0] * head + shift_mm[1] * back + shift_mm[2] * left
    steps = [(np.arange(n) - (n - 1) / 2) / n for n in shape]
    # Crop axes: head to foot, front to back, right to left.
    position = (
        center
        - steps[0][:, None, None, None] * head * extent_mm[0]
        + steps[1][None, :, None, None] * back * extent_mm[1]
        + steps[2][None, None, :, None] * left * extent_mm[2]
    )
    truth = position @ slope
    for channel in (0, 1):
        assert covered[channel].mean() > 0.95  # inside the covered region there are no holes
        error = np.abs(crop[channel] - truth)[covered[channel]]
        assert error.max() < 0.01 * (truth.max() - truth.min())
    assert not covered[2].any() and not crop[2].any()


def test_coverage_ends_where_the_slices_end():
    affine = np.array([[0, 0, 1.0, -20], [0, 1.0, 0, -20], [4.0, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = Volume(np.ones((3, 40, 40), np.float32), affine, 1, 2, "Axial T2", 0, np.arange(3))
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    _, covered = sample_box(Study(1, [volume]), (0, 0, 4.0), axes, (40.0, 10.0, 10.0), (40, 10, 10))
    # Three slices 4 mm apart cover 12 mm.
    assert covered[1].any((1, 2)).sum() == 12


def test_study_file_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    study = normalise_study(linear_study(rng, np.array([0.5, 0.2, 0.1])))
    save_study(replace_problems(study, ["one"]), tmp_path / "1.safetensors")
    loaded = utils.load_study(tmp_path / "1.safetensors")
    assert loaded.problems == ["one"] and [v.description for v in loaded.volumes] == ["Sagittal T1", "Axial T2"]
    for before, after in zip(study.volumes, loaded.volumes, strict=True):
        assert after.array.dtype == np.float16 and (before.array == after.array).all()
        assert (before.affine == after.affine).all() and (before.instance_numbers == after.instance_numbers).all()
    assert len(utils.load_study(tmp_path / "1.safetensors", ["Axial T2"]).volumes) == 1


def test_study_file_of_8_bits_keeps_the_picture(tmp_path):
    rng = np.random.default_rng(0)
    study = normalise_study(linear_study(rng, np.array([0.5, 0.2, 0.1])))
    study.volumes[0].array[0, 0, :4] = (0.0, -1.0, 8.0, 1.0)
    for bits in (8, 16):
        save_study(study, tmp_path / f"{bits}.safetensors", bits)
    loaded = utils.load_study(tmp_path / "8.safetensors")
    for before, after in zip(study.volumes, loaded.volumes, strict=True):
        assert after.array.dtype == np.float16
        assert np.abs(np.clip(before.array, -0.125, 1.46875).astype(float) - after.array).max() <= 0.5 / 160 + 1e-3
    assert loaded.volumes[0].array[0, 0, 0] == 0  # black stays black: what shows nothing is told by it
    sizes = [(tmp_path / f"{bits}.safetensors").stat().st_size for bits in (8, 16)]
    assert 0.49 < sizes[0] / sizes[1] < 0.6
    with pytest.raises(ValueError, match="BITS must be 8 or 16"):
        save_study(study, tmp_path / "12.safetensors", 12)


def replace_problems(study, problems):
    return Study(study.study_id, study.volumes, problems)


def test_boxes_table_round_trip():
    rng = np.random.default_rng(0)
    axes = rotation(rng)
    boxes = [
        LevelBox(level, rng.uniform(-50, 50, 3), axes, np.array([20.0, 50, 40]), 0.5, Source.T2)
        for level in utils.LEVELS
    ]
    table = boxes_to_table(7, boxes)
    again = utils.boxes_from_table(table, 7)
    for one, two in zip(boxes, again, strict=True):
        np.testing.assert_allclose(one.corners_lps(), two.corners_lps())
        np.testing.assert_allclose(one.from_lps(one.to_lps([1.0, 2, 3])), [1, 2, 3])
    with pytest.raises(KeyError, match="no l2_l3"):
        utils.boxes_from_table(table[table["level"] != "l2_l3"], 7)


@pytest.mark.parametrize(
    ("columns", "value", "message"),
    [
        *((["x_mm"], value, "not finite") for value in (np.nan, np.inf, -np.inf)),
        (["extent_back_mm"], np.nan, "not finite"),
        (["r12"], np.inf, "not finite"),
        (["r00"], 1.5, "right-handed"),
        (["r00", "r01", "r02"], 0.0, "right-handed"),
        (["r10", "r20"], 0.6, "right-handed"),
        (["r22"], -1.0, "right-handed"),  # the mirror image
        (["extent_head_mm"], 0.0, "not positive"),
        (["extent_left_mm"], -50.0, "not positive"),
    ],
)
def test_boxes_that_can_be_nowhere_are_refused(columns, value, message):
    boxes = [LevelBox(level, np.zeros(3), np.eye(3), np.array([20.0, 50, 40])) for level in utils.LEVELS]
    table = boxes_to_table(7, boxes)
    assert len(utils.boxes_from_table(table, 7)) == 5
    table.loc[table["level"] == "l4_l5", columns] = value
    with pytest.raises(ValueError, match=f"l4_l5 of study 7 .*{message}.*run 02_train_spinenet"):
        utils.boxes_from_table(table, 7)


def test_label_points_land_in_patient_space(tmp_path):
    import pandas as pd

    rng = np.random.default_rng(5)
    affine = random_affine(rng)
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), affine, [4, 3, 2, 1])
    study = read_one(tmp_path / "5")
    points = pd.DataFrame(
        {"series_id": [11, 11, 12], "instance_number": [3, 9, 3], "x_px": [2.0, 1, 1], "y_px": [4.0, 1, 1]}
    )
    lps = coordinates_to_lps(points, study)
    np.testing.assert_allclose(lps[0], affine[:3] @ [1, 4, 2, 1], atol=1e-4)
    assert np.isnan(lps[1:]).all()
    index, distance, row, column = utils.nearest_slice(study.volumes[0], lps[0])
    assert study.volumes[0].instance_numbers[index] == 3 and distance < 1e-3
    assert (row, column) == pytest.approx((4, 2), abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_and_points_as_open3d(seed):
    # The wheel needs a system library (libusb) that a bare machine lacks; only the 3D view uses it.
    pytest.importorskip("open3d", exc_type=ImportError)
    rng = np.random.default_rng(seed)
    box = LevelBox("l1_l2", rng.uniform(-50, 50, 3), rotation(rng), np.array([20.0, 50, 40]))
    theirs = np.asarray(box.as_open3d().get_box_points())
    distance = np.linalg.norm(theirs[:, None] - box.corners_lps()[None], axis=-1)
    assert distance.min(1).max() < 1e-6
    study = normalise_study(linear_study(rng, np.array([0.5, 0.2, 0.1])))
    cloud = point_cloud(study, every=8)
    colours = np.asarray(cloud.colors)
    assert len(cloud.points) and not colours[:, 2].any() and colours[:, 0].any() and colours[:, 1].any()


# ---- What else a series may be ----


def as_enhanced(folder, array, affine, name="1", order=None, own_scale=False):
    """Write (n, h, w) pixels as one Enhanced MR file, its frames in this order; the geometry in functional groups."""
    folder.mkdir(parents=True, exist_ok=True)
    order = range(len(array)) if order is None else order
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = EnhancedMRImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = EnhancedMRImageStorage, meta.MediaStorageSOPInstanceUID, "MR"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    ds.InstanceNumber, ds.NumberOfFrames = 1, len(array)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = array.shape[1:]
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0

    def macro(**tags):
        item = Dataset()
        for keyword, value in tags.items():
            setattr(item, keyword, value)
        return Sequence([item])

    orientation = [f"{v:.10g}" for v in np.r_[affine[:3, 2] / steps[2], affine[:3, 1] / steps[1]]]
    shared = Dataset()
    shared.PlaneOrientationSequence = macro(ImageOrientationPatient=orientation)
    shared.PixelMeasuresSequence = macro(
        PixelSpacing=[f"{steps[1]:.8g}", f"{steps[2]:.8g}"], SliceThickness="3.3", SpacingBetweenSlices="4.4"
    )
    shared.PixelValueTransformationSequence = macro(RescaleSlope="2", RescaleIntercept="-7", RescaleType="US")
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for number, index in enumerate(order):
        own = Dataset()
        position = [f"{v:.8g}" for v in affine[:3] @ [index, 0, 0, 1]]
        own.PlanePositionSequence = macro(ImagePositionPatient=position)
        if own_scale:
            own.PixelValueTransformationSequence = macro(RescaleSlope=str(number + 1), RescaleIntercept="0")
        groups.append(own)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    ds.PixelData = array[list(order)].astype("<u2").tobytes()
    ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)


def test_enhanced_multi_frame_is_the_same_volume_as_single_frames(tmp_path):
    rng = np.random.default_rng(10)
    array, affine = rng.integers(0, 4000, (6, 8, 7)), random_affine(rng)
    order = [3, 0, 5, 1, 4, 2]
    as_enhanced(tmp_path / "5/11", array, affine, order=order)
    (volume,) = read_one(tmp_path / "5").volumes
    assert volume.array.shape == array.shape and volume.thickness_mm == 3.3
    for frame, index in enumerate(order, 1):
        place = volume.slice_of(frame)
        assert (volume.array[place] == array[index] * 2.0 - 7).all()
        np.testing.assert_allclose(volume.voxel_to_lps([place, 3, 2]), affine[:3] @ [index, 3, 2, 1], atol=1e-4)
    # A frame's own group goes before the shared one.
    as_enhanced(tmp_path / "6/11", array, affine, own_scale=True)
    (volume,) = read_one(tmp_path / "6").volumes
    for index in range(6):
        assert (volume.array[volume.slice_of(index + 1)] == array[index] * (index + 1.0)).all()


def test_two_multi_frame_files_count_their_frames_on(tmp_path):
    rng = np.random.default_rng(11)
    array, affine = rng.integers(0, 99, (6, 5, 5)), random_affine(rng)
    far = affine.copy()
    far[:3, 3] += 3 * affine[:3, 0]
    as_enhanced(tmp_path / "5/11", array[:3], affine, "1")
    as_enhanced(tmp_path / "5/11", array[3:], far, "2")
    (volume,) = read_one(tmp_path / "5").volumes
    assert sorted(volume.instance_numbers) == [1, 2, 3, 4, 5, 6]
    assert (volume.array[volume.slice_of(5)] == array[4] * 2.0 - 7).all()


def test_frames_without_a_place_are_named_and_the_rest_goes_on(tmp_path):
    rng = np.random.default_rng(12)
    array, affine = rng.integers(0, 99, (5, 6, 6)), random_affine(rng)
    as_enhanced(tmp_path / "5/11", array, affine)
    path = tmp_path / "5/11/1.dcm"
    ds = pydicom.dcmread(path)
    del ds.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence
    ds.save_as(path)
    study = read_one(tmp_path / "5")
    assert [len(v.array) for v in study.volumes] == [4]
    assert any("1.dcm: frame 5: ImagePositionPatient is missing" in p for p in study.problems)
    # Frames of the old multi-frame classes have no groups: where they lie is nowhere.
    del ds.PerFrameFunctionalGroupsSequence
    ds.save_as(path)
    study = read_one(tmp_path / "5")
    assert not study.volumes and any("1.dcm: 5 frames without functional groups" in p for p in study.problems)


def test_single_slices_other_sizes_and_localisers(tmp_path):
    rng = np.random.default_rng(13)
    sagittal, axial = random_affine(rng), random_affine(rng, plane="Axial")
    # One slice, a stack of another matrix in the same place, and an axial localiser slice, all in one series.
    write_series(tmp_path / "5/11", rng.integers(0, 99, (1, 6, 6)), sagittal, [1])
    write_series(tmp_path / "5/11", rng.integers(0, 99, (3, 8, 6)), sagittal, [2, 3, 4])
    write_series(tmp_path / "5/11", rng.integers(0, 99, (1, 6, 6)), axial, [5])
    study = read_one(tmp_path / "5")
    assert sorted(v.array.shape for v in study.volumes) == [(1, 6, 6), (3, 8, 6)]
    assert any("1 axial slices in a series called Sagittal T1" in p for p in study.problems)
    single = min(study.volumes, key=lambda v: len(v.array))
    np.testing.assert_allclose(np.abs(single.affine[:3, 0]), np.abs(sagittal[:3, 0]), atol=1e-4)


def test_monochrome1_keeps_the_slices_on_one_scale(tmp_path):
    # Slices with different extremes: turned over one by one, equal tissue would differ between them.
    array = np.stack([np.full((4, 4), 300), np.full((4, 4), 300)])
    array[0, 0, 0], array[1, 0, 0] = 10, 4000
    write_series(
        tmp_path / "5/11", array, random_affine(np.random.default_rng(0)), PhotometricInterpretation="MONOCHROME1"
    )
    (volume,) = read_one(tmp_path / "5").volumes
    first, second = (volume.array[volume.slice_of(n)] for n in (1, 2))
    assert (first[1:] == second[1:]).all() and first[0, 0] > first[1, 1] and second[0, 0] < second[1, 1]
    assert first[0, 0] - first[1, 1] == 290


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("bits, stored, signed", [(16, 16, 0), (16, 12, 0), (16, 12, 1), (16, 16, 1), (8, 8, 0)])
def test_pixels_are_those_that_pydicom_decodes(tmp_path, bits, stored, signed, implicit):
    rng = np.random.default_rng(bits + stored)
    write_series(tmp_path, np.zeros((1, 5, 7), int), random_affine(rng))
    ds = pydicom.dcmread(tmp_path / "1.dcm")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, stored, stored - 1, signed
    low, high = (-(1 << (stored - 1)), 1 << (stored - 1)) if signed else (0, 1 << stored)
    ds.PixelData = rng.integers(low, high, 35).astype(f"<{'ui'[signed]}{bits // 8}").tobytes() + b"\0" * (bits == 8)
    ds["PixelData"].VR = "OW"
    if implicit:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    ds.save_as(tmp_path / "2.dcm", enforce_file_format=True)
    theirs = pydicom.dcmread(tmp_path / "2.dcm").pixel_array
    ours = read_slice(tmp_path / "2.dcm")["pixels"]
    assert len(np.unique(theirs)) > 20 and ours.dtype == np.float32 and (ours == theirs).all()


TEST_FILES = Path(pydicom.__file__).parent / "data/test_files"
MR_FILES = sorted(p.name for p in TEST_FILES.glob("MR_small*.dcm")) + ["examples_overlay.dcm", "emri_small.dcm"]


@pytest.mark.parametrize("name", MR_FILES)
def test_mr_files_of_pydicom(name):
    import SimpleITK as sitk

    if not (TEST_FILES / name).is_file():
        pytest.skip("not among the files that come with pydicom")
    try:
        slices, problems = read_slices(TEST_FILES / name)
    except DicomProblem as problem:
        package, module = DECODERS[pydicom.dcmread(TEST_FILES / name).file_meta.TransferSyntaxUID]
        assert find_spec(module) is None and f"pip install {package}" in str(problem)
        return
    assert not problems
    theirs = pydicom.dcmread(TEST_FILES / name).pixel_array.reshape(len(slices), *slices[0]["pixels"].shape)
    image = sitk.ReadImage(str(TEST_FILES / name))
    for item, pixels in zip(slices, theirs, strict=True):
        assert (item["pixels"] == pixels).all()
    (h, w), item = theirs[0].shape, slices[0]
    for y, x in ((0, 0), (h - 1, 0), (0, w - 1), (7, 31)):
        ours = item["position_lps"] + y * item["spacing_mm"][0] * item["column_lps"]
        ours = ours + x * item["spacing_mm"][1] * item["row_lps"]
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint([x, y, 0]), ours, atol=1e-3)


def test_compressed_files_load_or_say_what_they_need(tmp_path):
    rng = np.random.default_rng(14)
    array, affine = rng.integers(0, 4000, (4, 16, 16)), random_affine(rng)
    folder = tmp_path / "5/11"
    write_series(folder, array, affine)
    for number in (1, 2, 3):
        ds = pydicom.dcmread(folder / f"{number}.dcm")
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / f"{number}.dcm")
    (volume,) = read_one(tmp_path / "5").volumes
    assert all((volume.array[volume.slice_of(n + 1)] == array[n]).all() for n in range(4))
    # Files that no decoder can read: the sentence has the package where one is missing.
    syntaxes = {7: JPEGLosslessSV1, 8: JPEGLSLossless, 9: JPEGExtended12Bit, 10: MPEG2MPML}
    for number, syntax in syntaxes.items():
        ds = pydicom.dcmread(folder / "1.dcm")
        ds.PixelData = encapsulate([b"\0" * 64])
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(folder / f"{number}.dcm")
    study = read_one(tmp_path / "5")
    assert len(study.volumes) == 1 and len(study.volumes[0].array) == 4
    for number, syntax in syntaxes.items():
        (sentence,) = (p for p in study.problems if f" {number}.dcm: " in p)
        assert "pixels cannot be decoded" in sentence
        if syntax not in DECODERS:
            assert "No pixel data decoders" in sentence
        elif find_spec(DECODERS[syntax][1]) is None:
            assert f"{syntax.name} needs a" in sentence and f"pip install {DECODERS[syntax][0]}" in sentence


# ---- Crops against plain references ----


def oblique_study(rng, shape=(24, 60, 56), blocks=2):
    """Noise in an oblique sagittal volume and in axial blocks of different tilt that overlap."""
    volumes = []
    for number in range(1 + blocks):
        plane = "Axial" if number else "Sagittal"
        affine = random_affine(rng, (4.0, 0.9, 0.8), plane)
        affine[:3, 3] = rng.uniform(-4, 4, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        affine[:3, 3] += (number == 2) * rng.choice([-20.0, 20.0], 3)
        array = rng.random(shape).astype(np.float16)
        name = "Axial T2" if number else "Sagittal T1"
        volumes.append(Volume(array, affine, 1, 11 + number, name, 0, np.arange(1, shape[0] + 1), 4.0))
    return Study(1, volumes)


def plain_box(study, affine, shape):
    """What sample_box does, with scipy's interpolation in float64 and no window, block or trick."""
    crop, weight = np.zeros((2, 3, *shape))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    position = grid @ affine[:3, :3].T + affine[:3, 3]
    for volume in study.volumes:
        ijk = volume.lps_to_voxel(position)
        inside = ((ijk >= -0.5) & (ijk <= np.array(volume.array.shape) - 0.5)).all(-1)
        values = map_coordinates(volume.array.astype(float), np.moveaxis(ijk, -1, 0), order=1, mode="nearest")
        channel = utils.DESCRIPTIONS.index(volume.description)
        crop[channel] += values * inside
        weight[channel] += inside
    return crop / np.maximum(weight, 1), weight > 0


@pytest.mark.parametrize("seed", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_crops_equal_a_plain_interpolation(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    study = oblique_study(rng)
    box = LevelBox("l1_l2", rng.uniform(-5, 5, 3), rotation(rng), np.array([30.0, 40.0, 40.0]))
    # Larger than the volumes, so that windows and the ends of covered runs matter; several blocks, also of one row.
    shape = (70, 50, 60)
    asked = Crop("level", shape, (45.0, 70.0, 60.0), (-1.0, 3.0, -2.0))
    monkeypatch.setitem(resample_module._BLOCK, "cpu", (1 << 17, 9000, 2000, 50)[seed])
    crop, covered = crop_level(study, box, asked)
    affine = crop_affine(box.to_lps((1.0, -2.0, 3.0)), box.axes, asked.extent_mm, shape)
    plain, where = plain_box(study, affine, shape)
    assert 0.3 < where[:2].mean() < 1 and (covered == where).mean() > 0.99999
    np.testing.assert_allclose(crop[covered & where], plain[covered & where], atol=1e-3)
    assert not crop[~covered].any()
    window, values, inside = resample(study.volumes[0], affine, shape)
    np.testing.assert_allclose(values.numpy()[where[0][window]], plain[0][window][where[0][window]], atol=1e-3)
    assert inside.numpy().sum() == where[0].sum() and not values[~inside].any()


def test_a_single_slice_is_a_slab():
    affine = np.array([[0, 0, 1.0, -20], [0, 1.0, 0, -20], [4.0, 0, 0, 0], [0, 0, 0, 1.0]])
    array = np.arange(1600, dtype=np.float32).reshape(1, 40, 40) / 1600
    study = Study(1, [Volume(array, affine, 1, 2, "Axial T2", 0, np.arange(1))])
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    crop, covered = sample_box(study, (-0.5, -0.5, 0), axes, (10.0, 8.0, 8.0), (10, 8, 8))
    assert covered[1].any((1, 2)).sum() == 4
    assert np.abs(crop[1, covered[1].all((1, 2))] - array[0, 16:24, 16:24]).max() < 1e-3


def linear_series(folder, rng, center, slope):
    """Sagittal T1 and T2 and two axial blocks as 16-bit files; intensity = slope @ (position - center) + 20000."""
    for number, plane, blocks in ((1, "Sagittal", 1), (2, "Axial", 2), (3, "Sagittal", 1)):
        for block in range(blocks):
            affine = random_affine(rng, (4.4, 0.9, 0.8), plane)
            shape = np.array([24, 110, 110])
            affine[:3, 3] = center + rng.uniform(-3, 3, 3) - affine[:3, :3] @ ((shape - 1) / 2)
            index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
            values = (index @ affine[:3, :3].T + affine[:3, 3] - center) @ slope + 20000
            instances = np.arange(1, 25) + 100 * block
            write_series(folder / str(number), np.round(values).astype(int), affine, instances, SliceThickness="4.0")


LINEAR_BOX = Crop("level", (64, 64, 64), (40.0, 48.0, 48.0))


@pytest.fixture(scope="module")
def linear_errors(tmp_path_factory):
    """Two random oblique 16-bit studies, read from files and cropped: shares of the truth's range, by method."""
    errors = {"crop": [], "cloud": []}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        center, slope = rng.uniform(-30, 30, 3), rng.uniform(-80, 80, 3)
        folder = tmp_path_factory.mktemp("linear") / "5"
        linear_series(folder, rng, center, slope)
        study = read_study(folder, dict(zip((1, 2, 3), utils.DESCRIPTIONS)))
        assert len(study.volumes) == 4
        # 16 bits need more than float16 holds: one linear map, which the truth gets too.
        low, high = np.percentile(study.volumes[0].array, (0.5, 99.5))
        study.volumes = [replace(v, array=(v.array - low) / (high - low)) for v in study.volumes]
        box = LevelBox("l3_l4", center, rotation(rng), np.array([30.0, 40.0, 40.0]))
        affine = crop_affine(center, box.axes, LINEAR_BOX.extent_mm, LINEAR_BOX.shape)
        index = np.stack(np.meshgrid(*map(np.arange, LINEAR_BOX.shape), indexing="ij"), -1)
        truth = (index @ affine[:3, :3].T + affine[:3, 3] - center) @ slope
        truth = (truth + 20000 - low) / (high - low)
        crop, covered = crop_level(study, box, LINEAR_BOX)
        errors["crop"].append((crop, covered, truth))
        try:
            cloud, occupied = voxelise_point_cloud(study, box, LINEAR_BOX)
        except ImportError:
            continue
        errors["cloud"].append((cloud, occupied, covered, truth))
    return errors


@pytest.mark.slow
def test_crops_of_a_linear_study_are_linear_and_without_holes(linear_errors):
    for crop, covered, truth in linear_errors["crop"]:
        assert covered.mean() > 0.9
        for channel in range(3):
            interior = binary_erosion(covered[channel], iterations=3)
            error = np.abs(crop[channel] - truth)[interior] / np.ptp(truth)
            assert error.max() < 0.01
            # No holes: what lies between covered voxels is covered.
            assert (binary_fill_holes(covered[channel]) == covered[channel]).all()


@pytest.mark.slow
def test_point_cloud_crops_show_the_same_with_holes(linear_errors):
    if not linear_errors["cloud"]:
        pytest.skip("Open3D cannot be loaded")
    for cloud, occupied, covered, truth in linear_errors["cloud"]:
        holes = (covered & ~occupied).sum() / covered.sum()
        # Inside, away from holes and black, it shows the same thing in the same place.
        error = np.abs(cloud - truth) / np.ptp(truth)
        filled = np.stack([binary_erosion(o, iterations=3) for o in occupied]) & covered & (truth > 0.1) & (truth < 0.9)
        assert filled.mean() > 0.05 and np.median(error[filled]) < 0.03
        assert 0 < holes < 0.6


def test_the_whole_study_as_a_point_cloud():
    pytest.importorskip("open3d", exc_type=ImportError)
    rng = np.random.default_rng(0)
    study = oblique_study(rng, (8, 30, 30), 1)
    for volume in study.volumes:
        volume.array[:] = 0.5
    whole = Crop("study", (32, 24, 28), (32.0, 24.0, 28.0))
    crop, occupied = voxelise_point_cloud(study, None, whole)
    plain, covered = crop_study(study, whole)
    assert crop.shape == occupied.shape == (3, *whole.shape) and crop.dtype == np.float16
    assert covered[0].any() and covered[1].any() and not occupied[2].any()
    assert (occupied & covered).sum() > 0.7 * covered.sum()
    assert occupied[~covered].mean() < 0.1
    # The mean of a voxel takes in the other series' black.
    mean, _ = voxelise_point_cloud(study, None, whole, pooling="average")
    both = occupied[0] & occupied[1]
    assert mean[0][both].mean() < 0.4 < crop[0][both].mean()


def test_sampling_on_a_gpu_is_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = np.random.default_rng(0)
    study = oblique_study(rng)
    box = LevelBox("l1_l2", np.zeros(3), rotation(rng), np.array([30.0, 40.0, 40.0]))
    asked = Crop.full_size("level", (48, 40, 44))
    one = crop_level(study, box, asked)
    two = crop_level(study, box, asked, device="cuda")
    np.testing.assert_allclose(two[0], one[0], atol=2e-3)
    assert (one[1] == two[1]).all()


def test_averaging_in_parts_changes_nothing_and_long_sampling_heeds_its_limit(monkeypatch):
    array = np.random.default_rng(0).random((7, 33, 20)).astype(np.float16)
    whole = resample_module._pooled(array, [3, 2], "cpu")
    monkeypatch.setattr(resample_module, "_CONVERTED_PX", 700)
    np.testing.assert_array_equal(whole, resample_module._pooled(array, [3, 2], "cpu"))
    np.testing.assert_allclose(whole[3, 4, 5], array[3, 12:15, 10:12].astype(np.float32).mean(), rtol=1e-6)

    study = small_study.make_study()
    with cpu_limit(-1.0), pytest.raises(TookTooLong):
        crop_study(study, Crop.full_size("study", (16,) * 3))  # its two axial stacks are averaged
