"""Figures, the report, the viewer."""
