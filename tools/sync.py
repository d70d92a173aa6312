"""Keep every chapter, its module and its executed notebook in step.

    python -m tools.sync                      tangles all, executes what is stale
    python -m tools.sync mmoe cgc             executes these in any case
    python -m tools.sync --check              says what is stale, and exits 1
    python -m tools.sync --packaged FOLDER    writes notebooks that import the package
                                              where the chapters build it

`book/<name>.md` is the source, `book/<name>.ipynb` the same cells with their outputs.
Notebooks are compared by what they hold, never by time stamps. A chapter is executed
again when its code or a module that it imports has changed; a change of prose alone
keeps the outputs.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ipykernel.kernelspec
import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from traitlets import default

from tools import tangle
from tools.tangle import BOOK, PACKAGE, TangleError

DATA = "MTL_ANNOTATED_DATA"
WHOLE_CLASS = re.compile(r"^<!-- whole class: (\w+) -->$", re.MULTILINE)
# nbval leaves a cell with one of these unchecked; in this book every cell is.
UNCHECKED = re.compile(
    r"nbval[-_](skip|ignore[-_]output|raises[-_]exception)"
    r"|raises-exception|pytest[-_]validate[-_]ignore[-_]output",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
MODULES_CHANGED = " changed since it was executed"
WIDGET = "application/vnd.jupyter.widget-view+json"


class SyncError(Exception):
    """A chapter that cannot be executed and stored; the message names the cell."""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def woven(name: str, book: Path = BOOK, package: Path = PACKAGE) -> NotebookNode | None:
    """The notebook that a chapter stands for, not yet executed; None for a plain page."""
    path = book / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="md:myst")
    if not code_cells(notebook) and "kernelspec" not in notebook.metadata:
        return None
    if "text_representation" not in text.split("\n---\n")[0]:
        raise SyncError(
            f"{book.name}/{name}.md: the header lacks jupytext: text_representation"
        )
    chapter = tangle.as_chapter(
        notebook, name=name, file=f"{book.name}/{name}.md", package=package.name
    )
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and WHOLE_CLASS.search(cell.source):
            cell.source = WHOLE_CLASS.sub(
                lambda match: fold(match[1], chapter), cell.source
            )
        # An id that depends on the cell alone, so that a notebook's diff stays small.
        key = digest(cell.cell_type + cell.source)[:8]
        seen[key] = seen.get(key, 0) + 1
        cell.id = key if seen[key] == 1 else f"{key}-{seen[key]}"
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def fold(name: str, chapter: tangle.Chapter) -> str:
    """The source of a whole class as the module has it, folded."""
    module = tangle.tangle(chapter) or ""
    classes = {
        node.name: node
        for node in ast.parse(module).body
        if isinstance(node, ast.ClassDef)
    }
    if name not in classes:
        raise SyncError(
            f"{chapter.file}: whole class: the chapter exports no class {name};"
            f" it has {', '.join(classes) or 'none'}"
        )
    start, end = tangle.first_line(classes[name]) - 1, classes[name].end_lineno
    code = "\n".join(module.split("\n")[start:end])
    return (
        f"<details><summary>The whole class so far: {name}</summary>\n\n"
        f"```python\n{code}\n```\n\n</details>"
    )


def imported(source: str, package: str) -> set[str]:
    """The package's modules that a piece of code imports ("" is the package itself)."""
    plain = "\n".join(
        "pass" if re.match(r"[%!]", line) else line for line in source.split("\n")
    )
    try:
        tree = ast.parse(plain)
    except SyntaxError:
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.add(f"{package}.{node.module}" if node.module else package)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    mine = {tuple(n.split(".")) for n in names if n.split(".")[0] == package}
    return {parts[1] if len(parts) > 1 else "" for parts in mine}


def without_words(module: str) -> str:
    """A module without comment lines and docstring, which change with the prose."""
    tree, lines = ast.parse(module), module.split("\n")
    start = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    return "\n".join(ln for ln in lines[start:] if not ln.lstrip().startswith("#"))


def modules_behind(notebook: NotebookNode, package: Path = PACKAGE) -> dict[str, str]:
    """Digest of every module that a notebook imports, directly or through another."""
    todo = {
        name
        for cell in code_cells(notebook)
        for name in imported(cell.source, package.name)
    }
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        path = package / f"{name or '__init__'}.py"
        if name in found or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        found[name] = digest(without_words(text))
        todo |= imported(text, package.name)
    return {name or "__init__": found[name] for name in sorted(found)}


