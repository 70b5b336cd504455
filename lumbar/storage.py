"""Files that are written whole or not at all, one writer for each format; and the readers that say what a file is.

May use: nothing of the kit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Of a safetensors file, with the metadata in it. A damaged file can state any size, and JSON takes ten times its own.
_HEADER_BYTES = 64 * 1024**2
_JSON_BYTES = 100 * 1024**2


class DamagedFile(ValueError):
    """A file does not hold what its name says. The message names it, says what it is and what to do."""


# -- writing


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; when that is done, it takes the place of `path`.

    Whatever happens, the file is either the old one or complete: its contents are on the disk before it gets its name.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


_PART = re.compile(r"(?:\.(?P<pid>\d+))?\.part(?:\.\w+)?$")


def _is_alive(pid):
    """Whether another process of this machine has this number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


@functools.lru_cache(maxsize=100_000)
def _digest_of(path, size, changed_ns, inode):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's contents, as hexadecimal digits. Computed once in a process, unless the file changes."""
    status = os.stat(path)
    # ctime and not mtime: nobody can set it back.
    return _digest_of(str(path), status.st_size, status.st_ctime_ns, status.st_ino)


def is_part(path: str | Path) -> bool:
    """Whether a name marks an incomplete file or folder: one still being written, or left by a dead process.

    >>> is_part("oof.csv.123.part"), is_part("scores_0.part.npy"), is_part("oof.csv")
    (True, True, False)
    """
    return _PART.search(Path(path).name) is not None


def is_dead_part(path: str | Path) -> bool:
    """Whether it is a part (see is_part) whose process has ended.

    A name without a process's number counts as such, too: ask only in a folder that nobody else writes to.
    """
    part = _PART.search(Path(path).name)
    return part is not None and not (part["pid"] and _is_alive(int(part["pid"])))


