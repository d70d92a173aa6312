"""Tangle the book: the cells tagged `export` become the package's modules.

    python -m tools.tangle              writes every module
    python -m tools.tangle mmoe cgc     writes these
    python -m tools.tangle --check      says what on disk is stale, and exits 1

`book/<name>.md` becomes `mtl_annotated/<name>.py`: imports hoisted and merged, methods
that later cells add with `@add_to(Class)` moved into their class, comments kept, one
line of provenance above each class and function. What would make the module mean
something else than the notebook is refused with a `TangleError` that names the cell.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import difflib
import json
import os
import re
import subprocess
import symtable
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
PACKAGE = ROOT / "mtl_annotated"

CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
# Python reads these while it makes a class; added afterwards they mean something else.
MADE_WITH_THE_CLASS = {
    "__init__",
    "__new__",
    "__eq__",
    "__init_subclass__",
    "__class_getitem__",
    "__set_name__",
}
# Names that need no definition, in a notebook as in a module.
GIVEN = {*dir(builtins), "__name__", "__doc__", "__class__"}


class TangleError(Exception):
    """A chapter that cannot become a module; the message names file and cell."""


@dataclass(frozen=True)
class Cell:
    """An exported code cell; `number` counts the chapter's code cells from 1."""

    file: str
    number: int
    section: str | None
    source: str

    def refuse(self, why: str) -> TangleError:
        first = next((line for line in self.source.split("\n") if line.strip()), "")
        return TangleError(
            f"{self.file}, code cell {self.number} ({first.strip()!r}): {why}"
        )


@dataclass(frozen=True)
class Chapter:
    """What tangling needs to know of `book/<name>.md`."""

    name: str
    file: str
    title: str
    cells: tuple[Cell, ...]
    package: str = "mtl_annotated"


@dataclass
class Statement:
    """A top-level statement, its lines, and the comments that belong to it."""

    cell: Cell
    node: ast.stmt
    before: list[str]
    lines: list[str]
    after: list[str]
    methods: dict[str, Statement] = field(default_factory=dict)


def headings(markdown: str) -> Iterator[tuple[int, str]]:
    """Level and text of each heading outside fenced code."""
    fence = None
    for line in markdown.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,}|:{3,})", line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and mark[1].startswith(fence or ""):
            fence = None
        elif fence is None and (heading := re.match(r"(#+) +(.+?) *#*$", line)):
            yield len(heading[1]), heading[2]


