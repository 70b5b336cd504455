"""Plots return their axes; tables and the exported page say what they should, and stand alone."""

import base64
import io
import re
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from small_study import make_boxes, make_points, make_study, no_network

import utils
from lumbar.data.crop import Crop
from lumbar.data.resample import crop_level
from lumbar.grade.ensemble import default_ensemble
from lumbar.look.gallery import make_gallery
from lumbar.look.plot_images import plot_case, plot_label_points, plot_level_boxes, plot_slice
from lumbar.look.report import known_losses, resampled_scores
from lumbar.look.slices import box_on_slice, direction_letter, slice_axes, slice_caption
from lumbar.names import LABEL_COLUMNS, SEVERITY_WEIGHTS


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def boxes():
    return make_boxes()


@pytest.fixture(scope="module")
def points():
    return make_points()


@pytest.fixture(scope="module")
def graded():
    """(truth (40, 5, 5) with missing labels, probabilities (40, 5, 5, 3) that come true as often as they say)."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([2, 1, 0.5], (40, 5, 5))
    truth = (rng.random((40, 5, 5, 1)) > probabilities.cumsum(-1)[..., :2]).sum(-1)
    truth[rng.random(truth.shape) < 0.05] = -1
    return truth, probabilities


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()
    plt.close(figure)


def test_slice_plots_return_their_axes(ax, study, boxes, points):
    volume = study.of("Sagittal T2/STIR")[0]
    assert plot_slice(ax, volume, 4, boxes=boxes) is ax
    assert "at the spine's middle" in ax.get_title()
    before = len(ax.lines)
    assert plot_level_boxes(ax, boxes, volume, 4) is ax
    assert len(ax.lines) == before + 5
    assert plot_label_points(ax, points, volume, 4) is ax
    assert [text.get_text() for text in ax.texts][-1] == "L3/L4 spinal canal"
    assert plot_case(ax, study, boxes[2], 1) is ax


def test_statistics_plots_return_their_axes(ax, graded):
    truth, probabilities = graded
    history = pd.DataFrame({"epoch": [1, 2], "loss": [1, 0.5], "total": [np.nan, 0.7]})
    for plot, arguments in (
        (utils.plot_confusion, (truth, probabilities)),
        (utils.plot_reliability, (truth, probabilities)),
        (utils.plot_scores, ({"a": 0.5, "b": 0.7, "absent": np.nan}, {"uniform": 1.0})),
        (utils.plot_learning_curves, ({"fold 0": history, "fold 1": history[["epoch", "loss"]]},)),
        (utils.plot_grid, (utils.cell_losses(truth, probabilities), np.ones((5, 5)), np.ones((5, 5), int))),
    ):
        ax.clear()
        assert plot(ax, *arguments) is ax


def test_the_pipelines_picture_names_every_notebook_and_highlights_the_readers(ax):
    assert utils.plot_pipeline(ax, ("level", "03")) is ax
    text = " ".join(text.get_text() for text in ax.texts)
    assert all(name in text for name in ("01", "02", "03", "04", "05", "submission.csv"))
    faces = [patch.get_facecolor() for patch in ax.patches]
    assert [faces.count(face) for face in faces] == [7, 7, 7, 2, 7, 2, 7, 7, 7]  # 03 and level
    with pytest.raises(ValueError, match="no step crops"):
        utils.plot_pipeline(ax, ("crops",))


def test_bars_of_class_counts_add_up_to_the_studies(ax, graded):
    truth, _ = graded
    assert utils.plot_class_counts(ax, truth) is ax
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(4, 5, 5)
    assert np.array_equal(heights, np.stack([(truth == k).sum(0) for k in (2, 1, 0, -1)]))
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches[-25:]]
    assert tops == [len(truth)] * 25
    assert [text.get_text() for text in ax.get_legend().get_texts()][0] == f"Severe ({(truth == 2).sum()})"


@pytest.mark.parametrize("prior", [(0.7, 0.2, 0.1), (0.2, 0.36, 0.44), (0.999, 0.001, 0.0)])
def test_curves_of_cumulative_logits_are_the_networks(ax, prior):
    import torch

    from lumbar.grade.ordinal import cumulative_log_probabilities

    assert utils.plot_cumulative_logits(ax, prior, example=1.5) is ax
    curves = [line for line in ax.lines if len(line.get_xdata()) > 100]
    cut = torch.logit(torch.tensor(np.cumsum(prior)[:2]).clamp(1e-4, 1 - 1e-4))
    scores = torch.tensor(curves[0].get_xdata())
    expected = cumulative_log_probabilities(scores, cut).exp().numpy()
    np.testing.assert_allclose(np.stack([curve.get_ydata() for curve in curves], 1), expected, atol=1e-5)
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose([y for x, y in dots if x == 0.0], prior, atol=2e-4)


def test_a_crops_axes_are_named_with_their_millimetres(study, boxes):
    crop, _ = crop_level(study, boxes[2], Crop("level", (16, 20, 24), (32.0, 40.0, 48.0)))
    figure, axes = plt.subplots(3, 3)
    utils.plot_level_crop(axes, crop, extent_mm=(32.0, 40.0, 48.0))
    assert [ax.get_ylabel() for ax in axes[1]] == ["head-foot, 32 mm", "head-foot, 32 mm", "front-back, 40 mm"]
    assert [ax.get_xlabel() for ax in axes[2]] == ["front-back, 40 mm", "left-right, 48 mm", "left-right, 48 mm"]
    assert "channel 1: Axial T2" in [text.get_text() for text in axes[1, 0].texts]
    plt.close(figure)


def test_a_gallery_of_crops_shows_one_plane_that_axial_slices_cover():
    crops = np.zeros((2, 3, 16, 20, 24), np.float32)
    crops[:, 1, 10:13] = 0.5  # the axial slices miss the middle
    crops[1, 1, 10] = 0.7
    crops[:, 2, :, :, 12] = 0.9
    figure, axes = plt.subplots(2, 2)
    assert utils.plot_crop_gallery(axes, crops, ["plain", "brighter"], (32.0, 48.0, 40.0)) is axes
    assert [float(ax.images[0].get_array().max()) for ax in axes[1]] == pytest.approx([0.5, 0.7])
    assert [ax.images[0].get_array().shape for ax in axes[:, 0]] == [(16, 20), (20, 24)]
    assert float(axes[0, 0].images[0].get_array().min()) == pytest.approx(0.9)
    assert [ax.get_title() for ax in axes[0]] == ["plain", "brighter"]
    utils.plot_crop_gallery(axes, np.zeros_like(crops), ["no axial", "slices"], (32.0, 48.0, 40.0))
    plt.close(figure)


def test_every_view_has_a_name_of_its_own():
    assert len({utils.view_name(view) for view in utils.SLICE_VIEWS}) == len(utils.SLICE_VIEWS)
    assert utils.view_name({"slice": -1, "shift_px": [0, 3]}) == "1 slice back,\n3 px right"
    names = [utils.view_name(view) for view in utils.TTA_VIEWS]
    assert len(set(names)) == len(names) and names[0] == "plain"
    assert utils.view_name({"scale": 0.94, "mirror": True}) == "mirrored,\n6% smaller"
    assert utils.view_name({"shift_mm": [-2.0, 0.0, 1.0]}) == "2 mm to the head,\n1 mm to the left"


def test_findings_point_at_the_worst_grade(study, boxes):
    probabilities = np.tile([0.8, 0.15, 0.05], (5, 5, 1))
    probabilities[0, 3] = [0.1, 0.2, 0.7]
    probabilities[4, 1] = [0.2, 0.6, 0.2]
    figure, axes = plt.subplots(1, 3)
    assert utils.plot_findings(axes, study, boxes, probabilities) is axes
    assert axes[1].get_title() == "Spinal canal, L4/L5:\nsevere 70%"
    assert [text.get_text() for text in axes[2].texts] == ["severe 70%", "moderate 60%"]
    widths = np.array([bar.get_width() for bar in axes[2].patches]).reshape(5, 5, 3)
    np.testing.assert_allclose(widths / 0.9, probabilities)
    plt.close(figure)


def test_reliability_of_honest_probabilities_is_near_the_diagonal(ax, graded):
    utils.plot_reliability(ax, *graded)
    off = [float(re.search(r"off by ([\d.]+)", text.get_text()).group(1)) for text in ax.get_legend().get_texts()]
    assert max(off) < 0.08


def test_confusion_counts_what_is_labelled(ax, graded):
    truth, probabilities = graded
    utils.plot_confusion(ax, truth, probabilities)
    counts = [int(re.search(r"\((\d+)\)", text.get_text()).group(1)) for text in ax.texts]
    assert sum(counts) == (truth >= 0).sum()
    assert sum(counts[::4]) == (probabilities.argmax(-1) == truth).sum()


def test_level_crop_shows_three_planes(study, boxes):
    crop, covered = crop_level(study, boxes[2], Crop.full_size("level", (16, 20, 24)))
    figure, axes = plt.subplots(3, 3)
    assert utils.plot_level_crop(axes, crop, covered) is axes
    assert [ax.get_title() for ax in axes[0]] == ["sagittal", "coronal", "axial"]
    assert axes[0, 0].images[0].get_array().shape == (16, 20)
    assert axes[1, 1].images[0].get_array().shape == (16, 24)
    assert axes[2, 2].images[0].get_array().shape == (20, 24)
    plt.close(figure)


def test_box_on_slice_is_the_cut_through_the_box(study, boxes):
    volume = study.of("Sagittal T1")[0]
    polygon = box_on_slice(boxes[2], volume, 4)
    corners = volume.voxel_to_lps(np.column_stack([np.full(4, 4), polygon[:, 1], polygon[:, 0]]))
    assert len(polygon) == 4
    np.testing.assert_allclose(corners.min(0), [0, -25, -15], atol=1e-6)
    np.testing.assert_allclose(corners.max(0), [0, 25, 15], atol=1e-6)
    small = replace(boxes[2], extent_mm=np.array([30.0, 4.0, 50.0]))
    assert len(box_on_slice(small, volume, 0)) == 0
    tilted = study.of("Axial T2")[1]
    polygon = box_on_slice(boxes[3], tilted, 2)
    cut = tilted.voxel_to_lps(np.column_stack([np.full(len(polygon), 2), polygon[:, 1], polygon[:, 0]]))
    assert np.abs(boxes[3].from_lps(cut) / boxes[3].extent_mm).max() < 0.5 + 1e-6


def test_sides_of_the_body(study):
    sagittal, axial = study.of("Sagittal T1")[0], study.of("Axial T2")[0]
    normal, down, right = slice_axes(sagittal)
    assert [direction_letter(v) for v in (down, right)] == ["F", "P"]
    assert [direction_letter(v) for v in slice_axes(axial)[1:]] == ["P", "L"]
    assert "left of the stack's middle" in slice_caption(sagittal, 0)
    assert "right of the stack's middle" in slice_caption(sagittal, 8)


def test_score_table_agrees_with_the_metric(graded):
    truth, probabilities = graded
    canal_only = np.where(np.arange(5)[:, None, None] == 0, probabilities, np.nan)
    table = utils.score_table(
        truth, {"all": probabilities, "canal": canal_only, "none": np.full_like(probabilities, np.nan)}
    )
    assert table.loc["all", "total"] == pytest.approx(utils.score_arrays(truth, probabilities)["total"])
    assert table.loc["canal", "spinal"] == pytest.approx(table.loc["all", "spinal"])
    assert np.isnan(table.loc["canal", "total"]) and np.isnan(table.loc["none", "spinal"])
    assert list(table["rows"]) == [(truth >= 0).sum(), (truth[:, 0] >= 0).sum(), 0]


def test_cell_losses_pool_to_the_metric(graded):
    truth, probabilities = graded
    weight, _ = known_losses(truth, probabilities)
    losses = utils.cell_losses(truth, probabilities)
    pooled = (losses[0] * weight.sum(0)[0]).sum() / weight.sum(0)[0].sum()
    assert pooled == pytest.approx(utils.score_arrays(truth, probabilities)["spinal"])


def test_worst_rows_come_in_order_one_a_study(graded):
    truth, probabilities = graded
    wrong = probabilities.copy()
    wrong[3, 2, 1] = [1e-9 if k == truth[3, 2, 1] else 0.5 for k in range(3)]
    # A moderate grading of a larger loss than a severe one's, which weighs more.
    truth = np.where(np.arange(40)[:, None, None] == 5, 1, np.where(np.arange(40)[:, None, None] == 6, 2, truth))
    wrong[5, 0, 0], wrong[6, 0, 0] = (0.9, 1e-5, 0.1), (0.9, 0.1, 1e-4)
    worst = utils.worst_rows(np.arange(40) + 100, truth, wrong, 20)
    assert worst.iloc[0][["study_id", "condition", "level"]].tolist() == [103, 2, 1]
    assert worst["study_id"].is_unique and len(worst) == 20
    cost = np.array(SEVERITY_WEIGHTS)[worst["grade"].to_numpy(int)] * worst["loss"]
    assert cost.is_monotonic_decreasing and not worst["loss"].is_monotonic_decreasing


def test_out_of_fold_prior_never_sees_its_own_fold(graded):
    truth, folds = graded[0].copy(), np.arange(40) % 2
    before = utils.out_of_fold_prior(truth, folds)
    truth[folds == 0] = 2
    after = utils.out_of_fold_prior(truth, folds)
    assert np.array_equal(before[folds == 0], after[folds == 0])
    assert not np.allclose(before[folds == 1], after[folds == 1])


def test_table_is_rounded_and_escaped():
    table = pd.DataFrame({"name": ["a<b"], "loss_mm": [0.123456], "gone": [np.nan], "count": [1234]})
    text = utils.table_html(table, "x & y")
    assert "a&lt;b" in text and ">0.123<" in text and "&ndash;" in text and "1,234" in text and "x &amp; y" in text
    assert "loss mm" in text


def test_exported_page_stands_alone_and_hides_code(tmp_path, study):
    import nbformat
    from nbformat import v4

    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# A report\nwith **words**"),
            v4.new_code_cell(
                "secret_code = 1",
                outputs=[
                    v4.new_output("display_data", {"image/png": picture, "text/plain": "figure"}),
                    v4.new_output("display_data", {"text/html": utils.study_html(study)}),
                    v4.new_output(
                        "display_data",
                        {"application/vnd.jupyter.widget-view+json": {"model_id": "w"}, "text/plain": "VBox()"},
                    ),
                    v4.new_output("stream", name="stderr", text="progress 50%"),
                    v4.new_output("stream", name="stdout", text="a sentence"),
                ],
            ),
        ]
    )
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = utils.export_html(tmp_path / "n.ipynb", tmp_path / "n.html", printed=True).read_text(encoding="utf-8")
    assert no_network(page) == []
    assert "<title>A report</title>" in page and "<strong>words</strong>" in page and "a sentence" in page
    assert "secret_code" not in page and "progress 50%" not in page and "VBox" not in page
    assert picture[:40] in page and page.count("<figure data-panel=") == 3
    assert "a sentence" not in utils.export_html(tmp_path / "n.ipynb", tmp_path / "n.html").read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="papermill"):
        utils.export_html(tmp_path / "absent.ipynb", tmp_path / "n.html")


def test_the_ensemble_is_judged_in_the_members_folds_or_in_parts_of_one(graded):
    truth, probabilities = graded
    study_ids, folds = np.arange(40) + 100, np.arange(40) % 2
    table = pd.DataFrame(np.array(utils.GRADES)[truth.reshape(40, 25)], columns=LABEL_COLUMNS)
    labels = table.where(truth.reshape(40, 25) >= 0).assign(study_id=study_ids)
    both = utils.nested_folds(labels, folds, {"level": utils.to_submission(study_ids, probabilities)})
    assert both["fold"].tolist() == folds.tolist() and both["study_id"].tolist() == study_ids.tolist()
    one_fold = {"level": utils.to_submission(study_ids[folds == 0], probabilities[folds == 0])}
    alone = utils.nested_folds(labels, folds, one_fold)
    assert sorted(alone["study_id"]) == sorted(study_ids[folds == 0])
    assert alone["fold"].value_counts().tolist() == [4] * 5
    assert set(utils.cross_validate_ensemble(labels, one_fold, alone)[0].index) >= {"level", "+ stacker"}


def test_the_share_closed_is_0_for_the_prior_and_1_for_the_perfect_reader(graded):
    truth, probabilities = graded
    prior = np.broadcast_to(utils.class_prior(truth), probabilities.shape)
    perfect = 0.9 * np.eye(3)[np.clip(truth, 0, 2)] + 0.1 / 3
    table = utils.score_table(truth, {"Class prior": prior, "m": 0.5 * (prior + perfect), "Perfect reader": perfect})
    assert table["closed"].iloc[[0, 2]].tolist() == [0, 1] and 0 < table.loc["m", "closed"] < 1
    assert "closed" not in utils.score_table(truth, {"Class prior": prior})


def test_the_ensembles_table_has_a_row_for_each_group():
    ensemble = default_ensemble(["yolo", "level"])
    table = utils.ensemble_table(ensemble | {"floor": {"spinal": 0.02}})
    assert table.index.tolist() == ["Spinal canal", "Foraminal", "Subarticular"]
    assert table["Floor"].tolist() == [0.02, 0, 0] and not table["Stacker"].any()
    assert table.loc["Foraminal", "yolo"] == ensemble["weights"]["foraminal"]["yolo"]


def test_histories_are_found_and_split(tmp_path):
    for name, text in (
        ("02_a/history.csv", "step,loss,split\n1,2,train\n1,3,validation\n"),
        ("03_b/runs/fold_0/results.csv", "epoch, train/cls_loss\n1,2\n"),
        ("03_b.old-1/x_history.csv", "epoch,loss\n1,2\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    found = utils.read_histories(tmp_path)
    assert {stage: list(runs) for stage, runs in found.items()} == {
        "02_a": ["history train", "history validation"],
        "03_b": ["fold_0"],
    }
    assert list(found["03_b"]["fold_0"].columns) == ["epoch", "train/cls_loss"]


def test_intervals_of_resampled_scores_hold_the_truth_as_often_as_they_say(graded):
    """Of small samples of a large population, 95% of the intervals hold the score of the whole."""
    truth, p = graded
    rng = np.random.default_rng(3)
    truth, p = np.concatenate([truth] * 5), np.concatenate([p] * 5)
    truth = np.where(rng.random(truth.shape) < 0.1, -1, truth)
    whole = utils.score_arrays(truth, p)["total"]
    inside = []
    for draw in range(120):
        rows = rng.choice(len(truth), 80)
        drawn = resampled_scores(truth[rows], {"m": p[rows]}, 200, draw)["m"][:, -1]
        inside.append(np.percentile(drawn, 2.5) <= whole <= np.percentile(drawn, 97.5))
    assert 0.86 < np.mean(inside) <= 1.0


def test_resampled_scores_are_the_metric_of_the_drawn_studies(graded):
    truth, p = graded
    p = p.copy()
    p[:3] = np.nan  # no prediction: left out of every draw
    drawn = resampled_scores(truth, {"m": p, "half": 0.5 * p}, 5, seed=1)
    times = np.random.default_rng(1).multinomial(len(truth), np.full(len(truth), 1 / len(truth)), 5)
    for draw in range(5):
        rows = np.repeat(np.arange(len(truth)), times[draw])
        rows = rows[rows >= 3]
        scores = utils.score_arrays(truth[rows], p[rows])
        assert drawn["m"][draw] == pytest.approx([scores[term] for term in utils.TERM_NAMES])
    assert drawn["half"] == pytest.approx(drawn["m"])  # rows are brought to a sum of 1
    table = utils.score_table(truth, {"m": p}, draws=200)
    assert table.loc["m", "low"] < table.loc["m", "total"] < table.loc["m", "high"]
    empty = utils.score_table(truth, {"m": p, "none": np.full(p.shape, np.nan)}, draws=20)
    assert np.isnan(empty.loc["none", ["total", "low", "high"]].astype(float)).all()


def test_a_difference_has_an_interval_of_its_own(graded):
    truth, p = graded
    better = p + 0.05 * np.eye(3)[np.clip(truth, 0, 2)]
    better /= better.sum(-1, keepdims=True)
    table = utils.term_table(truth, {"before": p, "after": better}, "after", "before", 300)
    assert list(table.index) == list(utils.TERM_NAMES.values())
    low, high = (float(x) for x in table.loc["Score", "its 95% interval"].split(" to "))
    assert 0 < low < table.loc["Score", "Lower by"] < high
    own = [float(x) for x in table.loc["Score", "95% interval"].split(" to ")]
    assert high - low < 0.7 * (own[1] - own[0])  # the same studies are easy for both


def test_problems_are_counted_by_kind():
    table = utils.problem_table(
        [
            "study 1, series 2: 1-19.dcm: truncated",
            "study 1, series 3: 1-7.dcm: truncated",
            "study 5: no Axial T2 series",
            "study 6, series 1: 13 slices are of one grey",
            "study 7, series 1: 4 slices are of one grey",
            "study 8, series 1: 4 slices are of one grey",
        ]
    )
    assert table["times"].tolist() == [3, 2, 1] and table["example"][0].startswith("study 6")
    assert table["what"][1] == "a file: truncated" and len(utils.problem_table([])) == 0


@pytest.mark.slow
def test_the_figure_in_space_has_the_studys_points_and_boxes(study, boxes):
    pytest.importorskip("open3d", exc_type=ImportError)
    pytest.importorskip("plotly")
    figure = utils.study_figure(study, boxes, points=500)
    *outlines, cloud = figure.data
    assert len(cloud.x) == 500 and len(cloud.marker.color) == 500
    points = np.stack([cloud.x, cloud.y, cloud.z], 1)
    voxels = np.concatenate([v.lps_to_voxel(points)[:, None] for v in study.volumes], 1)
    whole = np.abs(voxels - voxels.round()).max(2).min(1)
    assert whole.max() < 1e-6  # each point is a pixel's centre in one of the series
    near = [(np.abs(box.from_lps(points)) <= np.asarray(box.extent_mm) + 1e-6).all(1) for box in boxes]
    assert np.any(near, 0).all()
    for box, outline in zip(boxes, outlines, strict=True):
        ends = np.stack([outline.x, outline.y, outline.z], 1).astype(float).reshape(12, 3, 3)
        assert np.isnan(ends[:, 2]).all()
        assert np.sort(np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1)) == pytest.approx(
            np.sort(np.repeat(box.extent_mm, 4))
        )
        np.testing.assert_allclose(ends[:, :2].reshape(-1, 3).mean(0), box.center_lps_mm, atol=1e-6)
    assert len(utils.study_figure(study).data) == 1


# ---- The gallery ----


def executed(tmp_path, outputs, name="04_train", source="x = 1", run="elsewhere/runs/demo"):
    """A run's folder with one executed notebook, as papermill leaves it."""
    import nbformat
    from nbformat import v4

    injected = v4.new_code_cell(f'# Parameters\nOUT = "/data/{run}"\nDATA = "/data/{run}/data"\n', execution_count=1)
    injected.metadata = {"tags": ["injected-parameters"], "papermill": {"start_time": "2026-01-01"}}
    cells = [v4.new_markdown_cell("# A title"), injected, v4.new_code_cell(source, outputs=outputs, execution_count=2)]
    metadata = {"papermill": {"input_path": "/data/x"}, "widgets": {}, "kernelspec": {"name": "python3"}}
    metadata["kernelspec"] |= {"display_name": "Python 3", "language": "python"}
    (tmp_path / "runs/demo/notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), tmp_path / f"runs/demo/notebooks/{name}.ipynb")
    return tmp_path / "runs/demo"


def png(image):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_gallery_keeps_pictures_and_words_and_no_trace_of_the_machine(tmp_path):
    import nbformat
    from nbformat import v4

    noise = np.random.default_rng(0).integers(0, 255, (30, 1100, 4), np.uint8)
    shown = {"image/png": png(noise), "text/plain": "<Figure>"}
    flat = {"image/png": png(np.full((20, 30, 3), 200, np.uint8)), "text/plain": "<Figure>"}
    outputs = [
        v4.new_output("stream", name="stderr", text="epochs: 50% 1/2 [00:01<00:01] /root/x"),
        v4.new_output("stream", name="stdout", text="\x1b[34mtrain:\x1b[0m  5% ━ 3/60 2.5it/s\nsettings at "),
        v4.new_output("stream", name="stdout", text="/data/elsewhere/runs/demo/04/a.csv, /home/me/kit/b.py\n"),
        v4.new_output("stream", name="stdout", text="working 1\rworking 2\n/kaggle/input/x https://a.org/b/c 1/2/3"),
        v4.new_output("display_data", shown),
        v4.new_output("display_data", flat),
        v4.new_output("display_data", {"text/html": "<div><script>1</script></div>", "text/plain": "<HTML>"}),
        v4.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children=())"}
        ),
        v4.new_output("execute_result", {"text/html": "<b>/data/elsewhere/notes</b>", "text/plain": "'ok'"}),
    ]
    run = executed(tmp_path, outputs)
    (path,) = make_gallery(run, tmp_path / "gallery", limit_bytes=20_000)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 20_000 and path.name == "04_train.ipynb"
    for trace in (
        "/data/elsewhere",
        "/root",
        "/home",
        "papermill",
        "start_time",
        "it/s",
        "\\u001b",
        "<script",
        "VBox",
        "working 1",
    ):
        assert trace not in text, trace
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[1].source == '# Parameters\nOUT = "runs/demo"\nDATA = "runs/demo/data"\n'
    assert notebook.cells[2].source == "x = 1" and notebook.cells[2].execution_count == 2
    printed, picture, plain, viewer, table = notebook.cells[2].outputs
    assert printed.text.splitlines()[0] == "settings at runs/demo/04/a.csv, b.py"
    assert printed.text.splitlines()[1:] == ["working 2", "/kaggle/input/x https://a.org/b/c 1/2/3"]
    assert "report.html" in viewer.data["text/markdown"] and table.data["text/html"] == "<b>./notes</b>"
    assert "image/jpeg" in picture.data and "image/png" in plain.data
    from PIL import Image

    assert Image.open(io.BytesIO(base64.b64decode(picture.data["image/jpeg"]))).width <= 1000
    assert (
        Image.open(io.BytesIO(base64.b64decode(plain.data["image/png"]))).convert("RGB").getpixel((0, 0)) == (200,) * 3
    )


