"""Paths as they are pasted: from a file manager, a browser or a shell, with what those add to them.

May use: parameters.
"""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from .parameters import PATH_PARAMETERS

_QUOTES = ("''", '""', "``", "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}",
           "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}")  # fmt: skip
# Beside white space: byte order mark and the marks for the direction of writing that Windows' dialogs copy along.
_INVISIBLE = "\ufeff\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def pasted_path(text: str) -> str:
    """A path without what pasting added to it.

    White space and invisible marks around it, quotes, `file://` (with its %20), a shell's backslashes before spaces
    and slashes at the end go; `~` becomes the home folder. What exists as it is written keeps its name, and so does
    what is no path: "", an input's slug, the word `installed`.
    """
    if not os.path.exists(text):
        before = None
        while text != before:
            before = text
            text = text.strip().strip(_INVISIBLE)
            if len(text) > 1 and text[0] + text[-1] in _QUOTES:
                text = text[1:-1]
        if text.lower().startswith("file:"):
            text = url2pathname(urlsplit(text).path) if os.name == "nt" else unquote(urlsplit(text).path)
        text = os.path.expanduser(text)
        if not os.path.exists(text) and os.path.exists(plain := re.sub(r"\\(.)", r"\1", text)):
            text = plain
    return text.rstrip("/") or text[:1]


def pasted_paths(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are paths, or lists of paths, each as pasted_path has it: dict name -> value."""
    return {
        name: [pasted_path(item) for item in value] if isinstance(value, list) else pasted_path(value)
        for name, value in parameters.items()
        if name in PATH_PARAMETERS
        and (isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)))
    }
