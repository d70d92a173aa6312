"""A file of results that can be continued: one line a case, CSV or JSON lines."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mtl_annotated as mtl

Line = dict[str, Any]
# What tells one case from another; a case without one of them leaves it out.
KEY = (
    "suite",
    "case",
    "model",
    "batch_size",
    "library",
    "seed",
    "experts",
    "tasks",
    "variant",
    "vocabulary",
    "ids",
    "size",
)
# What a line was measured with: where one of these has changed, it is measured again.
MADE_WITH = (
    "version",
    "framework",
    "python",
    "limit",
    "repeats",
    "threads",
    "cores",
    "system",
    "code",
)
HEADER = "# written by python -m benchmarks, a line a case\n"
FIRST = (*KEY, "version", "rows_per_second", "ratio_to_floor", "ours_over_this")


def as_text(line: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Some values of a line as text, because CSV keeps no types."""
    values = (line.get(name) for name in names)
    return tuple("" if value is None else str(value) for value in values)


def key(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What identifies a line."""
    return as_text(line, KEY)


def code() -> str:
    """A digest of the code that is timed and of the code that times it.

    Comments, docstrings and layout do not count.
    """
    package, own = Path(mtl.__file__).parent, Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *own.glob("**/*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and is_text(body[0]):
                body[0] = ast.Pass()
        found.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()[:12]


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, or any other string that nobody reads."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class Store:
    """The lines so far. `path` may be None: then nothing is kept between runs.

    Raises: ValueError for a file that ends neither in .csv nor in .jsonl, that is in no
    folder, or that has other lines than these.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: dict[tuple[str, ...], Line] = {}
        if path is None:
            return
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"--out: expected a name in .csv or .jsonl, found {path}")
        if not path.parent.is_dir():
            raise ValueError(f"--out: there is no folder {path.parent}")
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in file if not row.startswith("#")]
            found = (
                csv.DictReader(rows)
                if path.suffix == ".csv"
                else map(json.loads, filter(str.strip, rows))
            )
            for line in found:
                if "suite" not in line:
                    raise ValueError(
                        f"--out: {path} is no file of results: expected a column"
                        f" 'suite', found {', '.join(map(str, line))}"
                    )
                self.lines[key(line)] = {k: v for k, v in line.items() if v != ""}

    def kept(self, line: Mapping[str, Any]) -> Line | None:
        """The line of the same case, if there is one, conclusive or not."""
        return self.lines.get(key(line))

    def changed(self, line: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """What the kept line was measured with, and what it would be now."""
        found = self.kept(line) or line
        pairs = zip(as_text(found, MADE_WITH), as_text(line, MADE_WITH), strict=True)
        named = zip(MADE_WITH, pairs, strict=True)
        return {name: pair for name, pair in named if pair[0] != pair[1]}

    def done(self, line: Mapping[str, Any]) -> bool:
        """Whether there is a conclusive line of the same case, made in the same way."""
        found = self.kept(line)
        if found is None or str(found.get("conclusive")) == "False":
            return False
        return not self.changed(line)

    def put(self, line: Line) -> None:
        """Keep a line in place of an older one, and replace the file at once."""
        self.lines[key(line)] = line
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            if self.path.suffix == ".csv":
                every = dict.fromkeys(n for line in self.lines.values() for n in line)
                names = dict.fromkeys(n for n in (*FIRST, *every) if n in every)
                file.write(HEADER)
                writer = csv.DictWriter(file, list(names), lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.lines.values())
            else:
                file.writelines(json.dumps(each) + "\n" for each in self.lines.values())
        os.replace(partial, self.path)
