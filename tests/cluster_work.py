"""Work for the workers of a cluster: they import it by name."""

import os
import signal
from pathlib import Path


def square(shared, item):
    """The item squared; the file of its number is made first, so that a test knows who was here."""
    (Path(shared) / f"{item}-{os.getpid()}").touch()
    return item * item


def square_or_die_once(shared, item):
    """As square; item 3 kills its worker the first time."""
    mark = Path(shared) / "died"
    if item == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(shared, item)


def die_at_three(shared, item):
    """As square; item 3 kills its worker."""
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(shared, item)


def fail_at_three(shared, item):
    """As square; item 3 cannot be done."""
    if item == 3:
        raise KeyError("three")
    return square(shared, item)
