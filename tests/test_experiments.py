"""Long experiments: which cells run, what is stored, and what is refused."""

import re

import pandas as pd
import pytest

from tools import experiments
from tools.experiments import ExperimentError

HEAD = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Toy

"""
SETTINGS = """
CALLS = []

def settings():
    return [{"size": size, "runner": name} for size in (0.5, 2) for name in "AB"]
"""
RUN = """
def run(size, runner):
    CALLS.append((size, runner))
    return [{"seed": seed, "score": size * seed / 3} for seed in range(2)]
"""


def cell(source, tag=None):
    tags = f":tags: [{tag}]\n\n" if tag else ""
    return f"```{{code-cell}} ipython3\n{tags}{source.strip()}\n```\n\n"


@pytest.fixture
def book(tmp_path):
    folder, package = tmp_path / "book", tmp_path / "package"
    folder.mkdir()
    package.mkdir()
    write(folder)
    return folder, package


def write(folder, settings=SETTINGS, run=RUN, between="raise SystemExit"):
    cells = cell(settings, "experiment") + cell(between) + cell(run, "experiment")
    (folder / "toy.md").write_text(HEAD + "Words.\n\n" + cells)


def test_only_the_experiment_cells_run_and_every_setting_is_stored(book):
    path = experiments.carry_out("toy", *book)
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(r"# cells [0-9a-f]{16}, torch .+, numpy .+", first)
    found = pd.read_csv(path, comment="#")
    assert list(found) == ["size", "runner", "seed", "score"]
    expected = [(s, r, i) for s in (0.5, 2) for r in "AB" for i in range(2)]
    assert list(found[["size", "runner", "seed"]].itertuples(index=False)) == expected
    assert found["score"].to_list() == pytest.approx(
        [s * i / 3 for s, _, i in expected], rel=1e-5
    )
    assert experiments.check(["toy"], *book) == {}


def test_it_goes_on_where_it_stopped(book):
    broken = RUN.replace("return", "assert (size, runner) != (2, 'A')\n    return")
    write(book[0], run=broken)
    with pytest.raises(AssertionError):
        experiments.carry_out("toy", *book)
    path = experiments.results_file("toy", book[1])
    before = path.read_text()
    assert len(pd.read_csv(path, comment="#")) == 4
    # The same cells, as far as the file is concerned.
    write(book[0])
    cells = experiments.experiment_cells("toy", book[0])
    path.write_text(
        re.sub("[0-9a-f]{16}", experiments.cells_digest(cells), before, count=1)
    )
    run = experiments.loaded("toy", cells, book[0])
    todo = experiments.missing_settings(
        run["settings"](), pd.read_csv(path, comment="#")
    )
    assert todo == [{"size": 2, "runner": "A"}, {"size": 2, "runner": "B"}]
    experiments.carry_out("toy", *book)
    after = path.read_text()
    assert after.splitlines()[1:6] == before.splitlines()[1:6]
    assert len(pd.read_csv(path, comment="#")) == 8


def test_a_second_run_changes_nothing(book):
    path = experiments.carry_out("toy", *book)
    before = path.stat().st_mtime_ns
    experiments.carry_out("toy", *book)
    assert path.stat().st_mtime_ns == before


def test_rows_of_other_cells_are_not_mixed(book):
    path = experiments.carry_out("toy", *book)
    before = path.read_text()
    write(book[0], run=RUN.replace("/ 3", "/ 4"))
    assert "experiment cells have changed" in experiments.check(["toy"], *book)["toy"]
    with pytest.raises(ExperimentError, match="made by the cells '"):
        experiments.carry_out("toy", *book)
    assert path.read_text() == before


def test_rows_of_other_versions_are_not_mixed(book):
    path = experiments.carry_out("toy", *book)
    path.write_text(re.sub("torch [^,]+", "torch 0.1", path.read_text(), count=1))
    assert experiments.check(["toy"], *book) == {}
    with pytest.raises(ExperimentError, match="made by the versions 'torch 0.1, numpy"):
        experiments.carry_out("toy", *book)


def test_prose_and_other_cells_do_not_count(book):
    experiments.carry_out("toy", *book)
    write(book[0], between="print('another cell')")
    text = (book[0] / "toy.md").read_text()
    (book[0] / "toy.md").write_text(text.replace("Words.", "Other words."))
    assert experiments.check(["toy"], *book) == {}


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        (SETTINGS, "def walk(): pass", "define no run"),
        ("x = 1", "y = 2", "define no settings and no run"),
    ],
)
def test_cells_without_the_two_functions_are_refused(book, settings, run, message):
    write(book[0], settings, run)
    with pytest.raises(ExperimentError, match=message):
        experiments.carry_out("toy", *book)


def test_a_chapter_without_experiment_is_refused(book):
    (book[0] / "toy.md").write_text(HEAD + cell("x = 1"))
    with pytest.raises(ExperimentError, match=r"toy\.md has no cells with the tag"):
        experiments.carry_out("toy", *book)


def test_a_cell_is_either_exported_or_experiment(book):
    (book[0] / "toy.md").write_text(HEAD + cell("x = 1", "export, experiment"))
    with pytest.raises(ExperimentError, match="code cell 1: tagged both export and"):
        experiments.experiment_cells("toy", book[0])


def test_a_file_without_its_first_line_is_refused(book):
    path = experiments.carry_out("toy", *book)
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(ExperimentError, match="expected a first line '# cells"):
        experiments.carry_out("toy", *book)


def test_the_command(book, capsys):
    assert experiments.main(["toy"], *book) == 0
    assert "toy 4/4: size 2, runner B" in capsys.readouterr().out
    assert experiments.main(["--check"], *book) == 0
    write(book[0], run=RUN.replace("/ 3", "/ 4"))
    assert experiments.main(["--check"], *book) == 1
    assert "stale" in capsys.readouterr().err
    assert experiments.main(["toy"], *book) == 1
    with pytest.raises(SystemExit):
        experiments.main([], *book)
    with pytest.raises(SystemExit):
        experiments.main(["another"], *book)


@pytest.mark.parametrize("name", experiments.stored_names())
def test_stored_results_are_those_of_the_chapters_cells(name):
    assert experiments.check([name]) == {}


def test_no_setting_of_esmm_is_missing():
    path = experiments.results_file("esmm")
    namespace = experiments.loaded("esmm", experiments.experiment_cells("esmm"))
    found, listed = pd.read_csv(path, comment="#"), namespace["settings"]()
    assert experiments.missing_settings(listed, found) == []
    assert (found.groupby(list(listed[0])).size() == namespace["SEEDS"]).all()
    assert len(found) == len(listed) * namespace["SEEDS"]


def test_every_chapter_with_an_experiment_has_results():
    with_cells = {
        name
        for name in experiments.tangle.chapter_names()
        if experiments.experiment_cells(name)
    }
    assert with_cells == {*experiments.stored_names()}
    assert "esmm" in with_cells
