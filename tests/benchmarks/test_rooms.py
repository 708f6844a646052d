"""Imports between the rooms of the benchmarks go one way."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"
SOURCES = sorted(BENCHMARKS.glob("**/*.py"))
COMMANDS = {path.stem for path in BENCHMARKS.glob("*.py")}
# Which other rooms each room may import.
ALLOWED = {
    "data": set(),
    "measure": set(),
    "overhead": {"data", "measure"},
    "training": {"data", "measure"},
    "trials": {"data", "measure"},
}


def imported(source):
    """The first part of the name of each module that a file imports."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


def test_all_code_lies_in_a_room_or_is_a_command():
    assert {source.parent for source in SOURCES} == {BENCHMARKS, *(BENCHMARKS / room for room in ALLOWED)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(BENCHMARKS)))
def test_commands_import_rooms_and_rooms_import_those_below(source):
    room = source.parent.name if source.parent != BENCHMARKS else None
    ours = set(imported(source)) & (COMMANDS | ALLOWED.keys())
    assert ours <= (ALLOWED.keys() if room is None else ALLOWED[room] | {room})


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(BENCHMARKS)))
def test_nothing_comes_from_the_tests(source):
    assert not set(imported(source)) & {"tests", *(path.stem for path in TESTS.glob("**/*.py"))}
