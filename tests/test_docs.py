"""What README and docs tell a reader to open or to type is there, and is accepted."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from papermill.cli import _resolve_type

from lumbar.run.parameters import check_notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page):
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors_of(file), f"{page.name}: {target} has no such heading"


def commands_of(page):
    """The command lines of a page: those of its bash blocks, and those in running text that begin as one does."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in _joined(block)]
    inline = re.findall(r"`((?:papermill|python) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [part.strip() for line in [*lines, *inline] for part in line.split("&&")]


def _joined(block):
    return block.replace("\\\n", " ").splitlines()


EVERY = [(page.name, command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("page, command", [pair for pair in EVERY if "papermill " in pair[1]])
def test_notebooks_take_the_parameters_of_these_commands(page, command):
    words = shlex.split(command, comments=True)
    words = words[words.index("papermill") + 1 :]
    notebooks = [word for word in words if word.endswith(".ipynb")]
    if "..." in command or not notebooks or "$" in notebooks[0]:
        pytest.skip("no whole command")
    given = {}
    for flag, name, value in zip(words, words[1:], [*words[2:], ""]):
        if flag in ("-p", "-r") and name.isidentifier():
            given[name] = _resolve_type(value) if flag == "-p" else value
        elif flag == "-y":
            given |= yaml.safe_load(re.sub(r"\$\{?\w+\}?", "x", name))
        elif flag == "-f":
            given |= yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    given = {name: value for name, value in given.items() if not (isinstance(value, str) and "$" in value)}
    check_notebook_parameters(ROOT / notebooks[0], given)


@pytest.mark.parametrize("page, command", [pair for pair in EVERY if re.search(r"\bpython (-m )?[\w./]", pair[1])])
def test_what_python_is_asked_to_run_is_there(page, command):
    module, script = re.search(r"\bpython (?:-m ([\w.]+)|([\w./]+\.py))?", command).groups()
    if module:
        assert importlib.util.find_spec(module), f"{page}: {module}"
    elif script:
        assert (ROOT / script).is_file(), f"{page}: {script}"


def test_commands_were_found():
    assert len(EVERY) > 30 and sum("papermill" in command for _, command in EVERY) > 10