def executed_from(notebook: NotebookNode, package: Path = PACKAGE) -> dict[str, Any]:
    """What the outputs of a notebook depend on."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return {"code": digest(code), "modules": modules_behind(notebook, package)}


def stored(name: str, book: Path = BOOK) -> NotebookNode | None:
    path = book / f"{name}.ipynb"
    return nbformat.read(path, as_version=4) if path.exists() else None


def problems(notebook: NotebookNode) -> list[str]:
    """What a stored notebook must not hold, or must and does not."""
    cells = code_cells(notebook)
    wrong = []
    for number, cell in enumerate(cells, 1):
        if cell.execution_count is None:
            wrong.append(f"code cell {number} has not been executed")
        elif cell.execution_count != number:
            wrong.append(
                f"code cell {number} has execution count {cell.execution_count}: the"
                " cells were not executed in order, in one go"
            )
        wrong += [f"code cell {number} {why}" for why in cell_problems(cell)]
    if "widgets" in notebook.metadata:
        wrong.append("the metadata hold the state of widgets")
    if "version" in notebook.metadata.get("language_info", {}):
        wrong.append("the metadata hold the version of Python")
    return wrong


def cell_problems(cell: NotebookNode) -> Iterator[str]:
    """What is wrong with a stored code cell, whenever it was executed."""
    if "execution" in cell.metadata:
        yield "stores the time of its execution"
    tags = " ".join(cell.metadata.get("tags", []))
    if marker := UNCHECKED.search(f"{tags}\n{cell.source}"):
        yield f"would not be compared: {marker[0]}"
    if tangle.exported(cell) and cell.outputs:
        yield "is exported, and prints"
    if len(merged(cell.outputs)) != len(cell.outputs):
        yield "stores a stream in pieces"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"stores an error: {output.ename}: {output.evalue}"
        if output.get("name") == "stderr":
            yield f"writes to stderr: {output.text.strip().split(chr(10))[0]}"
        if WIDGET in output.get("data", {}):
            yield "shows a widget, which a page cannot"
        if address := ADDRESS.search(str(text_of(output))):
            yield f"prints a memory address: {address[0]}"


def merged(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The same outputs, pieces of a stream that follow each other made one."""
    whole: list[NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            whole[-1] = NotebookNode(output, text=last["text"] + output.text)
        else:
            whole.append(output)
    return whole


def text_of(output: NotebookNode) -> str:
    """The text of an output, without pictures."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def same_text(expected: NotebookNode, actual: NotebookNode) -> str | None:
    """The first difference between two notebooks apart from outputs, or None."""

    def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
        copy = json.loads(json.dumps(metadata))
        copy.get("mtl_annotated", {}).pop("executed_from", None)
        return {key: value for key, value in copy.items() if value != {}}

    pairs = zip(expected.cells, actual.cells, strict=False)
    for number, (mine, theirs) in enumerate(pairs, 1):
        for key in ("cell_type", "source", "id"):
            if mine[key] != theirs.get(key):
                return f"the {key} of cell {number} differs"
        if plain(mine.metadata) != plain(theirs.metadata):
            return f"the metadata of cell {number} differ"
    if len(expected.cells) != len(actual.cells):
        return f"it has {len(actual.cells)} cells, not {len(expected.cells)}"
    if plain(expected.metadata) != plain(actual.metadata):
        return "its metadata differ"
    return None


@dataclass(frozen=True)
class State:
    """A chapter beside its stored notebook."""

    name: str
    expected: NotebookNode
    actual: NotebookNode | None
    execute: str | None  # why it must be executed again
    reweave: str | None  # why it must at least be written again


def state(name: str, book: Path = BOOK, package: Path = PACKAGE) -> State | None:
    """Is a chapter's notebook stale, and if so why? None for a plain page."""
    expected = woven(name, book, package)
    if expected is None:
        return None
    actual = stored(name, book)
    if actual is None:
        return State(name, expected, None, "there is no notebook", None)
    execute = None
    was = actual.metadata.get("mtl_annotated", {}).get("executed_from", {})
    now = executed_from(expected, package)
    if [c.source for c in code_cells(expected)] != [
        c.source for c in code_cells(actual)
    ]:
        execute = "the code of chapter and notebook differs"
    elif was.get("code") != now["code"]:
        execute = "the code is not the one that was executed"
    elif was.get("modules") != now["modules"]:
        before = was.get("modules", {})
        names = sorted(
            key
            for key in {*before, *now["modules"]}
            if before.get(key) != now["modules"].get(key)
        )
        execute = f"{', '.join(names)}{MODULES_CHANGED}"
    elif wrong := problems(actual):
        execute = wrong[0]
    return State(name, expected, actual, execute, same_text(expected, actual))


def missing_data(metadata: Mapping[str, Any]) -> list[str]:
    """Which of the data sets that a lab names are not there."""
    needs = metadata.get("mtl_annotated", {}).get("needs_data", [])
    folder = os.environ.get(DATA)
    if not needs or not folder or not Path(folder).is_dir():
        return list(needs)
    here = [path.name.lower() for path in Path(folder).iterdir()]
    return [name for name in needs if not any(f.startswith(name.lower()) for f in here)]


def why_skipped(name: str, missing: Sequence[str]) -> str:
    return (
        f"lab {name} needs data that are not here: {', '.join(missing)}"
        f" (set {DATA} to a folder that holds them)"
    )


class OwnPython(KernelSpecManager):
    """Every kernel's name stands for the interpreter that runs this."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            resource_dir=ipykernel.kernelspec.RESOURCES,
            **ipykernel.kernelspec.get_kernel_dict(),
        )


class OwnKernel(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _own_python(self) -> OwnPython:
        return OwnPython()


@contextlib.contextmanager
def empty_folder(package: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder to run a notebook in, and the environment: just the package is added."""
    with tempfile.TemporaryDirectory(prefix="chapter-") as base:
        here, path = Path(base, "here"), Path(base, "path")
        here.mkdir()
        path.mkdir()
        (path / package.name).symlink_to(package.resolve(), target_is_directory=True)
        environment = dict(os.environ, PYTHONPATH=str(path))
        if folder := environment.get(DATA):
            environment[DATA] = str(Path(folder).resolve())
        yield here, environment


def execute(text: str, file: str, package: Path = PACKAGE, timeout: int = 600) -> str:
    """Run a woven notebook (JSON) in an empty folder; return it with its outputs."""
    notebook = nbformat.reads(text, as_version=4)
    cells = code_cells(notebook)
    origin = executed_from(notebook, package)
    with empty_folder(package) as (folder, environment):
        client = NotebookClient(
            notebook,
            kernel_manager_class=OwnKernel,
            timeout=timeout,
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(folder)}},
        )
        try:
            client.execute(env=environment, stderr=subprocess.DEVNULL)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise SyncError(f"{file}, {last_words(cells, error)}") from None
    for cell in cells:
        cell.outputs = merged(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.setdefault("mtl_annotated", {})["executed_from"] = origin
    if wrong := problems(notebook):
        raise SyncError(f"{file}: {'; '.join(wrong)}")
    return nbformat.writes(notebook, version=4)


def last_words(cells: Sequence[NotebookNode], error: Exception) -> str:
    """Which cell failed, and how."""
    number, cell = next(
        (number, cell)
        for number, cell in reversed([*enumerate(cells, 1)])
        if cell.execution_count is not None or number == 1
    )
    why = type(error).__name__
    if isinstance(error, CellExecutionError):
        why = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        number, cell = number + 1, cells[number] if number < len(cells) else cell
        why = "it takes too long"
    first = cell.source.strip().split("\n")[0]
    return f"code cell {number} ({first!r}): {why}"


def rewoven(now: State) -> str:
    """New prose around the outputs of a notebook whose code has not changed."""
    assert now.actual is not None
    notebook = nbformat.from_dict(now.expected)
    for new, old in zip(code_cells(notebook), code_cells(now.actual), strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    origin = now.actual.metadata["mtl_annotated"]["executed_from"]
    notebook.metadata.setdefault("mtl_annotated", {})["executed_from"] = origin
    return nbformat.writes(notebook, version=4)


def packaged(
    notebook: NotebookNode, name: str, package: str = "mtl_annotated"
) -> NotebookNode:
    """The same notebook, its exported cells importing what they would define."""
    notebook = nbformat.from_dict(notebook)
    shown = "\n".join(c.source for c in code_cells(notebook) if not tangle.exported(c))
    chapter = tangle.as_chapter(notebook, name=name, file=name)
    replaced = iter(chapter.cells)
    for cell in code_cells(notebook):
        if tangle.exported(cell):
            keep_add_to = re.search(r"\badd_to\b", shown) is not None
            cell.source = in_its_place(next(replaced), name, package, keep_add_to)
    return notebook


def in_its_place(cell: tangle.Cell, name: str, package: str, keep_add_to: bool) -> str:
    """The imports that stand for an exported cell."""
    lines: list[str] = []
    names: dict[str, None] = {}
    for part in tangle.statements(cell):
        if isinstance(part.node, ast.ImportFrom):
            node = part.node
            node.names = [a for a in node.names if keep_add_to or a.name != "add_to"]
            lines += [ast.unparse(node)] if node.names else []
        elif isinstance(part.node, ast.Import) or tangle.is_type_checking(part.node):
            lines += part.lines
        elif added := tangle.addition(part):
            names[added.cls] = None
        else:
            names |= dict.fromkeys(tangle.defines(part.node))
    if names:
        lines.append(f"from {package}.{name} import {', '.join(names)}")
    return "\n".join(lines) or "pass"


def store(name: str, text: str, folder: Path):
    tangle.write(folder / f"{name}.ipynb", text.rstrip("\n") + "\n")


def write_packaged(
    folder: Path, names: Sequence[str] = (), book: Path = BOOK, package: Path = PACKAGE
) -> None:
    """Write the stored notebooks with the package in place of their exported cells."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or tangle.chapter_names(book):
        if (notebook := stored(name, book)) is not None:
            notebook = packaged(notebook, name, package.name)
            store(name, nbformat.writes(notebook, version=4), folder)


def states(
    names: Sequence[str], book: Path = BOOK, package: Path = PACKAGE
) -> tuple[list[State], dict[str, str]]:
    """How the chapters stand, and what is wrong with those that cannot be woven."""
    found, wrong = [], {}
    for name in names or tangle.chapter_names(book):
        try:
            now = state(name, book, package)
        except (TangleError, SyncError) as error:
            wrong[name] = str(error)
        else:
            found += [now] if now else []
    return found, wrong


def check(
    names: Sequence[str] = (), book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """Which notebooks are stale: chapter -> why."""
    found, wrong = states(names, book, package)
    for now in found:
        if not (why := now.execute or now.reweave):
            continue
        missing = missing_data(now.expected.metadata)
        if missing and why.endswith(MODULES_CHANGED):
            # Its cells are the chapter's; only who has the data can run them again.
            print(f"left stale ({why}): {why_skipped(now.name, missing)}")
            continue
        wrong[now.name] = f"stale: {book.name}/{now.name}.ipynb: {why}"
    pages = {path.stem for path in book.glob("*.md")}
    for path in sorted(book.glob("*.ipynb")):
        if path.stem not in pages and not names:
            wrong[path.stem] = f"stale: {book.name}/{path.name}: it has no chapter"
    return wrong


def sync(
    names: Sequence[str] = (), book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """Tangle everything, execute the chapters that are stale or named, and store them.

    Returns what went wrong: chapter -> why.
    """
    wrong = tangle.write_modules([], book, package)
    found, unwoven = states(names, book, package)
    wrong |= unwoven
    todo: dict[str, State] = {}
    for now in found:
        missing = missing_data(now.expected.metadata)
        if (now.execute or names) and not missing:
            todo[now.name] = now
        elif now.execute:
            print(f"left stale: {book.name}/{now.name}.ipynb: {now.execute}")
        elif now.reweave:
            store(now.name, rewoven(now), book)
            print(f"rewove {book.name}/{now.name}.ipynb: {now.reweave}")
        if missing and (now.execute or names):
            print(f"not executed: {why_skipped(now.name, missing)}")
    return wrong | execute_all(todo, book, package)


def execute_all(
    todo: Mapping[str, State], book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """Execute chapters, two at a time, and store those that succeed."""
    wrong: dict[str, str] = {}
    if not todo:
        return wrong
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(
                execute,
                nbformat.writes(now.expected),
                f"{book.name}/{name}.md",
                package,
            ): now
            for name, now in todo.items()
        }
        for future in as_completed(running):
            now = running[future]
            try:
                store(now.name, future.result(), book)
            except SyncError as error:
                wrong[now.name] = str(error)
            else:
                why = now.execute or "asked for"
                print(f"executed {book.name}/{now.name}.ipynb: {why}", flush=True)
    return wrong


def main(
    arguments: Sequence[str] | None = None, book: Path = BOOK, package: Path = PACKAGE
) -> int:
    parser = tangle.command("sync", __doc__)
    parser.add_argument("--packaged", type=Path, metavar="FOLDER")
    options = tangle.parse(parser, arguments, book)
    if options.packaged:
        write_packaged(options.packaged, options.names, book, package)
        return 0
    if options.check:
        wrong = tangle.check(options.names, book, package)
        stale = check(options.names, book, package)
        wrong |= {f"{name}.ipynb": why for name, why in stale.items()}
        failed = bool(wrong)
    else:
        wrong = sync(options.names, book, package)
        # Of a chapter that was not asked for, trouble is told and does not fail.
        failed = any(not options.names or name in options.names for name in wrong)
    for why in dict.fromkeys(wrong.values()):
        print(why, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
