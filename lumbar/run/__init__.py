"""Stages, parameters, pipelines, Kaggle."""
