"""What test_distributed lets other processes do: in a module of its own, which they import in no time."""

import os
import time
from pathlib import Path


def fail_on_one(folder):
    """The second process fails; the first one would wait for ever."""
    if os.environ["RANK"] == "1":
        raise KeyError("no l1_l2 for study 103")
    wait(folder)


def wait(folder):
    """Leave a note with this process' number, then wait for longer than any test."""
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
