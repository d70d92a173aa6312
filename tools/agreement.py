"""A pytest plugin: nbval compares every stored output, numbers within a tolerance.

    python -m pytest -p tools.agreement --nbval book            the code in the cells
    python -m tools.sync --packaged FOLDER
    python -m pytest -p tools.agreement --nbval FOLDER          the package in its place

To what nbval 0.11 does it adds: numbers compare with `math.isclose`; pictures and
stderr are not compared; a notebook that was never executed, or not in order, or that
stores an error, fails; it runs from an empty folder under this interpreter; a lab whose
data are not here is skipped with a reason. With pytest-xdist use `--dist loadfile`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

from tools.sync import DATA, missing_data, problems, why_skipped

NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
NOT_COMPARED = ("image/svg+xml", "image/png", "image/jpeg", "stderr")


def agree(
    one: str, other: str, *, relative: float = 1e-6, absolute: float = 1e-8
) -> bool:
    """Are two texts the same, their fractional numbers within a tolerance?

    Whole numbers are counts, and compare like all other text: as they stand.
    """
    if one == other:
        return True
    if NUMBER.split(one) != NUMBER.split(other):
        return False
    return all(
        mine == theirs
        or (
            not mine.lstrip("+-").isdecimal()
            and not theirs.lstrip("+-").isdecimal()
            and math.isclose(
                float(mine), float(theirs), rel_tol=relative, abs_tol=absolute
            )
        )
        for mine, theirs in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    )


class Text(str):
    """A text that equals another when both agree: nbval compares with `!=`."""

    relative: float
    absolute: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and agree(
            str(self), str(other), relative=self.relative, absolute=self.absolute
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class Stored(pytest.Item):
    """What can be said of a stored notebook without running it."""

    def runtest(self):
        assert isinstance(self.parent, Notebook)
        if wrong := problems(self.parent.nb):
            pytest.fail("\n".join(wrong), pytrace=False)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}: stored"


class Cell(IPyNbCell):
    """A code cell, executed after those above it and compared with a tolerance."""

    def setup(self):
        if self.parent.missing:
            pytest.skip(why_skipped(self.path.stem, self.parent.missing))
        super().setup()

    def runtest(self):
        if self.cell_num != self.parent.reached:
            self.raise_cell_error(
                f"cell {self.parent.reached} has not run in this process: run a"
                " notebook's cells together and in order (--dist loadfile)"
            )
        self.parent.reached += 1
        super().runtest()

    def sanitize(self, s):
        text = super().sanitize(s)
        if isinstance(text, str):
            text = Text(text)
            text.relative = self.config.getoption("agreement_relative")
            text.absolute = self.config.getoption("agreement_absolute")
        return text


class Notebook(IPyNbFile):
    """A notebook of the book."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_compare += NOT_COMPARED
        self.reached = 0
        self.missing: list[str] = []

    def collect(self) -> Iterator[pytest.Item]:
        cells = [*super().collect()]
        self.missing = missing_data(self.nb.metadata)
        yield Stored.from_parent(self, name="stored")
        for cell in cells:
            yield Cell.from_parent(
                self,
                name=cell.name,
                cell_num=cell.cell_num,
                cell=cell.cell,
                options=cell.options,
            )

    def setup(self):
        if self.missing:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="chapter-")
        self.addfinalizer(self.folder.cleanup)
        self.kernel = RunningKernel(
            CURRENT_ENV_KERNEL_NAME,
            cwd=self.folder.name,
            startup_timeout=self.config.option.nbval_kernel_startup_timeout,
        )
        self.setup_sanitize_files()


def pytest_addoption(parser: pytest.Parser):
    group = parser.getgroup("agreement")
    for name, default in (("relative", 1e-6), ("absolute", 1e-8)):
        group.addoption(
            f"--agreement-{name}",
            type=float,
            default=default,
            help=f"{name} tolerance of a fractional number (default {default})",
        )


def pytest_configure(config: pytest.Config):
    if folder := os.environ.get(DATA):
        os.environ[DATA] = str(Path(folder).resolve())


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    collectors = yield
    return [
        Notebook.from_parent(parent, path=file_path)
        if isinstance(collector, IPyNbFile)
        else collector
        for collector in collectors
    ]
