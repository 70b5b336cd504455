"""Paths can be pasted into parameters as a file manager, a browser or a shell gives them."""

import pytest

import utils
from lumbar.run.pasted import pasted_path


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "my data"
    found.mkdir()
    return found


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "{}/",
        "{}//",
        " {} ",
        "{}\n",
        "{}\r\n",
        "\t{}/ \n",
        "'{}'",
        '"{}"',
        ' "{}/" ',
        "`{}`",
        "\N{LEFT DOUBLE QUOTATION MARK}{}\N{RIGHT DOUBLE QUOTATION MARK}",
        "\"'{}'\"",
        "\u202a{}",
        "\ufeff{}\u200b",
        '\u202a "{}" ',
    ],
)
def test_what_is_around_a_path_goes(folder, around):
    assert pasted_path(around.format(folder)) == str(folder)


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}", "'file://{}/'", "FILE://{}\n"])
def test_addresses_of_files(folder, form):
    assert pasted_path(form.format(str(folder).replace(" ", "%20"))) == str(folder)


def test_a_shells_backslashes(folder):
    assert pasted_path(str(folder).replace(" ", "\\ ")) == str(folder)
    (folder / "it's (2)").mkdir()
    assert pasted_path(f"{folder}/it\\'s\\ \\(2\\)".replace("my data", "my\\ data")) == str(folder / "it's (2)")


def test_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert [pasted_path(text) for text in ("~", "~/", "~/x", ' "~/x/" ')] == [str(folder)] * 2 + [f"{folder}/x"] * 2


@pytest.mark.parametrize(
    "text",
    ["", "/", ".", "..", "installed", "owner/slug", "/kaggle/input/a-slug", "runs/de mo", "C:\\data\\x", "%20", "it's"],
)
def test_what_needs_nothing_stays(text):
    assert pasted_path(text) == text


def test_what_exists_as_written_keeps_its_name(tmp_path):
    for name in (" spaces ", "'quoted'", "back\\slash", "~", "%20"):
        (tmp_path / name).mkdir()
        assert pasted_path(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"


def test_a_notebooks_paths_are_tidied_where_they_are_read(folder):
    values = {"DATA": f'"{folder}/"', "PREDICTIONS": [f"{folder}/\n", " runs/x "], "OUT": "~/out", "MEMBER": " level "}
    cell = "# Parameters: these\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    names = dict(values)
    given = utils.start_notebook([cell], names)
    assert given == names
    assert names["DATA"] == str(folder) and names["PREDICTIONS"] == [str(folder), "runs/x"]
    assert not names["OUT"].startswith("~") and names["MEMBER"] == " level "
