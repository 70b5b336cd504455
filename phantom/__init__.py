"""Synthetic lumbar MRI in exactly the layout of the RSNA 2024 Lumbar Spine competition.

    python -m phantom OUT --train 60 --test 12 --seed 1 --workers 2 --prevalence 3
    python -m phantom OUT --variety wide
    python -m phantom OUT --hard
    python -m phantom --figure docs/phantom.png

The standard variety is a mostly healthy adult; the wide one adds fractures, slips, scoliosis, implants and every look
of marrow, discs, gut and fat, for training on phantoms alone. A hard data set is wide, its patients move, and its
readers err.

A study is made in five steps that can each be used alone:

    severities  ->  Anatomy  ->  tissue grids  ->  series plans  ->  slices  ->  files
    sample_severity  sample_anatomy  paint        sample_protocol   acquire     write_series

Frames. Patient coordinates are DICOM LPS in mm: x to the patient's left, y to the back, z to the head.
"""

from .anatomy import (
    FORAMEN_RISE_MM,
    FORAMEN_V_MM,
    RECESS_U_MM,
    TRUTH_VERTEBRAE,
    VERTEBRAE,
    Anatomy,
    sac_section,
    sample_anatomy,
)
from .canal import canal_coordinates
from .contrast import contrast_table, render
from .dataset import VERSION, condition_title, level_title, make_dataset, simulate, write_series
from .grid import STANDARD_TISSUES, TISSUE, TISSUES, TissueGrid
from .hardship import HARD, Hardship
from .painting import paint
from .scanner import SeriesPlan, acquire, acquire_study, back_of, sample_protocol
from .severity import (
    READER_RELIABILITY,
    grade_frequencies,
    grade_thresholds,
    perfect_reader,
    perfect_submission,
    sample_severity,
    visible_severity,
)

__all__ = [
    "Anatomy",
    "FORAMEN_RISE_MM",
    "FORAMEN_V_MM",
    "HARD",
    "Hardship",
    "READER_RELIABILITY",
    "RECESS_U_MM",
    "STANDARD_TISSUES",
    "SeriesPlan",
    "TISSUE",
    "TISSUES",
    "TRUTH_VERTEBRAE",
    "TissueGrid",
    "VERSION",
    "VERTEBRAE",
    "acquire",
    "acquire_study",
    "back_of",
    "canal_coordinates",
    "condition_title",
    "contrast_table",
    "grade_frequencies",
    "grade_thresholds",
    "level_title",
    "make_dataset",
    "paint",
    "perfect_reader",
    "perfect_submission",
    "render",
    "sac_section",
    "sample_anatomy",
    "sample_protocol",
    "sample_severity",
    "simulate",
    "visible_severity",
    "write_series",
]
