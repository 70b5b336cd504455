"""The kit's public API for notebooks and scripts, by chapter. Everything is reached as `utils.name`.

Frames: patient coordinates are DICOM LPS in millimetres (x to the patient's left, y to the back, z to the head);
names end in _lps or _mm. Arrays have the axes (slice, row, column); pixel coordinates in tables are x = column and
y = row of a pixel's centre, names end in _px. Crops have the axes (channel, head to foot, front to back, right to
left). Probabilities have the axes (study, condition, level, severity).
"""

# Names, files and weights
from lumbar.names import (
    CONDITIONS,
    DESCRIPTIONS,
    DETECTORS,
    GRADES,
    GROUPS,
    LABEL_COLUMNS,
    LEVELS,
    SEVERITIES,
    SUBMISSION_COLUMNS,
    device_for,
)
from lumbar.storage import DamagedFile, read_json, write_csv, write_json, write_text

# isort: split

# Data: studies, tables, geometry, the metric
from lumbar.data.competition import class_prior, from_submission, labels_to_array, make_folds, row_ids, to_submission
from lumbar.data.crop import Crop
from lumbar.data.dicom import read_slice, read_slices, read_study
from lumbar.data.geometry import LevelBox, boxes_from_table, boxes_to_table, nearest_slice
from lumbar.data.greys import normalise_study, normalise_volume
from lumbar.data.metric import competition_score, score_arrays
from lumbar.data.pixels import DicomProblem
from lumbar.data.preprocess import preprocess_studies
from lumbar.data.resample import crop_level, crop_study
from lumbar.data.tables import read_coordinates, read_descriptions, read_folds, read_labels
from lumbar.data.volume import Study, Volume, load_study, save_study, study_paths

# isort: split

# Stage 1: vertebrae and levels
from lumbar.spine.finetune import fine_tuning_set, point_scores, tuning_helped
from lumbar.spine.level_scores import level_errors, locating_scores, read_vertebra_truth
from lumbar.spine.levels import locate_levels, locate_levels_surely
from lumbar.spine.locating import locate_studies, locate_with_own_layout
from lumbar.spine.official import load_official_spinenet
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import SpineNet, load_spinenet, save_spinenet
from lumbar.spine.spinenet_training import train_spinenet
from lumbar.spine.synthesis import RandomisedSlices, paint_anatomies, prior_of_anatomies, training_slices
from lumbar.spine.vertebra import Vertebra, vertebrae_from_table, vertebrae_to_table

# isort: split

# Stage 2: members and their ensemble
from lumbar.grade.calibration import yolo_loss_against_prior
from lumbar.grade.classifier import (
    SMALL_BACKBONES,
    backbone_config,
    level_centers,
    load_classifier,
    make_backbone,
    settle_views,
)
from lumbar.grade.cleaning import cleaned_grades
from lumbar.grade.crops import CropDataset, augment_crops, expand_view, margin_shape, view_crops
from lumbar.grade.detector import dense_scores, load_yolo, score_studies, settle_detectors, yolo_table
from lumbar.grade.detector_data import DETECTOR_VIEWS, fit_point_offsets, write_yolo_dataset
from lumbar.grade.detector_training import check_initial_weights, train_yolo, yolo_schedule
from lumbar.grade.detector_weights import find_yolo_description
from lumbar.grade.distributed import bytes_of, loader_memory, processes_for
from lumbar.grade.ensemble import (
    combine_members,
    combine_tables,
    cross_validate_ensemble,
    default_ensemble,
    ensemble_for,
    equal_ensemble,
    fit_ensemble,
)
from lumbar.grade.full_size import FULL_SIZE
from lumbar.grade.pretrained import fetch, load_volumes, pretrained_file, tagged_backbone
from lumbar.grade.registry import MEMBERS, member_weights
from lumbar.grade.slice_crops import SLICE_VIEWS, SliceCrop, SliceDataset, augment_slices, view_slices
from lumbar.grade.slice_network import Encoder, load_slices
from lumbar.grade.slice_training import SliceConfig, SliceRecipe
from lumbar.grade.tables import align_members, check_predictions, read_out_of_fold
from lumbar.grade.trainer import Recipe, TrainConfig, train_classifier
from lumbar.grade.tta import TTA_VIEWS

