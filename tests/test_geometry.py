"""DICOM series to volumes, patient coordinates, crops. Random oblique series, checked against SimpleITK."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

import utils


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
    return utils.read_study(root, {11: description})


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
    volume = utils.Volume(np.zeros((4, 5, 6)), random_affine(rng), 1, 2, "Sagittal T1", 0, np.arange(4))
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
    (inverted,) = utils.read_study(tmp_path / "6", {11: "Sagittal T1"}).volumes
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
    study = utils.read_study(tmp_path / "5", {11: "Sagittal T1", 12: "Axial T2", 13: "Localizer"})
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
        "74.dcm:",
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
        volumes.append(utils.Volume((position @ slope).astype(np.float32), affine, 1, 2, description, 0, np.arange(30)))
    return utils.Study(1, volumes)


@pytest.mark.parametrize("seed", range(4))
def test_crop_of_a_linear_phantom_is_linear(seed):
    rng = np.random.default_rng(seed)
    slope = rng.uniform(-0.02, 0.02, 3)
    study = linear_study(rng, slope)
    axes = rotation(rng)
    box = utils.LevelBox("l1_l2", rng.uniform(-5, 5, 3), axes, np.array([30.0, 40.0, 40.0]))
    shape, extent_mm, shift_mm = (24, 40, 36), (30.0, 40.0, 44.0), (2.0, -3.0, 5.0)
    crop, covered = utils.crop_level(study, box, shape, extent_mm, shift_mm)
    assert crop.shape == covered.shape == (3, *shape) and crop.dtype == np.float16
    head, left, back = axes
    center = box.center_lps_mm + np.array(shift_mm) @ axes
    steps = [(np.arange(n) - (n - 1) / 2) / n for n in shape]
    # Crop axes: head to foot, front to back, right to left.
    position = (
        center
        - steps[0][:, None, None, None] * head * extent_mm[0]
        + steps[1][None, :, None, None] * back * extent_mm[2]
        + steps[2][None, None, :, None] * left * extent_mm[1]
    )
    truth = position @ slope
    for channel in (0, 1):
        assert covered[channel].mean() > 0.95  # inside the covered region there are no holes
        error = np.abs(crop[channel] - truth)[covered[channel]]
        assert error.max() < 0.01 * (truth.max() - truth.min())
    assert not covered[2].any() and not crop[2].any()


def test_coverage_ends_where_the_slices_end():
    affine = np.array([[0, 0, 1.0, -20], [0, 1.0, 0, -20], [4.0, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = utils.Volume(np.ones((3, 40, 40), np.float32), affine, 1, 2, "Axial T2", 0, np.arange(3))
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    _, covered = utils.sample_box(utils.Study(1, [volume]), (0, 0, 4.0), axes, (40.0, 10.0, 10.0), (40, 10, 10))
    # Three slices 4 mm apart cover 12 mm.
    assert covered[1].any((1, 2)).sum() == 12


def test_study_file_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    study = utils.normalise_study(linear_study(rng, np.array([0.5, 0.2, 0.1])))
    utils.save_study(replace_problems(study, ["one"]), tmp_path / "1.safetensors")
    loaded = utils.load_study(tmp_path / "1.safetensors")
    assert loaded.problems == ["one"] and [v.description for v in loaded.volumes] == ["Sagittal T1", "Axial T2"]
    for before, after in zip(study.volumes, loaded.volumes, strict=True):
        assert after.array.dtype == np.float16 and (before.array == after.array).all()
        assert (before.affine == after.affine).all() and (before.instance_numbers == after.instance_numbers).all()
    assert len(utils.load_study(tmp_path / "1.safetensors", ["Axial T2"]).volumes) == 1


def replace_problems(study, problems):
    return utils.Study(study.study_id, study.volumes, problems)


def test_boxes_table_round_trip():
    rng = np.random.default_rng(0)
    axes = rotation(rng)
    boxes = [
        utils.LevelBox(level, rng.uniform(-50, 50, 3), axes, np.array([20.0, 50, 40]), 0.5, "t2")
        for level in utils.LEVELS
    ]
    table = utils.boxes_to_table(7, boxes)
    again = utils.boxes_from_table(table, 7)
    for one, two in zip(boxes, again, strict=True):
        np.testing.assert_allclose(one.corners_lps(), two.corners_lps())
        np.testing.assert_allclose(one.from_lps(one.to_lps([1.0, 2, 3])), [1, 2, 3])
    with pytest.raises(KeyError, match="no l2_l3"):
        utils.boxes_from_table(table[table["level"] != "l2_l3"], 7)


def test_label_points_land_in_patient_space(tmp_path):
    import pandas as pd

    rng = np.random.default_rng(5)
    affine = random_affine(rng)
    write_series(tmp_path / "5/11", rng.integers(0, 99, (4, 6, 6)), affine, [4, 3, 2, 1])
    study = read_one(tmp_path / "5")
    points = pd.DataFrame(
        {"series_id": [11, 11, 12], "instance_number": [3, 9, 3], "x_px": [2.0, 1, 1], "y_px": [4.0, 1, 1]}
    )
    lps = utils.coordinates_to_lps(points, study)
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
    box = utils.LevelBox("l1_l2", rng.uniform(-50, 50, 3), rotation(rng), np.array([20.0, 50, 40]))
    theirs = np.asarray(box.as_open3d().get_box_points())
    distance = np.linalg.norm(theirs[:, None] - box.corners_lps()[None], axis=-1)
    assert distance.min(1).max() < 1e-6
    study = utils.normalise_study(linear_study(rng, np.array([0.5, 0.2, 0.1])))
    cloud = utils.point_cloud(study, every=8)
    colours = np.asarray(cloud.colors)
    assert len(cloud.points) and not colours[:, 2].any() and colours[:, 0].any() and colours[:, 1].any()
