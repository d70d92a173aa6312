"""Book, notebooks and package are one thing; and what watches over that does fail.

A throw-away book is woven, executed, damaged in every way that matters, and compared.
"""

import copy
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_output

from tools import sync, tangle
from tools.agreement import agree

ROOT = tangle.ROOT
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
WEAVING = """
# Weaving

```{code-cell} ipython3
:tags: [export]

def add_to(cls):
    return lambda method: setattr(cls, method.__name__, method)
```
"""
SCALE = """
# Scale

```{code-cell} ipython3
:tags: [export]

import math
from toys.weaving import add_to

FACTOR = 3
```

```{code-cell} ipython3
:tags: [export]

class Scale:
    def __init__(self, factor=FACTOR):
        self.factor = factor
```

```{code-cell} ipython3
Scale().factor
```

```{code-cell} ipython3
:tags: [export]

@add_to(Scale)
def times(self, x):
    return self.factor * x

def third():
    return Scale(1 / 3)
```

<!-- whole class: Scale -->

```{code-cell} ipython3
---
mystnb:
  image:
    alt: "Nothing"
tags: [hide-input]
---
print("total", math.fsum(third().times(x) for x in (0.1, 0.2)), flush=True)
print("rows", 4)
```

```{code-cell} ipython3
from IPython.display import HTML

HTML(f"<tr><th>4</th><td>{third().times(0.3):.6e}</td></tr>")
```

```{code-cell} ipython3
import random

from IPython.display import SVG

SVG(f"<svg xmlns='http://www.w3.org/2000/svg'><desc>{random.random()}</desc></svg>")
```
"""
LAB = """
# Lab

```{code-cell} ipython3
import os
from pathlib import Path

print(os.listdir(), os.environ["MTL_ANNOTATED_DATA"] == os.path.abspath("../data"))
```
"""
NEEDS_DATA = HEADER[:-4] + "mtl_annotated:\n  needs_data: [toys, bricks]\n---\n"


class Book:
    """A book and its package in a folder of their own."""

    def __init__(self, root):
        self.root, self.book, self.package = root, root / "book", root / "toys"

    def write(self, **chapters):
        self.book.mkdir(exist_ok=True)
        self.package.mkdir(exist_ok=True)
        (self.package / "__init__.py").touch()
        for name, text in chapters.items():
            header = "" if text.startswith("---") else HEADER
            (self.book / f"{name}.md").write_text(header + text)
        return self

    def edit(self, path, old, new):
        path = self.root / path
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def sync(self, *arguments):
        return sync.main(arguments, self.book, self.package)

    def check(self, *names):
        return sync.check(names, self.book, self.package)

    def notebook(self, name):
        return nbformat.read(self.book / f"{name}.ipynb", as_version=4)

    def copy(self, root):
        subprocess.run(["cp", "-r", self.root, root], check=True)
        return Book(root)


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """The toy book, executed once."""
    book = Book(tmp_path_factory.mktemp("executed"))
    book.write(weaving=WEAVING, scale=SCALE)
    assert book.sync() == 0
    return book


@pytest.fixture
def toy(executed, tmp_path):
    """A copy of the executed toy book, to be damaged."""
    return executed.copy(tmp_path / "toy")


def code(notebook):
    return sync.code_cells(notebook)


class TestTolerance:
    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("auc 0.712345", "auc 0.712345", True),
            ("auc 0.712345", "auc 0.7123451", True),
            ("auc 0.712345", "auc 0.712355", False),
            ("auc 0.712345", "AUC 0.712345", False),
            ("loss 1.0", "loss 1.0000009", True),
            ("loss 1.0", "loss 1.0000019", False),
            ("loss 0.0", "loss 9e-9", True),
            ("loss 0.0", "loss 2e-8", False),
            ("loss -0.5", "loss 0.5", False),
            ("1e-3 2.5E+4", "0.001 25000.0", True),
            ("rows 10000000", "rows 10000001", False),
            ("rows 3", "rows 3.0", False),
            ("tensor([1., 2.])", "tensor([1., 2.0000001])", True),
            ("tensor([1., 2.])", "tensor([1., 2.0000001, 3.])", False),
            ("<td>0.25</td>", "<td>0.250000001</td>", True),
            ("<td>0.25</td>", "<th>0.25</th>", False),
            ("nan", "nan", True),
            ("nan", "0.0", False),
            ("", "", True),
        ],
    )
    def test_agree(self, one, other, same):
        assert agree(one, other) is same
        assert agree(other, one) is same

    def test_the_tolerance_can_be_set(self):
        assert agree("1.0", "1.01", relative=0.1)
        assert agree("0.0", "0.01", absolute=0.1)