def remove_parts(folder: str | Path) -> None:
    """Remove what processes that have ended left half written in a folder and below: see `is_dead_part`."""
    for place, below, files in os.walk(folder):
        for name in [*files, *below]:
            path = Path(place, name)
            if not is_dead_part(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
                below.remove(name)
            else:
                with suppress(OSError):
                    path.unlink()


def _sync_folder(folder):
    """Put a folder's names on the disk, where the system can: not on Windows, nor on some network drives."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON; the file is either the old one or complete.

    Parameters
    ----------
    path : str or Path
    data : object
        What json takes, and NumPy's numbers and arrays; anything else becomes its str.
    """
    write_text(path, json.dumps(data, indent=2, default=plain) + "\n")


def plain(value: Any) -> Any:
    """Turn a value that json does not know into one that it does: the `default` of json.dumps.

    >>> plain(np.float32(0.5)), plain(np.arange(2)), plain(Path("a"))
    (0.5, [0, 1], 'a')
    """
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV without its index; the file is either the old one or complete.

    Parameters
    ----------
    path : str or Path
    table : DataFrame
    """
    with write_whole(path) as temporary:
        # Names of files need not be UTF-8: their other bytes are lone surrogates in Python.
        table.to_csv(temporary, index=False, errors="backslashreplace")


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file; the file is either the old one or complete.

    Parameters
    ----------
    path : str or Path
    text : str

    Returns
    -------
    Path
        The file's path.
    """
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # as write_csv
    return Path(path)


def write_tensors(path: str | Path, tensors: Mapping[str, Any], key: str, about: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, and `about` as JSON in its metadata under `key`, complete or not at all.

    tensors: dict name -> NumPy array, or dict name -> torch tensor on any device.
    """
    metadata = {key: json.dumps(about, default=plain)}
    with write_whole(path) as temporary:
        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
            save_arrays(arrays, str(temporary), metadata)
        else:
            from safetensors.torch import save_file

            state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(state, str(temporary), metadata)


# -- reading


def read_json(path: str | Path, remedy: str = "delete it and run again what wrote it") -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : str or Path
    remedy : str
        What to do about a file that cannot be used; it ends the message of the error. May be empty.

    Returns
    -------
    dict

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        It holds something else than a JSON object. The message names the file and says what it holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" + (f": {remedy}" if remedy else ""))
    if path.stat().st_size > _JSON_BYTES:
        raise _damaged(path, f"has more than {_JSON_BYTES >> 20} MB", remedy)
    try:
        known = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise _damaged(path, _what_it_is(path) or "is no JSON", remedy) from None
    if not isinstance(known, dict):
        raise _damaged(path, f"holds a JSON {type(known).__name__} and no object", remedy)
    return known


@contextmanager
def open_tensors(
    path: str | Path, key: str, remedy: str, framework: str = "pt", whose: str = "the kit's"
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open a file of write_tensors: gives (about, file), file as safetensors.safe_open makes it.

    remedy: what to do about a file that cannot be used, such as "run 01_preprocess again"; it ends the message.
    framework: "pt" or "numpy", of the tensors; whose: the metadata, for the message. Raises FileNotFoundError when
    there is no file, DamagedFile when it holds something else, or less than it should.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    what = _what_it_is(path) or _what_is_missing(path)
    if what:
        raise _damaged(path, what, remedy)
    try:
        opened = safe_open(str(path), framework=framework)
    except SafetensorError as error:
        raise _damaged(path, f"is no safetensors file ({error})", remedy) from None
    with opened as file:
        try:
            about = json.loads((file.metadata() or {})[key])
        except KeyError:
            raise _damaged(path, f"is a safetensors file without {whose} metadata", remedy) from None
        except (ValueError, RecursionError):
            about = None
        if not isinstance(about, dict):
            raise _damaged(path, f"is a safetensors file with {whose} metadata spoilt (no JSON object)", remedy)
        yield about, file


def read_tensors(
    path: str | Path, key: str, remedy: str, framework: str = "pt", whose: str = "the kit's"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(dict name -> tensor, about) of a file of write_tensors; arguments and errors are those of open_tensors."""
    with open_tensors(path, key, remedy, framework, whose) as (about, file):
        return {name: file.get_tensor(name) for name in file.keys()}, about


def read_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """The state of an unfinished training as torch.save wrote it, on the CPU; nothing pickled in it is run.

    None where there is no such file, or none that can be read, which is printed: the training then starts over.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of it
        print(f"{path} {_what_it_is(path) or 'cannot be read'} ({type(error).__name__}): the training starts over")
        return None


def _damaged(path: Path, what: str, remedy: str) -> DamagedFile:
    if "Git LFS" in what:
        remedy = f"run `git lfs pull` where it was cloned, or download the file itself; or {remedy}"
    return DamagedFile(f"{path} {what}" + (f": {remedy}" if remedy else ""))


def kind_of_file(start: bytes) -> str:
    """What a file that begins so is, as a noun with its article, where that is often found in the place of another
    kind of file; otherwise "".

    >>> kind_of_file(b"<!DOCTYPE html><html>")[:10]
    'a web page'
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kinds = {
        b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for",
        b"<!doctype": _PAGE,
        b"<html": _PAGE,
        b"<?xml": _PAGE,
        b"<head": _PAGE,
        b"<!--": _PAGE,
        b"%pdf": "a PDF",
        b"pk\3\4": "a zip archive, as Excel's files and PyTorch's checkpoints are",
    }
    for sign, kind in kinds.items():
        if text.startswith(sign):
            return kind
    for sign, kind in {b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture"}.items():
        if start.startswith(sign):
            return kind
    # The first two bytes of a safetensors file are a length, which may look like these.
    if start.startswith((b"\x1f\x8b", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[8:9] != b"{":
        return "a compressed file or a pickle"
    return ""


_PAGE = "a web page: a download was answered with a page (a login, an error) in place of the file"


def _what_it_is(path: Path) -> str:
    """What is wrong with a file by its first bytes, as the rest of a sentence; otherwise ""."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "is empty"
    if not any(start):
        return "holds zeros where its beginning should be"
    kind = kind_of_file(start)
    return f"is {kind}" if kind else ""


def _what_is_missing(path: Path) -> str:
    """What is wrong with the sizes that a safetensors file states, in words; otherwise ""."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
        if not first:
            return f"is cut off: it has {size} bytes"
        if first != b"{":
            return ""
        if length > _HEADER_BYTES:
            return f"states a header of {length:,} bytes, which is no header of the kit"
        if 8 + length > size:
            return f"is cut off: its header alone should end at {8 + length:,} bytes, there are {size:,}"
        try:
            header = json.loads(first + file.read(length - 1))
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
            stated = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
            return ""
    if size < stated:
        return f"is cut off: it should have {stated:,} bytes, there are {size:,}"
    return f"is damaged: it should have {stated:,} bytes, there are {size:,}" if size > stated else ""