# isort: split

# Inference
from lumbar.serve.folder import find_studies, lay_out, series_table
from lumbar.serve.inference import infer_studies
from lumbar.serve.members import load_members, out_of_fold_table, weight_folders
from lumbar.serve.predict_folder import folder_log, grade_folder, locate_folder, members_of, placement_of, read_problems
from lumbar.serve.results import mended_studies
from lumbar.serve.study import predict_studies, prepare_study, studies_to_predict
from lumbar.serve.tables import refuse_prior_only

# isort: split

# Notebooks, stages, the pipeline, Kaggle
from lumbar.run.costs import cost_line
from lumbar.run.mounts import find_input
from lumbar.run.notebook import start_notebook
from lumbar.run.pipeline import (
    check_folds,
    choose_stages,
    kaggle_kernels,
    member_folder,
    pipeline_stages,
    pretrained_names,
    run_stages,
    write_run_manifest,
)
from lumbar.run.preflight import preflight, preflight_stages
from lumbar.run.publish import kaggle_publish, stage_kaggle, staged_costs
from lumbar.run.stages import open_stage, time_limit

# isort: split

# Figures, report, viewer
from lumbar.look.findings import (
    calibration_text,
    confusion_text,
    curves_text,
    example_text,
    grid_finding,
    numbering_text,
    report_findings,
    scores_text,
    summary_html,
    time_finding,
)
from lumbar.look.folder_pages import open_folder, write_pages
from lumbar.look.inspection import read_inspection
from lumbar.look.looks import plot_looks
from lumbar.look.page import export_html, paragraph_html, short, show_figure, table_html
from lumbar.look.plot_crops import plot_crop_gallery, plot_level_crop, view_name
from lumbar.look.plot_curves import plot_learning_curves, plot_spinenet_history, plot_yolo_training
from lumbar.look.plot_diagrams import plot_cumulative_logits, plot_pipeline
from lumbar.look.plot_images import (
    plot_detections,
    plot_example,
    plot_findings,
    plot_label_points,
    plot_slice,
    plot_spinenet_target,
    plot_vertebrae,
)
from lumbar.look.plot_scores import (
    plot_class_counts,
    plot_confusion,
    plot_grid,
    plot_level_errors,
    plot_reliability,
    plot_scores,
)
from lumbar.look.point_cloud import study_figure
from lumbar.look.report import (
    TERM_NAMES,
    cell_losses,
    ensemble_table,
    level_label_table,
    nested_folds,
    out_of_fold_prior,
    problem_table,
    read_histories,
    read_manifests,
    read_views,
    score_table,
    summarise_levels,
    term_table,
    worst_rows,
)
from lumbar.look.slices import CONDITION_NAMES, LEVEL_NAMES, MEMBER_COLOURS
from lumbar.look.viewer_page import study_html
from lumbar.look.viewer_widget import inspect_study

