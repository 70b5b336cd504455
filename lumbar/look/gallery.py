"""A finished run's notebooks, made small enough to keep and to read on GitHub.

    python -m lumbar.look.gallery runs/demo docs/gallery

Takes the executed notebooks from the run's folder as they are and runs nothing of what is in them: progress bars,
widgets, traces of papermill and the machine's own paths go, pictures shrink.

May use: storage.
"""

import ast
import base64
import io
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage import write_text

LIMIT_BYTES = 900_000  # of a notebook; GitHub renders no large ones, and a clone has to carry them
# Widest picture in px and JPEG quality, tried in this order until a notebook is small enough.
_SIZES = ((1000, 80), (900, 70), (800, 60), (640, 50))
_PRINTED_LINES = 40  # of one output; what is longer loses its middle
_BAR = re.compile(r"\d%.*(it/s|s/it)")  # progress that is printed and not written to stderr
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PATH = re.compile(r"(?<![\w.:/<+-])/(?!kaggle/)(?:[\w.+-]+/)+[\w.+-]*")
_INTERACTIVE = "*The viewer that stands here needs scripts, which GitHub does not run: open the run's report.html.*"


def make_gallery(run: str | Path, folder: str | Path, limit_bytes: int = LIMIT_BYTES) -> list[Path]:
    """Write a run's executed notebooks, cleaned and shrunk, to a folder.

    Parameters
    ----------
    run : folder of a finished run, with notebooks/; `<run>.ipynb` beside it, where papermill left 00_pipeline's own,
        is taken too.
    folder : where they go, made if need be; others in it stay.
    limit_bytes : that no notebook may exceed.

    Returns
    -------
    The files written, in order.

    Raises
    ------
    FileNotFoundError where the run has no notebooks, ValueError for one that did not run to its end or that stays too
    large. Nothing is written then.
    """
    run, folder = Path(run), Path(folder)
    sources = {path.stem: path for path in sorted((run / "notebooks").glob("*.ipynb"))}
    if not sources:
        raise FileNotFoundError(f"{run / 'notebooks'} has no executed notebooks: run notebooks/00_pipeline.ipynb first")
    if (whole := run.with_name(f"{run.name}.ipynb")).is_file():
        sources = {"00_pipeline": whole, **sources}
    made = {}
    for name, path in sources.items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        _check_finished(notebook, path)
        made[folder / f"{name}.ipynb"] = _small_enough(_clean(notebook, run), path, limit_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in made.items():
        write_text(path, text)
    return list(made)


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def _check_finished(notebook: dict[str, Any], path: Path) -> None:
    """Refuse a notebook in which a cell failed or was not run."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and _text(cell["source"]).strip()]
    failed = any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    if failed or not all(cell["execution_count"] for cell in cells):
        raise ValueError(f"{path} did not run to its end: run notebooks/00_pipeline.ipynb again, which goes on there")


def _clean(notebook: dict[str, Any], run: Path) -> dict[str, Any]:
    """The notebook without traces of the machine: a new dict."""
    replace = _replacements(notebook, run)
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        tags = cell["metadata"].get("tags")
        kept = {"cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {"tags": tags} if tags else {}}
        kept["source"] = replace(_text(cell["source"])) if "injected-parameters" in (tags or ()) else cell["source"]
        if cell["cell_type"] == "code":
            kept["execution_count"] = cell["execution_count"]
            kept["outputs"] = _clean_outputs(cell["outputs"], replace)
        cells.append(kept)
    kernel = {key: notebook["metadata"][key] for key in ("kernelspec", "language_info") if key in notebook["metadata"]}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def _replacements(notebook: dict[str, Any], run: Path) -> Callable[[str], str]:
    """A function that takes the machine's paths and its name out of a text.

    The run may have been made elsewhere than where it lies now: papermill's parameters say where.
    """
    shown = run if not run.is_absolute() else Path("runs") / run.name
    places = {run.resolve(): str(shown), Path(__file__).resolve().parents[2]: "."}
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", ()):
            for node in ast.parse(_text(cell["source"])).body:
                if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
                    continue
                value, target = node.value.value, node.targets[0]
                if (
                    isinstance(value, str)
                    and isinstance(target, ast.Name)
                    and target.id in ("OUT", "RUN")
                    and Path(value).is_absolute()
                ):
                    places[Path(value)] = str(shown)
                    if value.endswith(f"/{shown}"):
                        places[Path(value.removesuffix(f"/{shown}"))] = "."
    host = socket.gethostname()

    def replace(text: str) -> str:
        for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
            text = re.sub(rf"{re.escape(str(place))}(?![\w-])", name, text)
        text = _PATH.sub(lambda match: Path(match[0]).name or ".", text)
        return re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "this machine", text) if len(host) > 5 else text

    return replace


def _clean_outputs(outputs: list[dict[str, Any]], replace: Callable[[str], str]) -> list[dict[str, Any]]:
    """What a reader should see of a cell's outputs: no stderr, no widgets, no scripts."""
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stdout":
                before = kept.pop()["text"] if kept and kept[-1]["output_type"] == "stream" else ""
                kept.append({"name": "stdout", "output_type": "stream", "text": before + _text(output["text"])})
            continue
        data = {kind: value for kind, value in output["data"].items() if "widget" not in kind}
        if "<script" in _text(data.get("text/html", "")):
            data = {"text/markdown": _INTERACTIVE}
        data = {
            kind: value if kind.startswith("image/") or not isinstance(value, (str, list)) else replace(_text(value))
            for kind, value in data.items()
        }
        if not set(data) - {"text/plain"} and _text(data.get("text/plain", "")).startswith(
            ("VBox(", "HBox(", "<IPython")
        ):
            continue
        if data:
            kept.append({**output, "data": data, "metadata": {}})
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = _printed(replace(output["text"]))
    return [output for output in kept if output["output_type"] != "stream" or output["text"]]


def _printed(text: str) -> str:
    """Printed text as it looks in the end: no colours and bars, lines that rewrote themselves in their last form, the
    middle of a long one left out."""
    lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in _ANSI.sub("", text).split("\n")]
    lines = [line for line in lines if not _BAR.search(line)]
    if len(lines) > _PRINTED_LINES:
        half = _PRINTED_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join(lines) if any(lines) else ""


