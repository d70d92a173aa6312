"""Each model chapter has exercises, each with a check and a solution that passes it."""

from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parents[1] / "book"
UNWRITTEN = "yours None  expected ?\n"


def exercises(name):
    """The code cells of each exercise: those that ask, and the folded solution."""
    cells = nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells
    starts = [i for i, cell in enumerate(cells) if "## Exercises\n" in cell.source]
    found = []
    for cell in cells[starts[0] + 1 :]:
        if cell.source.startswith("## Summary"):
            return found
        if cell.source.startswith(f"**{len(found) + 1}. "):
            found.append(([], []))
        if cell.cell_type == "code" and found:
            asks, solves = found[-1]
            folded = "hide-cell" in cell.metadata.get("tags", [])
            (solves if folded else asks).append(cell)
    raise AssertionError(f"{name}: no summary after the exercises")


def printed(cells):
    return [out.get("text", "") for cell in cells for out in cell.outputs]


@pytest.mark.parametrize("name", ["shared_bottom", "esmm", "mmoe", "cgc", "ple"])
def test_an_exercise_asks_without_telling_and_its_solution_is_checked(name):
    found = exercises(name)
    assert 4 <= len(found) <= 5
    for asks, solves in found:
        assert printed(asks) == [UNWRITTEN]
        assert any("assert compare(" in cell.source for cell in solves)
        assert any(text.startswith("yours ") for text in printed(solves))
