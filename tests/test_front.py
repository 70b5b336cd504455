"""What `utils` shows beside what notebooks use: a study from its files to its rows in a few lines of a script."""

import numpy as np
import pandas as pd
import pytest
import tiny

import utils


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A competition folder with one test study, 7."""
    root = tmp_path_factory.mktemp("front")
    tiny.write_study(root / "test_images" / "7")
    rows = [(7, series_id, text) for series_id, text in tiny.SERIES.items()]
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_members(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def study(data):
    return utils.normalise_study(utils.read_study(data / "test_images" / "7", tiny.SERIES))


def test_a_file_is_a_slice_and_a_folder_a_study(data, study, tmp_path):
    path = min((data / "test_images" / "7" / "101").iterdir())
    (one,), problems = utils.read_slices(path)
    assert problems == [] and one["pixels"].shape == utils.read_slice(path)["pixels"].shape
    (tmp_path / "1.dcm").write_text("no image")
    with pytest.raises(utils.DicomProblem):
        utils.read_slice(tmp_path / "1.dcm")
    assert isinstance(study, utils.Study) and all(isinstance(volume, utils.Volume) for volume in study.volumes)
    values = utils.normalise_volume(utils.read_study(data / "test_images" / "7", tiny.SERIES).volumes[0]).array
    np.testing.assert_array_equal(values, study.volumes[0].array)
    utils.save_study(study, tmp_path / "7.safetensors")
    assert len(utils.load_study(tmp_path / "7.safetensors").volumes) == len(study.volumes)
    (tmp_path / "8.safetensors").write_bytes(b"cut")
    with pytest.raises(utils.DamagedFile):
        utils.load_study(tmp_path / "8.safetensors")


def test_levels_are_boxes_and_boxes_are_cropped(study, weights):
    model = utils.load_spinenet(weights / "spinenet.safetensors")
    assert isinstance(model, utils.SpineNet)
    boxes, vertebrae, problem = utils.locate_levels_surely(study, model)
    assert [box.level for box in boxes] == list(utils.LEVELS) and isinstance(boxes[0], utils.LevelBox)
    assert all(isinstance(vertebra, utils.Vertebra) for vertebra in vertebrae)
    assert len(utils.boxes_to_table(7, boxes)) == 5 and len(utils.vertebrae_to_table(7, vertebrae)) == len(vertebrae)
    crop, _ = utils.crop_level(study, boxes[2], utils.Crop("level", (8, 8, 8), (40.0, 60.0, 60.0)))
    whole, _ = utils.crop_study(study, utils.Crop("study", (16, 8, 8), (200.0, 120.0, 120.0)))
    assert crop.shape == (3, 8, 8, 8) and whole.shape == (3, 16, 8, 8)


@pytest.mark.slow
def test_members_predict_a_study(data, study, weights):
    assert utils.studies_to_predict(data, "test") == {7: tiny.SERIES}
    assert len(utils.read_descriptions(data, "test")) == 3
    chosen, sentences = utils.member_weights(utils.weight_folders([weights]))
    assert {"level_0", "study_0", "yolo_scs_0"} <= set(chosen) and sentences == []
    members = utils.load_members([weights], device="cpu")
    prepared = utils.prepare_study(data / "test_images" / "7", tiny.SERIES, members)
    (predicted,), (problems,), _ = utils.predict_studies([prepared], members)
    assert set(predicted) == set(utils.MEMBERS) and problems == []
    stacked = {member: values[None] for member, values in predicted.items()}
    for ensemble in (utils.default_ensemble(), utils.equal_ensemble(list(utils.MEMBERS))):
        p, count = utils.combine_members(stacked, ensemble, members.prior)
        table = utils.to_submission([7], p)
        assert table["row_id"].tolist() == sorted(utils.row_ids(7)) and list(table) == list(utils.SUBMISSION_COLUMNS)
        ids, again = utils.check_predictions(table)
        assert ids.tolist() == [7] and again.shape == (1, 5, 5, 3) and count.max() == 4
    assert len(utils.LABEL_COLUMNS) == 25 and set(utils.kaggle_kernels()) >= {"preprocess", "inference"}
