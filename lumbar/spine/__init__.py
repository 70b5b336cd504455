"""Stage 1: vertebrae and levels."""