def _small_enough(notebook: dict[str, Any], path: Path, limit_bytes: int) -> str:
    """The notebook's JSON text with its pictures as large as the limit allows."""
    for width_px, quality in _SIZES:
        shrunk = json.loads(json.dumps(notebook))
        for cell in shrunk["cells"]:
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", ()):
                    picture = base64.b64decode(_text(output["data"].pop("image/png")))
                    kind, small = _shrink(picture, width_px, quality)
                    output["data"][kind] = base64.b64encode(small).decode("ascii")
        text = json.dumps(shrunk, indent=1, ensure_ascii=False) + "\n"
        if len(text.encode()) <= limit_bytes:
            return text
    raise ValueError(f"{path} has {len(text.encode()):,} bytes with its smallest pictures, more than {limit_bytes:,}")


def _shrink(picture: bytes, width_px: int, quality: int) -> tuple[str, bytes]:
    """(kind, bytes) of a PNG file on white at most so wide: as PNG of 128 colours or as JPEG, whichever is smaller."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.width > width_px:
        image = image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.LANCZOS)
    made = []
    for kind, form, options in (
        ("image/png", image.quantize(128), dict[str, Any](format="PNG", optimize=True)),
        ("image/jpeg", image, dict[str, Any](format="JPEG", quality=quality, optimize=True)),
    ):
        file = io.BytesIO()
        form.save(file, **options)
        made.append((kind, file.getvalue()))
    return min(made, key=lambda item: len(item[1]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lumbar.look.gallery RUN FOLDER, e.g. runs/demo docs/gallery")
    for path in make_gallery(sys.argv[1], sys.argv[2]):
        print(f"{path}: {path.stat().st_size / 1000:,.0f} kB")
