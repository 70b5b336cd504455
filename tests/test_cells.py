"""A parameters cell takes other values in the place of its own, and whoever edits it afterwards is obeyed."""

import ast
import math

import pytest

from lumbar.run.cells import literal_text, with_values
from lumbar.run.parameters import assigned_literals

CELL = '''# Parameters: é, of a test
TEXT = "x"  # é: a comment with "quotes" and # a hash
ROWS = [
    1,  # the first
    2,
]  # of everything
JOINED = ("a"
          "b")  # two parts
BOTH = {"a": 1}; NOTHING = None  # two in a row
LONG = """x
# no comment
y"""  # text
SPLIT = \\
    3  # on the next line
HELD = (  # opened here
    4
)  # closed here
RATE = 3.0e-4  # as it was written
FLAG=True
'''
VALUES = [
    "",
    'it\'s "é" \\ \n\t',
    "'",
    '"',
    "# no comment",
    '"""',
    "\x00\u2028 😀",
    [],
    [0, 3],
    ["a", 'b"c', None, True],
    {},
    {"train-vit-level": {"EPOCHS": 7, "SHAPE": [96, 96, 96], "RATE": 1e-05}},
    None,
    True,
    False,
    0,
    -7,
    10**30,
    1e-05,
    -0.0,
    1e300,
    ("a",),
    (),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_of_any_kind_is_read_back_as_it_was_given(value):
    names = list(assigned_literals(CELL))
    for name in names:
        staged = with_values(CELL, {name: value})
        read = assigned_literals(staged)
        assert list(read) == names and read[name] == value and type(read[name]) is type(value)
        assert {k: v for k, v in read.items() if k != name} == {
            k: v for k, v in assigned_literals(CELL).items() if k != name
        }
        nodes = ast.parse(staged).body
        assert all(node.lineno == node.end_lineno for node in nodes), "one literal a line"


def test_numbers_that_are_not_finite_are_read_back():
    read = assigned_literals(with_values(CELL, {"RATE": math.nan, "SPLIT": -math.inf}))
    assert math.isnan(read["RATE"]) and read["SPLIT"] == -math.inf


def test_comments_stay_and_what_is_not_given_stays_as_it_was_written():
    staged = with_values(CELL, {"TEXT": "é", "ROWS": [3], "LONG": "z"})
    assert 'TEXT = "é"  # é: a comment with "quotes" and # a hash\n' in staged
    assert "# the first\nROWS = [3]  # of everything\n" in staged
    assert 'LONG = "z"  # text\n' in staged and "# no comment" not in staged
    assert 'JOINED = "ab"  # two parts' in staged and "# opened here\nHELD = 4  # closed here" in staged
    assert "RATE = 3.0e-4  # as it was written\n" in staged and staged.startswith("# Parameters: é")
    assert with_values(staged, {}) == staged


def test_what_cannot_stand_in_a_cell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not assign TEXTS"):
        with_values(CELL, {"TEXTS": "x"})
    for value in (tmp_path, {1, 2}, [tmp_path], b"x"):
        with pytest.raises(TypeError, match="no literal"):
            with_values(CELL, {"TEXT": value})


def test_text_has_double_quotes_where_they_need_no_escape():
    assert literal_text("it's") == '"it\'s"' and literal_text('a "b"') == "'a \"b\"'" and literal_text("a") == '"a"'
