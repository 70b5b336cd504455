"""Stage 2: networks that grade, and their ensemble."""
