"""Inference: a study in, 25 rows out."""