class TestWeaving:
    def test_fold_of_the_whole_class(self, executed):
        (fold,) = [
            cell.source
            for cell in executed.notebook("scale").cells
            if "<details>" in cell.source
        ]
        assert fold == (
            "<details><summary>The whole class so far: Scale</summary>\n\n```python\n"
            "class Scale:\n    def __init__(self, factor=FACTOR):\n"
            "        self.factor = factor\n\n    def times(self, x):\n"
            "        return self.factor * x\n```\n\n</details>"
        )

    def test_fold_of_an_unknown_class(self, toy, capsys):
        toy.edit("book/scale.md", "whole class: Scale", "whole class: Scales")
        assert toy.sync("--check", "scale") == 1
        assert capsys.readouterr().err == (
            "book/scale.md: whole class: the chapter exports no class Scales; it has"
            " Scale\n"
        )

    def test_header_without_text_representation(self, toy, capsys):
        toy.edit("book/scale.md", "  text_representation:", "  other:")
        assert "the header lacks jupytext: text_representation" in toy.check()["scale"]

    def test_ids_and_metadata_depend_on_the_chapter_alone(self, executed):
        notebook = executed.notebook("scale")
        ids = [cell.id for cell in notebook.cells]
        assert ids == [
            c.id for c in sync.woven("scale", executed.book, executed.package).cells
        ]
        assert len(set(ids)) == len(ids)
        assert notebook.metadata.language_info == {"name": "python"}
        assert set(notebook.metadata.mtl_annotated.executed_from.modules) == {"weaving"}

    def test_streams_are_merged(self, executed):
        (stream,) = code(executed.notebook("scale"))[4].outputs
        assert stream.text == "total 0.1\nrows 4\n"

    def test_streams_are_not_moved(self):
        pieces = [new_output("stream", text=text) for text in "abcd"]
        table = new_output("display_data", {"text/plain": "t"})
        whole = sync.merged([*pieces[:2], table, *pieces[2:]])
        assert [o.get("text") for o in whole] == ["ab", None, "cd"]
        assert pieces[0].text == "a"

    @pytest.mark.slow
    def test_executing_again_changes_only_what_is_random(self, toy):
        before = (toy.book / "scale.ipynb").read_text().split("\n")
        assert toy.sync("scale") == 0
        after = (toy.book / "scale.ipynb").read_text().split("\n")
        changed = [a for a, b in zip(before, after, strict=True) if a != b]
        assert all("<desc>" in line for line in changed)

    @pytest.mark.slow
    def test_a_page_without_code_is_stored_too(self, toy):
        toy.write(words="\n# Words\n\nNothing else.\n")
        assert toy.sync() == 0
        assert toy.check() == {}
        assert toy.notebook("words").cells[0].source == "# Words\n\nNothing else."


