"""Run the long experiment of a chapter, and store its rows in the package.

    python -m tools.experiments esmm       runs what is missing, and stores it
    python -m tools.experiments --check    says which stored rows other cells made

The experiment is the chapter's cells with the tag `experiment`: nothing else of the
chapter is executed. They define `settings()`, a list of dictionaries, and
`run(**setting)`, which gives a list of rows, dictionaries of numbers and texts. Every
row is stored beside its setting in `mtl_annotated/results/<chapter>.csv`. The file's
first line says by which cells and versions it was made. After an interruption the same
command goes on with the settings that are not stored yet; rows that other cells or
versions made are never mixed with new ones.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import numpy as np
import pandas as pd
import torch

from tools import tangle
from tools.sync import code_cells, digest
from tools.tangle import BOOK, PACKAGE

HEADER = re.compile(
    r"# cells (?P<cells>[0-9a-f]{16}), (?P<versions>torch .+, numpy .+)"
)

MEASURED = "# written by python -m benchmarks"


class ExperimentError(Exception):
    """An experiment that cannot run or be continued; the message names the chapter."""


def experiment_cells(name: str, book: Path = BOOK) -> list[str]:
    """The sources of a chapter's cells with the tag `experiment`, in order."""
    text = (book / f"{name}.md").read_text(encoding="utf-8")
    found = []
    for number, cell in enumerate(code_cells(jupytext.reads(text, fmt="md:myst")), 1):
        if "experiment" not in cell.metadata.get("tags", []):
            continue
        if tangle.exported(cell):
            raise ExperimentError(
                f"{book.name}/{name}.md, code cell {number}: tagged both export and"
                " experiment, expected one of them"
            )
        found.append(cell.source)
    return found


def cells_digest(cells: Sequence[str]) -> str:
    """What identifies the code of an experiment."""
    return digest("\0".join(cells))


def loaded(name: str, cells: Sequence[str], book: Path = BOOK) -> dict[str, Any]:
    """The names that the experiment's cells define, executed by themselves."""
    file = f"{book.name}/{name}.md"
    if not cells:
        raise ExperimentError(f"{file} has no cells with the tag experiment")
    namespace: dict[str, Any] = {"__name__": f"experiment_{name}"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"{file}, experiment cell {number}", "exec"), namespace)
    if missing := [each for each in ("settings", "run") if each not in namespace]:
        raise ExperimentError(
            f"{file}: the experiment cells define no {' and no '.join(missing)}"
        )
    return namespace


def results_file(name: str, package: Path = PACKAGE) -> Path:
    return package / "results" / f"{name}.csv"


def origin(path: Path) -> dict[str, str]:
    """By which cells and versions a file of results was made."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\n")
    if not (match := HEADER.fullmatch(first)):
        raise ExperimentError(
            f"{path}: expected a first line '# cells ...', found {first!r}"
        )
    return match.groupdict()


def here(cells: Sequence[str]) -> dict[str, str]:
    """By which cells and versions a file written now would be made."""
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    return {"cells": cells_digest(cells), "versions": versions}


def resumed(path: Path, now: dict[str, str]) -> pd.DataFrame:
    """The rows stored so far, which must be of the same cells and versions."""
    if not path.exists():
        return pd.DataFrame()
    for what, found in origin(path).items():
        if found != now[what]:
            raise ExperimentError(
                f"{path}: made by the {what} {found!r}, now they are {now[what]!r};"
                " delete the file to start again"
            )
    return pd.read_csv(path, comment="#")


def store(path: Path, rows: pd.DataFrame, now: dict[str, str]) -> None:
    """Replace the file at once, so that no setting is ever stored in part."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# cells {now['cells']}, {now['versions']}\n")
        rows.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    os.replace(partial, path)


def missing_settings(
    settings: Sequence[dict[str, Any]], rows: pd.DataFrame
) -> list[dict[str, Any]]:
    """The settings of which no row is stored."""
    if rows.empty:
        return list(settings)
    names = list(settings[0])
    done = set(rows[names].itertuples(index=False, name=None))
    return [setting for setting in settings if tuple(setting.values()) not in done]


def carry_out(name: str, book: Path = BOOK, package: Path = PACKAGE) -> Path:
    """Run every setting of a chapter that is not stored, storing after each."""
    torch.set_num_threads(1)
    cells = experiment_cells(name, book)
    experiment, now = loaded(name, cells, book), here(cells)
    path = results_file(name, package)
    rows = resumed(path, now)
    settings = experiment["settings"]()
    todo = missing_settings(settings, rows)
    for number, setting in enumerate(todo, len(settings) - len(todo) + 1):
        start = time.perf_counter()
        found = pd.DataFrame([setting | row for row in experiment["run"](**setting)])
        rows = pd.concat([rows, found], ignore_index=True)
        store(path, rows, now)
        told = ", ".join(f"{key} {value}" for key, value in setting.items())
        seconds = time.perf_counter() - start
        print(f"{name} {number}/{len(settings)}: {told} ({seconds:.0f} s)", flush=True)
    return path


def check(
    names: Sequence[str] = (), book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """Which stored results other cells have made: chapter -> why. Runs no cell."""
    wrong = {}
    for name in names or stored_names(package):
        path = results_file(name, package)
        if not path.exists():
            wrong[name] = f"{path} is missing"
            continue
        cells = experiment_cells(name, book) if (book / f"{name}.md").exists() else []
        if origin(path)["cells"] != cells_digest(cells):
            wrong[name] = f"stale: {path}: the chapter's experiment cells have changed"
    return wrong


def stored_names(package: Path = PACKAGE) -> list[str]:
    """The chapters whose results are stored, those of the benchmarks left out."""
    paths = (package / "results").glob("*.csv")
    return sorted(p.stem for p in paths if not p.read_text().startswith(MEASURED))


def main(
    arguments: Sequence[str] | None = None, book: Path = BOOK, package: Path = PACKAGE
) -> int:
    parser = tangle.command("experiments", __doc__)
    options = tangle.parse(parser, arguments, book)
    if options.check:
        wrong = check(options.names, book, package)
        for why in wrong.values():
            print(why, file=sys.stderr)
        return int(bool(wrong))
    if not options.names:
        parser.error("name a chapter to run; an experiment takes many minutes")
    for name in options.names:
        try:
            carry_out(name, book, package)
        except ExperimentError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