def exported(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "export" in cell.metadata.get("tags", [])


def as_chapter(
    notebook: NotebookNode, *, name: str, file: str, package: str = "mtl_annotated"
) -> Chapter:
    """The title and the exported cells of a notebook."""
    title, section, number, cells = None, None, 0, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for level, text in headings(cell.source):
                if level == 1:
                    title = title or text
                elif level == 2:
                    section = text
        elif cell.cell_type == "code":
            number += 1
            if exported(cell):
                cells.append(Cell(file, number, section, cell.source))
    return Chapter(name, file, title or name, tuple(cells), package)


def parse_chapter(text: str, **where: str) -> Chapter:
    return as_chapter(jupytext.reads(text, fmt="md:myst"), **where)


def read_chapter(path: Path, package: str = "mtl_annotated") -> Chapter:
    return parse_chapter(
        path.read_text(encoding="utf-8"),
        name=path.stem,
        file=f"{path.parent.name}/{path.name}",
        package=package,
    )


def statements(cell: Cell) -> list[Statement]:
    """Split a cell: comments above a statement lead it, those at the end trail."""
    try:
        body = ast.parse(cell.source).body
    except SyntaxError as error:
        lines = cell.source.split("\n")
        if magic := next((line for line in lines if re.match(r"\s*[%!]", line)), None):
            raise cell.refuse(
                f"exported cells are plain Python, {magic.strip()!r} is notebook magic"
            ) from None
        where = f"line {error.lineno}: {lines[(error.lineno or 1) - 1].strip()!r}"
        raise cell.refuse(f"syntax error in {where}: {error.msg}") from None
    if not body:
        raise cell.refuse("the cell is tagged export, but holds no code")
    lines = cell.source.split("\n")
    parts: list[Statement] = []
    end = 0
    for node in body:
        start = first_line(node) - 1
        if start < end:
            raise cell.refuse(f"two statements on one line: {lines[start].strip()!r}")
        before = comments(lines[end:start], parts)
        end = node.end_lineno or 0
        parts.append(Statement(cell, node, before, lines[start:end], []))
    parts[-1].after = comments(lines[end:], parts)
    return parts


def comments(gap: list[str], above: Sequence[Statement]) -> list[str]:
    """The comments between two statements; indented ones stay in the block above."""
    inside = [row for row, line in enumerate(gap, 1) if re.match(r"\s+#", line)]
    last = inside[-1] if inside and above else 0
    if last:
        above[-1].lines += gap[:last]
    return [line for line in gap[last:] if line.strip()]


def first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def bound(target: ast.AST) -> list[str]:
    """The names that an assignment's target binds."""
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def defines(node: ast.stmt) -> list[str]:
    """The names that a statement of a module or of a class body binds."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    if isinstance(node, IMPORTS):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign):
        return [name for target in node.targets for name in bound(target)]
    if isinstance(node, ast.AnnAssign):
        return bound(node.target)
    return []


def origins(node: ast.stmt) -> dict[str, str]:
    """What each name of an import stands for, to tell a repetition from a clash."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return {}
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    assert isinstance(node, ast.Import)
    return {
        a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
        for a in node.names
    }


def is_constant(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    else:
        return False
    names = [
        element
        for target in targets
        for element in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return all(isinstance(n, ast.Name) and CONSTANT.fullmatch(n.id) for n in names)


def is_type_checking(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.If)
        and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"
        and not node.orelse
        and all(isinstance(inner, IMPORTS) for inner in node.body)
    )


def check_import(
    node: ast.Import | ast.ImportFrom, cell: Cell, chapter: Chapter
) -> None:
    """Refuse the imports that a notebook and a module read differently."""
    own = f"{chapter.package}.{chapter.name}"
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise cell.refuse("a relative import does not work in a notebook")
        modules = [node.module or ""]
        if any(alias.name == "*" for alias in node.names):
            raise cell.refuse(f"name what you import from {node.module}, not *")
        if node.module == "__future__" and node.names[0].name != "annotations":
            raise cell.refuse(f"from __future__ import {node.names[0].name}")
        if any(
            a.name == "add_to" and a.asname not in (None, a.name) for a in node.names
        ):
            raise cell.refuse("import add_to under its own name")
        modules += [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        modules = [alias.name for alias in node.names]
    if own in modules:
        raise cell.refuse(f"the chapter imports itself: {own}")
    if chapter.package in modules:
        raise cell.refuse(
            f"import from the chapter that defines the name ({chapter.package}.<name>),"
            f" not from {chapter.package}, which imports this chapter"
        )


@dataclass(frozen=True)
class Addition:
    """What `@add_to(Class, replace=...)` says."""

    cls: str
    replace: bool
    decorator: ast.expr


def addition(statement: Statement) -> Addition | None:
    """The `add_to` decorator of a statement, if it has one."""
    node, cell = statement.node, statement.cell
    decorators = getattr(node, "decorator_list", [])
    calls = [
        (place, decorator)
        for place, decorator in enumerate(decorators)
        if re.match(r"(\w+\.)*add_to\b", ast.unparse(decorator))
    ]
    if not calls:
        return None
    place, call = calls[0]
    text = f"@{ast.unparse(call)}"
    if not isinstance(node, FUNCTIONS):
        raise cell.refuse(f"{text} adds a method, and this is none")
    if place != 0:
        raise cell.refuse(f"{text} must stand above the other decorators")
    match call:
        case ast.Call(func=ast.Name(id="add_to"), args=[ast.Name(id=cls)], keywords=[]):
            return Addition(cls, False, call)
        case ast.Call(
            func=ast.Name(id="add_to"),
            args=[ast.Name(id=cls)],
            keywords=[ast.keyword(arg="replace", value=ast.Constant(value=bool(yes)))],
        ):
            return Addition(cls, yes, call)
    raise cell.refuse(f"{text} is none of @add_to(Class), @add_to(Class, replace=True)")


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of a class defined inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef):
            yield child
            yield from own_nodes(child)


def check_method(statement: Statement, cls: str):
    """Refuse a method that would mean something else inside its class."""
    node, cell = statement.node, statement.cell
    assert isinstance(node, FUNCTIONS)
    what = f"method {cls}.{node.name}"
    if node.name in MADE_WITH_THE_CLASS:
        raise cell.refuse(f"{what} belongs in the cell of class {cls} itself")
    for inner in own_nodes(node):
        match inner:
            case ast.Call(func=ast.Name(id="super"), args=[]):
                raise cell.refuse(
                    f"{what} calls super() without arguments, which works only in the"
                    f" cell of class {cls} itself"
                )
            case ast.Name(id="__class__"):
                raise cell.refuse(f"{what} uses __class__, which it does not have here")
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.startswith(
                "__"
            ) and not name.endswith("__"):
                raise cell.refuse(
                    f"{what} uses {name}, which Python renames inside a class"
                )


def without_decorator(statement: Statement, decorator: ast.expr) -> list[str]:
    """The lines of a function without its first decorator; a comment on it stays."""
    begin = first_line(statement.node)
    last = (decorator.end_lineno or 0) - begin
    rest = statement.lines[last].encode()[decorator.end_col_offset or 0 :].decode()
    comment = [rest.strip()] if rest.strip() else []
    return comment + statement.lines[last + 1 :]


def inside_strings(source: str) -> set[int]:
    """The lines (from 1) that begin inside a string which is no docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr))
        and id(node) not in docstrings
        for line in range(node.lineno + 1, (node.end_lineno or 0) + 1)
    }


def indented(lines: Sequence[str], width: int) -> list[str]:
    """The lines of a method, moved right; what a string holds stays as it is."""
    fixed = inside_strings("\n".join(lines))
    return [
        line if number in fixed or not line.strip() else " " * width + line
        for number, line in enumerate(lines, 1)
    ]


def without_method(lines: Sequence[str], name: str) -> list[str]:
    """The lines of a class without one of its methods and the comments above it."""
    (cls,) = ast.parse("\n".join(lines)).body
    assert isinstance(cls, ast.ClassDef)
    node = next(n for n in cls.body if isinstance(n, FUNCTIONS) and n.name == name)
    start, end = first_line(node) - 1, node.end_lineno
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return [*lines[:start], *lines[end:]]


def class_lines(statement: Statement) -> list[str]:
    """A class with the methods that later cells add to it."""
    lines, methods = list(statement.lines), statement.methods
    if not methods:
        return lines
    node = statement.node
    assert isinstance(node, ast.ClassDef)
    width, row = node.body[0].col_offset, node.body[0].lineno - first_line(node)
    head, rest = lines[row].encode()[:width], lines[row].encode()[width:]
    if head.strip():  # `class A: pass`
        width = 4
        lines[row : row + 1] = [head.decode().rstrip(), " " * width + rest.decode()]
    for member in node.body:
        for name in defines(member):
            if name in methods:
                lines = without_method(lines, name)
    for method in methods.values():
        text = [*method.before, *method.lines, *method.after]
        lines += ["", *indented(text, width)]
    return lines


class Needs(ast.NodeVisitor):
    """The names that a statement looks up at once, and those it looks up when called.

    Annotations are neither: `from __future__ import annotations` keeps them text.
    """

    def __init__(self, *nodes: ast.AST):
        self.now: set[str] = set()
        self.later: set[str] = set()
        self.names = self.now
        for node in nodes:
            self.visit(node)

    def postponed(self, nodes: Iterable[ast.AST]):
        before, self.names = self.names, self.later
        for node in nodes:
            self.visit(node)
        self.names = before

    def visit_Name(self, node: ast.Name):
        self.names.add(node.id)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = [d for d in node.args.kw_defaults if d is not None]
        for part in [*node.decorator_list, *node.args.defaults, *defaults]:
            self.visit(part)
        self.postponed(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Lambda(self, node: ast.Lambda):
        defaults = [d for d in node.args.kw_defaults if d is not None]
        for part in [*node.args.defaults, *defaults]:
            self.visit(part)
        self.postponed([node.body])

    def visit_AnnAssign(self, node: ast.AnnAssign):
        if node.value is not None:
            self.visit(node.value)


def in_order(parts: Sequence[Statement]) -> list[Statement]:
    """Reading order, except that what a definition needs at once comes before it.

    A class gathers methods from later cells. A constant that stands between class and
    method, and that the method needs for a default value or a decorator, moves up.
    """
    home = {name: i for i, part in enumerate(parts) for name in defines(part.node)}
    needs = [
        Needs(part.node, *(method.node for method in part.methods.values()))
        for part in parts
    ]
    done: list[int] = []
    path: list[int] = []

    def places(names: set[str], me: int) -> list[int]:
        return sorted({home[name] for name in names if name in home} - {me, *done})

    def place(i: int):
        path.append(i)
        for other in places(needs[i].now, i):
            if other in path:
                names = [defines(parts[p].node)[0] for p in path[path.index(other) :]]
                raise parts[i].cell.refuse(
                    f"{names[-1]} needs {names[0]} before it is complete: "
                    + " needs ".join([*names, names[0]])
                )
            if other not in done:
                place(other)
        if len(path) > 1:
            # Moved up, it takes along what it may call and what stood before it.
            for other in places(needs[i].later, i):
                if other < i and other not in path and other not in done:
                    place(other)
        path.pop()
        done.append(i)

    for i in range(len(parts)):
        if i not in done:
            place(i)
    return [parts[i] for i in done]


def free_names(source: str) -> set[str]:
    """The names that a cell looks up and does not itself define."""

    def visit(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            top = table.get_type() == "module"
            made_here = symbol.is_assigned() or symbol.is_imported()
            if symbol.is_referenced() and not made_here if top else symbol.is_global():
                yield symbol.get_name()
        for child in table.get_children():
            yield from visit(child)

    table = symtable.symtable(source, "cell", "exec")
    made = {s.get_name() for s in table.get_symbols() if s.is_assigned()}
    made |= {s.get_name() for s in table.get_symbols() if s.is_imported()}
    return set(visit(table)) - made


def check_names(chapter: Chapter, known: set[str]) -> None:
    """Refuse a name that only the rest of the notebook, or nothing, defines."""
    for cell in chapter.cells:
        parts = statements(cell)
        for part in parts:
            if addition(part) and isinstance(part.node, FUNCTIONS):
                part.node.name = "_"  # a method's name is no name of the module
        source = ast.unparse(ast.Module([part.node for part in parts], []))
        if missing := free_names(source) - known - GIVEN:
            raise cell.refuse(
                f"uses {', '.join(sorted(missing))}, which no exported cell of the"
                " chapter defines or imports"
            )


def ruff(*arguments: str, source: str, file: str) -> str:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache"]
    command += ["--quiet", "--stdin-filename", file, "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise TangleError(f"{file}: ruff: {done.stderr.strip()}")
    return done.stdout


def formatted(source: str, chapter: Chapter) -> str:
    """Sort and merge imports, drop the unused ones, lay the code out."""
    file = f"{chapter.package}/{chapter.name}.py"
    ours = f'lint.isort.known-first-party=["{chapter.package}"]'
    options = ["--fix", "--exit-zero", "--target-version", "py311", "--config", ours]
    source = ruff(
        "check", *options, "--select", "I,F401,PIE790", source=source, file=file
    )
    return ruff("format", "--target-version", "py311", source=source, file=file)


def gather(chapter: Chapter) -> tuple[list[Statement], list[Statement]]:
    """The imports and the definitions of a chapter, each method in its class."""
    imports: list[Statement] = []
    typing_only: list[Statement] = []
    parts: list[Statement] = []
    classes: dict[str, Statement] = {}
    sources: dict[str, str] = {}  # name -> what it stands for
    homes: dict[str, Cell] = {}

    def define(name: str, what: str, cell: Cell):
        if sources.setdefault(name, what) != what or (name in homes and not what):
            raise cell.refuse(
                f"{name} is defined twice, first in code cell {homes[name].number}"
            )
        homes.setdefault(name, cell)

    def define_imports(node: ast.stmt, cell: Cell):
        for name, origin in origins(node).items():
            define(name, origin, cell)

    for cell in chapter.cells:
        for part in statements(cell):
            node = part.node
            for inner in ast.walk(node):
                if isinstance(inner, IMPORTS):
                    check_import(inner, cell, chapter)
            if isinstance(node, IMPORTS):
                define_imports(node, cell)
                if set(origins(node).values()) != {f"{chapter.package}.weaving.add_to"}:
                    imports.append(part)
            elif is_type_checking(node):
                assert isinstance(node, ast.If)
                for inner in node.body:
                    define_imports(inner, cell)
                typing_only.append(part)
            elif added := addition(part):
                add_method(part, added, classes)
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)) or is_constant(node):
                for name in defines(node):
                    define(name, "", cell)
                if isinstance(node, ast.ClassDef):
                    classes[node.name] = part
                parts.append(part)
            else:
                raise cell.refuse(
                    f"{part.lines[0].strip()!r} is not an import, a class, a function"
                    " or an UPPERCASE constant"
                )
    check_names(chapter, set(homes))
    return [*imports, *typing_only], parts


def tangle(chapter: Chapter) -> str | None:
    """The module that a chapter holds, or None where it exports nothing."""
    if not chapter.cells:
        return None
    imports, parts = gather(chapter)
    title = chapter.title.replace("\\", "\\\\").replace('"""', "'''")
    lines = [f'"""{title}', "", f"Chapter: {chapter.file}", '"""', ""]
    lines += ["from __future__ import annotations", ""]
    for part in imports:
        lines += [*part.before, *part.lines, *part.after]
    above: Statement | None = None
    for part in in_order(parts):
        constant = is_constant(part.node)
        if not (
            constant and above and above.cell is part.cell and is_constant(above.node)
        ):
            lines += ["", ""]
        lines += [] if constant else [provenance(chapter, part.cell)]
        lines += [*part.before, *class_lines(part), *part.after]
        above = part
    return formatted("\n".join(lines) + "\n", chapter)


def provenance(chapter: Chapter, cell: Cell) -> str:
    """Where a definition stands in the book; of a title, what precedes its colon."""
    section = f", section '{cell.section}'" if cell.section else ""
    return f"# Chapter '{chapter.title.split(':')[0]}'{section}"


def add_method(part: Statement, added: Addition, classes: dict[str, Statement]):
    """Check a method and put it into its class."""
    (name,), cell = defines(part.node), part.cell
    if added.cls not in classes:
        raise cell.refuse(
            f"@add_to({added.cls}): the chapter exports no class {added.cls} above;"
            f" it has {', '.join(classes) or 'none'}"
        )
    check_method(part, added.cls)
    cls = classes[added.cls]
    assert isinstance(cls.node, ast.ClassDef)
    own = {name: member for member in cls.node.body for name in defines(member)}
    members = {*own, *cls.methods}
    if name in members and not added.replace:
        raise cell.refuse(
            f"{added.cls}.{name} is defined twice; @add_to({added.cls}, replace=True)"
            " replaces the first"
        )
    if added.replace and not (
        name in cls.methods or isinstance(own.get(name), FUNCTIONS)
    ):
        raise cell.refuse(f"{added.cls} has no method {name} to replace")
    for clash in sorted(Needs(part.node).now & members):
        raise cell.refuse(
            f"{added.cls}.{name} needs {clash} for a decorator or a default value, and"
            f" inside the class that is {added.cls}.{clash}"
        )
    part.lines = without_decorator(part, added.decorator)
    cls.methods[name] = part


def chapter_names(book: Path = BOOK) -> list[str]:
    """The chapters: those of `_toc.yml` in its order, then the others by name."""
    found = sorted(path.stem for path in book.glob("*.md"))
    contents = book.parent / "_toc.yml"
    listed: list[str] = []

    def walk(entry: object):
        if isinstance(entry, dict):
            for key, value in entry.items():
                if key in ("root", "file"):
                    listed.append(Path(value).stem)
                else:
                    walk(value)
        elif isinstance(entry, list):
            for item in entry:
                walk(item)

    if contents.exists():
        walk(yaml.safe_load(contents.read_text(encoding="utf-8")))
    return sorted(found, key=lambda n: listed.index(n) if n in listed else len(listed))


IMPORT = """
import contextlib, importlib, io, json, sys
package, *names = sys.argv[1:]
errors = {}
for name in names:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        del sys.modules[module]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(f"{package}.{name}")
    except Exception as error:
        errors[name] = f"does not import: {type(error).__name__}: {error}"
    if said.getvalue():
        errors[name] = f"prints on import: {said.getvalue()!r}"
print(json.dumps(errors))
"""


def import_errors(names: Sequence[str], package: Path = PACKAGE) -> dict[str, str]:
    """Import each module in a new process, the package afresh for each."""
    if not names:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, package.name, *names],
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return dict.fromkeys(names, f"ends the process: {done.stderr.strip()}")
    return json.loads(done.stdout)


def write(path: Path, text: str) -> bool:
    """Write a file if that changes it, all of it or nothing."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return True


def difference(actual: str, expected: str, lines: int = 20) -> str:
    diff = difflib.unified_diff(
        actual.splitlines(),
        expected.splitlines(),
        "on disk",
        "tangled",
        n=1,
        lineterm="",
    )
    return "\n".join(list(diff)[:lines])


def stale(name: str, book: Path = BOOK, package: Path = PACKAGE) -> str | None:
    """What is wrong with the module of a chapter on disk; None where it is right."""
    page, module = book / f"{name}.md", package / f"{name}.py"
    chapter = read_chapter(page, package.name) if page.exists() else None
    expected = tangle(chapter) if chapter else None
    actual = module.read_text(encoding="utf-8") if module.exists() else None
    if expected == actual:
        return None
    if expected is None:
        return "no chapter exports it"
    if actual is None:
        return "it is missing"
    return difference(actual, expected)


def modules(package: Path = PACKAGE) -> list[str]:
    """The modules on disk, apart from the one that is written by hand."""
    return sorted(p.stem for p in package.glob("*.py") if p.stem != "__init__")


def check(
    names: Sequence[str], book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """What is wrong with the package on disk: module -> why."""
    names = names or [*dict.fromkeys([*chapter_names(book), *modules(package)])]
    wrong = {}
    for name in names:
        try:
            if why := stale(name, book, package):
                wrong[name] = f"stale: {package.name}/{name}.py\n{why}"
        except TangleError as error:
            wrong[name] = str(error)
    there = [name for name in names if (package / f"{name}.py").exists()]
    for name, why in import_errors(there, package).items():
        wrong.setdefault(name, f"{package.name}/{name}.py {why}")
    return wrong


def write_modules(
    names: Sequence[str], book: Path = BOOK, package: Path = PACKAGE
) -> dict[str, str]:
    """Tangle chapters into the package; what went wrong: module -> why."""
    wrong, changed = {}, []
    for name in names or chapter_names(book):
        try:
            text = tangle(read_chapter(book / f"{name}.md", package.name))
        except TangleError as error:
            wrong[name] = str(error)
        else:
            if text is not None and write(package / f"{name}.py", text):
                changed.append(name)
                print(f"wrote {package.name}/{name}.py")
    for name, why in import_errors(changed, package).items():
        wrong[name] = f"{package.name}/{name}.py {why}"
    return wrong


def command(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="chapters; all where none is named")
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    book: Path,
) -> argparse.Namespace:
    """The options, where every name is that of a chapter."""
    options = parser.parse_args(arguments)
    known = chapter_names(book)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(
            f"{book.name}/ has no chapter {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return options


def main(
    arguments: Sequence[str] | None = None, book: Path = BOOK, package: Path = PACKAGE
) -> int:
    options = parse(command("tangle", __doc__), arguments, book)
    wrong = (check if options.check else write_modules)(options.names, book, package)
    for why in wrong.values():
        print(why, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