class TestStale:
    def test_nothing_is(self, executed, capsys):
        assert executed.check() == {}
        assert executed.sync("--check") == 0
        assert capsys.readouterr() == ("", "")

    def why(self, toy, name="scale"):
        wrong = toy.check()
        assert toy.sync("--check") == 1
        assert list(wrong) == [name]
        prefix = f"stale: book/{name}.ipynb: "
        assert wrong[name].startswith(prefix)
        return wrong[name].removeprefix(prefix)

    def damage(self, toy, change, name="scale"):
        notebook = toy.notebook(name)
        change(notebook)
        nbformat.write(notebook, toy.book / f"{name}.ipynb")
        return self.why(toy, name)

    def test_no_notebook(self, toy):
        (toy.book / "scale.ipynb").unlink()
        assert self.why(toy) == "there is no notebook"

    def test_no_chapter(self, toy):
        (toy.book / "scale.ipynb").rename(toy.book / "left.ipynb")
        assert toy.check()["left"] == "stale: book/left.ipynb: it has no chapter"

    def test_code(self, toy):
        toy.edit("book/scale.md", '"rows", 4', '"rows", 5')
        assert self.why(toy) == "the code of chapter and notebook differs"

    def test_code_edited_in_both_and_not_executed(self, toy):
        toy.edit("book/scale.md", '"rows", 4', '"rows", 5')
        toy.edit("book/scale.ipynb", '\\"rows\\", 4', '\\"rows\\", 5')
        # Not even the identifiers of the cells give it away.
        notebook, fresh = (
            toy.notebook("scale"),
            sync.woven("scale", toy.book, toy.package),
        )
        for old, new in zip(notebook.cells, fresh.cells, strict=True):
            old.id = new.id
        nbformat.write(notebook, toy.book / "scale.ipynb")
        assert self.why(toy) == "the code is not the one that was executed"

    def test_an_imported_module(self, toy):
        toy.edit("book/weaving.md", "def add_to(cls):", "def add_to(cls, also=None):")
        tangle.main([], toy.book, toy.package)
        wrong = toy.check()
        assert wrong["scale"].endswith("weaving changed since it was executed")

    def test_a_module_behind_an_imported_module(self, toy):
        toy.write(deep="\n# D\n\n```{code-cell}\n:tags: [export]\nDEEP = 1\n```\n")
        toy.edit(
            "book/weaving.md",
            "def add_to(cls):",
            "from toys.deep import DEEP\n\ndef add_to(cls, deep=DEEP):",
        )
        tangle.main([], toy.book, toy.package)
        behind = sync.modules_behind(toy.notebook("scale"), toy.package)
        assert list(behind) == ["deep", "weaving"]

    def test_the_words_of_an_imported_module_do_not_count(self, toy):
        toy.edit("book/weaving.md", "# Weaving", "# Other\n\n## Section")
        tangle.main([], toy.book, toy.package)
        assert "section 'Section'" in (toy.package / "weaving.py").read_text()
        assert "scale" not in toy.check()

    def test_prose_keeps_the_outputs(self, toy, capsys):
        before = toy.notebook("scale")
        toy.edit("book/scale.md", "# Scale", "# Scales\n\nMore words.")
        assert self.why(toy) == "the source of cell 1 differs"
        capsys.readouterr()
        assert toy.sync() == 0
        assert capsys.readouterr().out == (
            "wrote toys/scale.py\n"
            "rewove book/scale.ipynb: the source of cell 1 differs\n"
        )
        assert toy.check() == {}
        after = toy.notebook("scale")
        assert [c.outputs for c in code(after)] == [c.outputs for c in code(before)]
        assert "More words." in after.cells[0].source

    def test_tags(self, toy):
        toy.edit("book/scale.md", "tags: [hide-input]", "tags: [hide-cell]")
        assert self.why(toy) == "the metadata of cell 7 differ"

    def test_metadata(self, toy):
        toy.edit("book/scale.md", "display_name: Python 3", "display_name: Python")
        assert self.why(toy) == "its metadata differ"

    def test_a_cell_too_many(self, toy):
        def change(notebook):
            notebook.cells.append(nbformat.v4.new_markdown_cell("more"))

        assert self.damage(toy, change) == "it has 10 cells, not 9"

    def test_never_executed(self, toy):
        def change(notebook):
            for cell in code(notebook):
                cell.execution_count, cell.outputs = None, []

        assert self.damage(toy, change) == "code cell 1 has not been executed"

    def test_not_in_order(self, toy):
        def change(notebook):
            code(notebook)[1].execution_count = 9

        assert self.damage(toy, change) == (
            "code cell 2 has execution count 9: the cells were not executed in order, in"
            " one go"
        )

    def test_times(self, toy):
        def change(notebook):
            code(notebook)[0].metadata["execution"] = {"iopub.execute_input": "2026"}

        assert (
            self.damage(toy, change) == "code cell 1 stores the time of its execution"
        )


