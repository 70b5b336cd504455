"""Tables and an executed notebook as HTML that needs nothing else.

May use: storage.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..storage import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def short(value: object, digits: int = 3) -> str:
    """A value of a parameters or counts table as short text: rounded numbers, lists in brackets.

    Parameters
    ----------
    value : object
    digits : int
        Significant ones of a float.

    Returns
    -------
    str
    """
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(short(item, digits) for item in value)}]"
    return str(value)


def section_id(heading: str) -> str:
    """The id that Jupyter and nbconvert give a heading, to link to."""
    return heading.replace(" ", "-")


def show_figure(fig: Figure, alt: str) -> None:
    """Show a figure in a notebook, with a text that says what it shows to whoever does not see it; closes it.

    Parameters
    ----------
    fig : Figure
    alt : str
        Plain text, becomes the picture's alternative text in JupyterLab and on the page of export_html.
    """
    import io

    import matplotlib.pyplot as plt
    from IPython.display import display

    file = io.BytesIO()
    fig.savefig(file, format="png", bbox_inches="tight")
    plt.close(fig)
    picture = base64.b64encode(file.getvalue()).decode("ascii")
    display({"image/png": picture, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def paragraph_html(text: object) -> str:
    """Any text as a paragraph of a page that shows just this text: for all that comes from files, such as names,
    versions and problems. In Markdown it would be obeyed: HTML, links, images, formulas.

    Parameters
    ----------
    text : object
        Shown as str gives it.

    Returns
    -------
    str
        A `p` element.
    """
    return f"<p>{html.escape(str(text))}</p>"


def table_html(
    table: pd.DataFrame, caption: str = "", decimals: int = 3, names: Mapping[str, str] | None = None
) -> str:
    """A DataFrame as a clean HTML table: numbers to the right and rounded, missing ones as a dash, text escaped.

    Parameters
    ----------
    table : DataFrame
        The index is shown if it has a name.
    caption : str
        A sentence above the table.
    decimals : int
        Of floats.
    names : mapping of str to str, optional
        Column -> heading; in headings underscores become spaces.

    Returns
    -------
    str
        A `table` element of the class kit.
    """
    shown = table.reset_index() if table.index.name else table

    def side(value):
        return "right" if isinstance(value, (int, float, np.number)) else "left"

    def cell(value):
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if isinstance(value, (int, np.integer)):
            return f"{value:d}" if abs(value) > 9999999 else f"{value:,}"
        if isinstance(value, (float, np.floating)):
            return f"{value:.{decimals}f}" if np.isfinite(value) else "&ndash;"
        return html.escape(str(value))

    head = "".join(
        f"<th scope=col>{html.escape(str((names or {}).get(column, column)).replace('_', ' '))}</th>"
        for column in shown
    )
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:{side(value)}'>{cell(value)}</td>" for value in row) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    title = f"<caption style='text-align:left;caption-side:top'>{html.escape(caption)}</caption>" if caption else ""
    return f"<table class=kit>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#555;--paper:#fff;--rule:#ccc;--stripe:#f4f6f8;--key:#0067a3}
@media (prefers-color-scheme:dark){:root{--ink:#eaeaea;--soft:#b5b5b5;--paper:#161616;--rule:#444;--stripe:#202326;
 --key:#6fc1f2}}
body{margin:0 auto;padding:24px 20px 80px;max-width:1060px;background:var(--paper);
 color:var(--ink);font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.9em;line-height:1.2}h2{margin-top:2.2em;border-bottom:1px solid var(--rule);padding-bottom:.2em}
img{max-width:100%;height:auto}img,.output_png img{background:#fff;border-radius:4px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
table.kit{margin:10px 0}caption{color:var(--soft);padding:4px 0}
th,td{padding:4px 10px;border-bottom:1px solid var(--rule);text-align:left}
table.kit tbody tr:nth-child(even){background:var(--stripe)}
pre{white-space:pre-wrap;font-size:13px;color:var(--soft)}code{font-size:.92em}
.anchor-link,.jp-InputPrompt,.jp-OutputPrompt,.prompt{display:none}
.scroll{overflow-x:auto}a{color:var(--key)}:focus-visible{outline:2px solid var(--key)}
li{margin:.3em 0}.contents{columns:18em}h2,h3{scroll-margin-top:8px}
@media (max-width:700px){body{padding:12px 12px 60px}table.kit{font-size:13px}table.kit :is(th,td){padding:3px 5px}}
"""


def export_html(notebook: str | Path, page: str | Path, title: str | None = None, printed: bool = False) -> Path:
    """An executed notebook as one HTML page without its code that needs no network: for readers, not for editing.

    Keeps text, figures and HTML outputs; leaves out code, progress bars (stderr) and widgets, which need a kernel.

    Parameters
    ----------
    notebook : path
        The .ipynb.
    page : path
        The .html to write.
    title : str, optional
        Of the browser's tab; default: the notebook's first heading (`# `), without one its file's name.
    printed : bool
        Keep what cells print, too.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    FileNotFoundError
        There is no such notebook.
    """
    import nbformat
    from bs4 import BeautifulSoup  # nbconvert's
    from bs4.formatter import HTMLFormatter
    from nbconvert import HTMLExporter

    if not Path(notebook).is_file():
        raise FileNotFoundError(f"{notebook} does not exist: run it with papermill first")
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if (output.output_type != "stream" or (printed and output.name == "stdout"))
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    if title is None:
        headings = [
            line.lstrip("# ")
            for cell in content.cells
            if cell.cell_type == "markdown"
            for line in cell.source.splitlines()
            if line.startswith("# ")
        ]
        title = headings[0] if headings else Path(notebook).stem
    # nbconvert's "basic" template is the bare body: none of the libraries that the others load from the network.
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_input_prompt=True
    )
    body, _ = exporter.from_notebook_node(content)
    # nbconvert parses the page and writes quotes in texts as they are. Nothing in a text shall look like an attribute.
    soup = BeautifulSoup(body, "html.parser")
    for table in soup.select("table.kit"):
        # Where it is wider than the screen it scrolls, which takes a keyboard as well.
        caption = table.find("caption")
        name = caption.get_text() if caption else "table"
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0", "role": "group", "aria-label": name}))
    body = soup.decode(formatter=HTMLFormatter(entity_substitution=html.escape))
    return write_text(
        page,
        (
            "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{_PAGE_STYLE}</style></head><body><main>{body}</main></body></html>\n"
        ),
    )