__all__ = [
    "CONDITIONS",
    "CONDITION_NAMES",
    "Crop",
    "CropDataset",
    "DESCRIPTIONS",
    "DETECTORS",
    "DETECTOR_VIEWS",
    "DamagedFile",
    "DicomProblem",
    "Encoder",
    "FULL_SIZE",
    "GRADES",
    "GROUPS",
    "LABEL_COLUMNS",
    "LEVELS",
    "LEVEL_NAMES",
    "LevelBox",
    "MEMBERS",
    "MEMBER_COLOURS",
    "Placement",
    "RandomisedSlices",
    "Recipe",
    "SEVERITIES",
    "SLICE_VIEWS",
    "SMALL_BACKBONES",
    "SUBMISSION_COLUMNS",
    "SliceConfig",
    "SliceCrop",
    "SliceDataset",
    "SliceRecipe",
    "SpineNet",
    "Study",
    "TERM_NAMES",
    "TTA_VIEWS",
    "TrainConfig",
    "Vertebra",
    "Volume",
    "align_members",
    "augment_crops",
    "augment_slices",
    "backbone_config",
    "boxes_from_table",
    "boxes_to_table",
    "bytes_of",
    "calibration_text",
    "cell_losses",
    "check_folds",
    "check_initial_weights",
    "check_predictions",
    "choose_stages",
    "class_prior",
    "cleaned_grades",
    "combine_members",
    "combine_tables",
    "competition_score",
    "confusion_text",
    "cost_line",
    "crop_level",
    "crop_study",
    "cross_validate_ensemble",
    "curves_text",
    "default_ensemble",
    "dense_scores",
    "device_for",
    "ensemble_for",
    "ensemble_table",
    "equal_ensemble",
    "example_text",
    "expand_view",
    "export_html",
    "fetch",
    "find_input",
    "find_studies",
    "find_yolo_description",
    "fine_tuning_set",
    "fit_ensemble",
    "fit_point_offsets",
    "folder_log",
    "from_submission",
    "grade_folder",
    "grid_finding",
    "infer_studies",
    "inspect_study",
    "kaggle_kernels",
    "kaggle_publish",
    "labels_to_array",
    "lay_out",
    "level_centers",
    "level_errors",
    "level_label_table",
    "load_classifier",
    "load_members",
    "load_official_spinenet",
    "load_slices",
    "load_spinenet",
    "load_study",
    "load_volumes",
    "load_yolo",
    "loader_memory",
    "locate_folder",
    "locate_levels",
    "locate_levels_surely",
    "locate_studies",
    "locate_with_own_layout",
    "locating_scores",
    "make_backbone",
    "make_folds",
    "margin_shape",
    "member_folder",
    "member_weights",
    "members_of",
    "mended_studies",
    "nearest_slice",
    "nested_folds",
    "normalise_study",
    "normalise_volume",
    "numbering_text",
    "open_folder",
    "open_stage",
    "out_of_fold_prior",
    "out_of_fold_table",
    "paint_anatomies",
    "paragraph_html",
    "pipeline_stages",
    "placement_of",
    "plot_class_counts",
    "plot_confusion",
    "plot_crop_gallery",
    "plot_cumulative_logits",
    "plot_detections",
    "plot_example",
    "plot_findings",
    "plot_grid",
    "plot_label_points",
    "plot_learning_curves",
    "plot_level_crop",
    "plot_level_errors",
    "plot_looks",
    "plot_pipeline",
    "plot_reliability",
    "plot_scores",
    "plot_slice",
    "plot_spinenet_history",
    "plot_spinenet_target",
    "plot_vertebrae",
    "plot_yolo_training",
    "point_scores",
    "predict_studies",
    "preflight",
    "preflight_stages",
    "prepare_study",
    "preprocess_studies",
    "pretrained_file",
    "pretrained_names",
    "prior_of_anatomies",
    "problem_table",
    "processes_for",
    "read_coordinates",
    "read_descriptions",
    "read_folds",
    "read_histories",
    "read_inspection",
    "read_json",
    "read_labels",
    "read_manifests",
    "read_out_of_fold",
    "read_problems",
    "read_slice",
    "read_slices",
    "read_study",
    "read_vertebra_truth",
    "read_views",
    "refuse_prior_only",
    "report_findings",
    "row_ids",
    "run_stages",
    "save_spinenet",
    "save_study",
    "score_arrays",
    "score_studies",
    "score_table",
    "scores_text",
    "series_table",
    "settle_detectors",
    "settle_views",
    "short",
    "show_figure",
    "stage_kaggle",
    "staged_costs",
    "start_notebook",
    "studies_to_predict",
    "study_figure",
    "study_html",
    "study_paths",
    "summarise_levels",
    "summary_html",
    "table_html",
    "tagged_backbone",
    "term_table",
    "time_finding",
    "time_limit",
    "to_submission",
    "train_classifier",
    "train_spinenet",
    "train_yolo",
    "training_slices",
    "tuning_helped",
    "vertebrae_from_table",
    "vertebrae_to_table",
    "view_crops",
    "view_name",
    "view_slices",
    "weight_folders",
    "worst_rows",
    "write_csv",
    "write_json",
    "write_pages",
    "write_run_manifest",
    "write_text",
    "write_yolo_dataset",
    "yolo_loss_against_prior",
    "yolo_schedule",
    "yolo_table",
]