class TestProblems:
    def problems(self, executed, change):
        notebook = copy.deepcopy(executed.notebook("scale"))
        assert sync.problems(notebook) == []
        change(notebook, code(notebook)[2])
        return sync.problems(notebook)

    @pytest.mark.parametrize(
        ("output", "why"),
        [
            (
                new_output("error", ename="ValueError", evalue="no", traceback=[]),
                "stores an error: ValueError: no",
            ),
            (
                new_output("stream", name="stderr", text="warning: x\nmore"),
                "writes to stderr: warning: x",
            ),
            (
                new_output("display_data", {sync.WIDGET: {"model_id": "1"}}),
                "shows a widget, which a page cannot",
            ),
            (
                new_output("display_data", {"text/plain": "<f at 0x7f31bcd85080>"}),
                "prints a memory address: at 0x7f31bcd85080",
            ),
        ],
    )
    def test_outputs(self, executed, output, why):
        def change(notebook, cell):
            cell.outputs.append(output)

        assert self.problems(executed, change) == [f"code cell 3 {why}"]

    def test_a_stream_in_pieces(self, executed):
        def change(notebook, cell):
            cell.outputs = [new_output("stream", text=t) for t in "ab"]

        assert self.problems(executed, change) == [
            "code cell 3 stores a stream in pieces"
        ]

    @pytest.mark.parametrize(
        "tag", ["nbval-skip", "raises-exception", "nbval-ignore-output"]
    )
    def test_tags_that_hide_a_cell(self, executed, tag):
        def change(notebook, cell):
            cell.metadata["tags"] = [tag]

        assert self.problems(executed, change) == [
            f"code cell 3 would not be compared: {tag}"
        ]

    def test_a_comment_that_hides_a_cell(self, executed):
        def change(notebook, cell):
            cell.source = "# NBVAL_SKIP\n" + cell.source

        assert self.problems(executed, change) == [
            "code cell 3 would not be compared: NBVAL_SKIP"
        ]

    def test_an_exported_cell_that_prints(self, executed):
        def change(notebook, cell):
            cell.metadata["tags"] = ["export"]

        assert self.problems(executed, change) == [
            "code cell 3 is exported, and prints"
        ]

    def test_metadata(self, executed):
        def change(notebook, cell):
            notebook.metadata["widgets"] = {}
            notebook.metadata.language_info["version"] = "3.11.7"

        assert self.problems(executed, change) == [
            "the metadata hold the state of widgets",
            "the metadata hold the version of Python",
        ]


@pytest.mark.slow
class TestExecution:
    def test_what_fails_leaves_the_old_notebook(self, toy, capsys):
        before = (toy.book / "scale.ipynb").read_bytes()
        toy.edit("book/scale.md", "Scale().factor\n", "Scale().factors\n")
        toy.edit("book/weaving.md", "```{code-cell}", CELL_TO_STDERR + "```{code-cell}")
        capsys.readouterr()
        assert toy.sync() == 1
        assert set(capsys.readouterr().err.split("\n")) == {
            "",
            "book/scale.md, code cell 3 ('Scale().factors'): AttributeError: 'Scale'"
            " object has no attribute 'factors'",
            "book/weaving.md: code cell 1 writes to stderr: UserWarning: careful",
        }
        assert (toy.book / "scale.ipynb").read_bytes() == before
        assert sorted(p.suffix for p in toy.book.iterdir()) == [
            ".ipynb",
            ".ipynb",
            ".md",
            ".md",
        ]

    def test_a_chapter_that_is_not_asked_for_does_not_fail_the_command(
        self, toy, capsys
    ):
        toy.write(broken="\n# B\n\n```{code-cell}\n:tags: [export]\nx = 1\n```\n")
        assert toy.sync("weaving") == 0
        shown = capsys.readouterr()
        assert shown.out == "executed book/weaving.ipynb: asked for\n"
        assert "book/broken.md, code cell 1 ('x = 1')" in shown.err
        assert toy.sync("broken") == 1

    def test_a_lab_is_executed_where_its_data_are(self, tmp_path, monkeypatch, capsys):
        book = Book(tmp_path).write(lab=NEEDS_DATA + LAB)
        monkeypatch.delenv(sync.DATA, raising=False)
        missing = (
            "left stale: book/lab.ipynb: there is no notebook\n"
            "not executed: lab lab needs data that are not here: {} (set"
            " MTL_ANNOTATED_DATA to a folder that holds them)\n"
        )
        assert book.sync() == 0
        assert capsys.readouterr().out == missing.format("toys, bricks")
        assert book.check() == {"lab": "stale: book/lab.ipynb: there is no notebook"}
        (tmp_path / "data").mkdir()
        (tmp_path / "data/Toys.csv").touch()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(sync.DATA, "data")
        assert book.sync() == 0
        assert capsys.readouterr().out == missing.format("bricks")
        (tmp_path / "data/bricks").mkdir()
        book.edit(
            "book/lab.md", 'os.path.abspath("../data")', f"{str(tmp_path / 'data')!r}"
        )
        assert book.sync() == 0
        assert book.check() == {}
        (output,) = code(book.notebook("lab"))[0].outputs
        assert output.text == "[] True\n"

        notebook = book.notebook("lab")
        notebook.metadata.mtl_annotated.executed_from.modules = {"tasks": "old"}
        nbformat.write(notebook, book.book / "lab.ipynb")
        why = "tasks changed since it was executed"
        assert book.check() == {"lab": f"stale: book/lab.ipynb: {why}"}
        monkeypatch.delenv(sync.DATA)
        capsys.readouterr()
        assert book.check() == {}
        assert capsys.readouterr().out.startswith(f"left stale ({why}): lab lab needs")


