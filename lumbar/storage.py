"""Files that are written whole or not at all: one writer for each format.

May use: nothing of the kit.
"""

import json
import os
from pathlib import Path

import numpy as np


def write_json(path, data):
    """Write `data` as JSON so that the file is either the old one or complete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(data, indent=2, default=plain) + "\n")
    os.replace(temporary, path)


def plain(value):
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def write_csv(path, table):
    """Write a DataFrame as CSV so that the file is either the old one or complete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    table.to_csv(temporary, index=False)
    os.replace(temporary, path)


def write_text(path, text):
    """Write a text file so that the file is either the old one or complete. Returns the path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