def test_the_gallery_takes_finished_runs_only(tmp_path):
    from nbformat import v4

    with pytest.raises(FileNotFoundError, match="00_pipeline"):
        make_gallery(tmp_path / "runs/demo", tmp_path / "gallery")
    run = executed(tmp_path, [])
    executed(tmp_path, [v4.new_output("error", ename="ValueError", evalue="x", traceback=[])], "05_inference")
    with pytest.raises(ValueError, match="05_inference.ipynb did not run to its end"):
        make_gallery(run, tmp_path / "gallery")
    noise = np.random.default_rng(0).integers(0, 255, (30, 1100, 4), np.uint8)
    executed(tmp_path, [v4.new_output("display_data", {"image/png": png(noise)})] * 3, "05_inference")
    with pytest.raises(ValueError, match="05_inference.ipynb has .* more than 5,000"):
        make_gallery(run, tmp_path / "gallery", limit_bytes=5_000)
    assert not (tmp_path / "gallery").exists()


def test_a_notebook_in_the_gallery_prints_its_beginning_and_its_end(tmp_path):
    from nbformat import v4

    lines = "\n".join(f"line {number}" for number in range(500))
    run = executed(tmp_path, [v4.new_output("stream", name="stdout", text=lines)])
    text = make_gallery(run, tmp_path / "gallery")[0].read_text(encoding="utf-8")
    assert "line 0" in text and "line 499" in text and "line 250" not in text and "460 lines" in text