CELL_TO_STDERR = """\
```{code-cell} ipython3
import sys

print("UserWarning: careful", file=sys.stderr)
```

"""


def nbval(folder, package, *items):
    """Outcome of every item that nbval ran: (notebook, item) -> (outcome, message)."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "tools.agreement", "--nbval", "-q"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {k: v for k, v in os.environ.items() if k != sync.DATA}
    environment["PYTHONPATH"] = str(package.parent)
    done = subprocess.run(
        [*command, "--rootdir", folder, "-c", "/dev/null", *(items or [folder])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        notebook = case.get("classname", "").split(".")[0]
        found = [
            child for child in case if child.tag in ("failure", "error", "skipped")
        ]
        message = "".join(f"{f.get('message')}\n{f.text}" for f in found)
        outcome = found[0].tag if found else "passed"
        outcomes.setdefault(notebook, {})[case.get("name")] = (outcome, message)
    return outcomes


def failed(outcomes):
    return [name for name, (outcome, _) in outcomes.items() if outcome != "passed"]


@pytest.fixture(scope="session")
def outcomes(executed, tmp_path_factory):
    """One run of nbval over copies of a notebook, each damaged in its own way."""
    folder = tmp_path_factory.mktemp("damaged")

    def damaged(name):
        def store(change):
            notebook = executed.notebook("scale")
            change(notebook, code(notebook))
            nbformat.write(notebook, folder / f"{name}.ipynb")

        return store

    @damaged("untouched")
    def _(notebook, cells):
        pass

    @damaged("within")
    def _(notebook, cells):
        cells[4].outputs[0].text = "total 0.10000000001\nrows 4\n"
        table = cells[5].outputs[0].data
        assert "<td>1.000000e-01</td>" in table["text/html"]
        table["text/html"] = table["text/html"].replace("1.000000e-01", "0.10000000001")

    @damaged("beyond")
    def _(notebook, cells):
        cells[4].outputs[0].text = "total 0.100001\nrows 4\n"

    @damaged("count")
    def _(notebook, cells):
        cells[4].outputs[0].text = "total 0.1\nrows 5\n"

    @damaged("result")
    def _(notebook, cells):
        cells[2].outputs[0].data["text/plain"] = "4"

    @damaged("table")
    def _(notebook, cells):
        table = cells[5].outputs[0].data
        table["text/html"] = table["text/html"].replace("1.000000e-01", "1.000010e-01")

    @damaged("words")
    def _(notebook, cells):
        cells[4].outputs[0].text = "sum 0.1\nrows 4\n"

    @damaged("missing")
    def _(notebook, cells):
        cells[4].outputs = []

    @damaged("exported")
    def _(notebook, cells):
        cells[3].source = cells[3].source.replace("1 / 3", "1 / 4")

    @damaged("unexecuted")
    def _(notebook, cells):
        for cell in cells:
            cell.execution_count, cell.outputs = None, []

    @damaged("disorder")
    def _(notebook, cells):
        cells[0].execution_count, cells[1].execution_count = 2, 1

    @damaged("error")
    def _(notebook, cells):
        cells[2].source = "1 / 0"
        cells[2].outputs = [
            new_output("error", ename="ZeroDivisionError", evalue="no", traceback=[])
        ]

    @damaged("warning")
    def _(notebook, cells):
        cells[2].source = "import sys\nprint('careful', file=sys.stderr)\n3"

    @damaged("lab")
    def _(notebook, cells):
        notebook.metadata["mtl_annotated"]["needs_data"] = ["bricks"]

    return nbval(folder, executed.package)


@pytest.mark.slow
class TestNbval:
    """`Cell 0` is the first code cell; `stored` looks at the notebook as it lies."""

    @pytest.mark.parametrize("name", ["untouched", "within", "warning"])
    def test_passes(self, outcomes, name):
        assert list(outcomes[name]) == ["stored", *(f"Cell {i}" for i in range(7))]
        assert failed(outcomes[name]) == []

    @pytest.mark.parametrize(
        ("name", "items"),
        [
            ("beyond", ["Cell 4"]),
            ("count", ["Cell 4"]),
            ("result", ["Cell 2"]),
            ("table", ["Cell 5"]),
            ("words", ["Cell 4"]),
            ("missing", ["Cell 4"]),
            ("exported", ["Cell 4", "Cell 5"]),
            ("unexecuted", ["stored"]),
            ("disorder", ["stored"]),
            ("error", ["stored", "Cell 2"]),
        ],
    )
    def test_fails(self, outcomes, name, items):
        assert failed(outcomes[name]) == items

    def test_says_what_differs(self, outcomes):
        _, message = outcomes["beyond"]["Cell 4"]
        assert "total 0.100001" in message
        assert "total 0.1\n" in message.replace("\\n", "\n")

    def test_a_lab_without_its_data(self, outcomes):
        lab = outcomes["lab"]
        assert lab.pop("stored")[0] == "passed"
        for outcome, message in lab.values():
            assert outcome == "skipped"
            assert "lab lab needs data that are not here: bricks" in message


class TestPackaged:
    def test_cells_that_import_what_they_defined(self, executed):
        notebook = sync.packaged(executed.notebook("scale"), "scale", "toys")
        assert [cell.source for cell in code(notebook)][:4] == [
            "import math\nfrom toys.scale import FACTOR",
            "from toys.scale import Scale",
            "Scale().factor",
            "from toys.scale import Scale, third",
        ]
        assert code(notebook)[4:] == code(executed.notebook("scale"))[4:]
        shown = [cell.outputs for cell in code(notebook)]
        assert shown == [cell.outputs for cell in code(executed.notebook("scale"))]

    def test_add_to_stays_where_the_rest_needs_it(self, toy):
        toy.edit("book/scale.md", "Scale().factor\n", "class A: pass\nadd_to(A)\n")
        notebook = sync.packaged(
            sync.woven("scale", toy.book, toy.package), "scale", "toys"
        )
        assert code(notebook)[0].source == (
            "import math\nfrom toys.weaving import add_to\nfrom toys.scale import FACTOR"
        )

    @pytest.mark.slow
    def test_runs_against_the_package(self, toy, tmp_path):
        assert toy.sync("--packaged", str(tmp_path / "same"), "scale") == 0
        same = nbval(tmp_path / "same", toy.package)["scale"]
        assert failed(same) == []
        # A package that differs from the chapter, in the smallest way.
        toy.edit("toys/scale.py", "self.factor * x", "self.factor + x")
        other = nbval(tmp_path / "same", toy.package)["scale"]
        assert failed(other) == ["Cell 4", "Cell 5"]

    def test_the_tangler_sees_it_too(self, toy):
        toy.edit("toys/scale.py", "self.factor * x", "self.factor + x")
        assert (
            "+        return self.factor * x"
            in tangle.check([], toy.book, toy.package)["scale"]
        )


@pytest.mark.slow
def test_cells_run_together_and_in_order(executed, tmp_path):
    nbformat.write(executed.notebook("scale"), tmp_path / "scale.ipynb")
    outcomes = nbval(tmp_path, executed.package, f"{tmp_path}/scale.ipynb::Cell 4")[
        "scale"
    ]
    assert failed(outcomes) == ["Cell 4"]
    assert "cell 0 has not run in this process" in outcomes["Cell 4"][1]


NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


class TestThisBook:
    def test_every_module_is_what_its_chapter_holds(self):
        assert tangle.check([]) == {}

    def test_every_notebook_is_what_its_chapter_holds(self):
        assert sync.check() == {}

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
    def test_stored(self, path: Path):
        assert sync.problems(nbformat.read(path, as_version=4)) == []
