"""Every trap and every refusal of the tangler: the input, and exactly what comes out."""

import ast
import subprocess
import sys
import textwrap

import pytest

from tools import tangle
from tools.tangle import TangleError

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


def page(*blocks, title="Toy"):
    """A chapter: a block that begins with `#` or `>` is prose, any other is a cell.

    Blocks are exported; one that begins with `#no` is not.
    """
    text = HEADER + f"# {title}\n"
    for block in blocks:
        block = textwrap.dedent(block).strip("\n")
        if block.startswith("## ") or block.startswith("> "):
            text += f"\n{block}\n"
        elif block.startswith("#no\n"):
            text += f"\n```{{code-cell}} ipython3\n{block[4:]}\n```\n"
        else:
            text += f"\n```{{code-cell}} ipython3\n:tags: [export]\n\n{block}\n```\n"
    return text


def tangled(*blocks, title="Toy", name="toy"):
    text = page(*blocks, title=title)
    chapter = tangle.parse_chapter(text, name=name, file=f"book/{name}.md")
    return tangle.tangle(chapter)


def body(*blocks):
    """The module below its docstring and the future import."""
    module = tangled(*blocks)
    start = (
        '"""Toy\n\nChapter: book/toy.md\n"""\n\nfrom __future__ import annotations\n'
    )
    assert module.startswith(start)
    return module[len(start) :].strip("\n")


def text(code):
    return textwrap.dedent(code).strip("\n")


def refused(*blocks):
    with pytest.raises(TangleError) as error:
        tangled(*blocks)
    return str(error.value)


def run(module, then=""):
    """Import the module in a clean process and print what `then` asks for."""
    code = f"{module}\n{then}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ADD_TO = "from mtl_annotated.weaving import add_to"
CLASS = '''
class Gate:
    """A gate."""

    def __init__(self, width):
        self.width = width
'''


def test_a_whole_module():
    module = tangled(
        "> A question, before any code.",
        """
        import math
        from dataclasses import dataclass

        from mtl_annotated.weaving import add_to
        """,
        "## Sizes",
        """
        # Wide enough for two tasks.
        WIDTH = 16
        DEPTH: int = 2
        """,
        "## Gates",
        """
        @dataclass(frozen=True)
        class Gate:
            \"\"\"A gate.\"\"\"

            width: int = WIDTH
        """,
        "#no\nprint(Gate())",
        """
        from math import log2  # a second import of the same module
        import math

        @add_to(Gate)
        # The paper writes g.
        def bits(self) -> float:
            \"\"\"Bits.

            Of the width.
            \"\"\"
            return math.log(self.width) / math.log(2) - log2(DEPTH)  # ratio
        """,
        "## Words",
        """
        def gates(*widths) -> list[Gate]:
            return [Gate(width) for width in widths]
        # That was all.
        """,
        title='A "toy" \\ chapter: with colon',
    )
    assert (
        module
        == text(
            '''
        """A "toy" \\\\ chapter: with colon

        Chapter: book/toy.md
        """

        from __future__ import annotations

        import math
        from dataclasses import dataclass
        from math import log2  # a second import of the same module

        # Wide enough for two tasks.
        WIDTH = 16
        DEPTH: int = 2


        # Chapter 'A "toy" \\ chapter', section 'Gates'
        @dataclass(frozen=True)
        class Gate:
            """A gate."""

            width: int = WIDTH

            # The paper writes g.
            def bits(self) -> float:
                """Bits.

                Of the width.
                """
                return math.log(self.width) / math.log(2) - log2(DEPTH)  # ratio


        # Chapter 'A "toy" \\ chapter', section 'Words'
        def gates(*widths) -> list[Gate]:
            return [Gate(width) for width in widths]


        # That was all.
        '''
        )
        + "\n"
    )


def test_a_chapter_without_exports_has_no_module():
    assert tangled("> Words.", "#no\nprint(1)") is None


def test_tangling_twice_gives_the_same():
    blocks = [ADD_TO, CLASS, "@add_to(Gate)\ndef area(self): return self.width ** 2"]
    assert tangled(*blocks) == tangled(*blocks)


class TestImports:
    def test_merged_sorted_and_the_unused_dropped(self):
        module = body(
            "import torch\nfrom math import sin, pi",
            "def wave(t):\n    return sin(pi * t) * torch.ones(1)",
            "import os\nfrom math import cos\nfrom mtl_annotated.tasks import Task\nimport abc",
            "def other(t: abc.ABC) -> Task:\n    return cos(t)",
        )
        assert module.split("\n\n\n")[0] == text(
            """
            import abc
            from math import cos, pi, sin

            import torch

            from mtl_annotated.tasks import Task
            """
        )

    def test_comments_stay_with_their_import(self):
        module = body(
            "# Why sin.\nfrom math import sin\nimport abc  # why abc",
            "def wave(t: abc.ABC):\n    return sin(t)",
        )
        assert module.split("\n\n\n")[0] == text(
            """
            import abc  # why abc

            # Why sin.
            from math import sin
            """
        )

    def test_type_checking_block(self):
        module = body(
            """
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from pandas import DataFrame
            """,
            "def rows(table: 'DataFrame') -> int:\n    return len(table)",
        )
        assert module == text(
            """
            from typing import TYPE_CHECKING

            if TYPE_CHECKING:
                from pandas import DataFrame


            # Chapter 'Toy'
            def rows(table: "DataFrame") -> int:
                return len(table)
            """
        )

    def test_future_annotations_once(self):
        module = tangled(
            "from __future__ import annotations\nimport math",
            "from __future__ import annotations",
            "def f() -> float:\n    return math.pi",
        )
        assert module.count("from __future__ import annotations") == 1

    def test_add_to_is_dropped_with_its_comment(self):
        module = body(
            "# For the notebook.\nfrom mtl_annotated.weaving import add_to",
            CLASS,
            "@add_to(Gate)\ndef area(self):\n    return 1",
        )
        assert "weaving" not in module
        assert "For the notebook" not in module

    def test_the_rest_of_the_import_stays(self):
        module = body(
            "from mtl_annotated.weaving import add_to, picture_style",
            CLASS,
            "@add_to(Gate)\ndef draw(self):\n    picture_style()",
        )
        assert module.startswith("from mtl_annotated.weaving import picture_style\n")

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("from math import *", "name what you import from math, not *"),
            ("from . import tasks", "a relative import does not work in a notebook"),
            (
                "from mtl_annotated.toy import A",
                "the chapter imports itself: mtl_annotated.toy",
            ),
            (
                "import mtl_annotated.toy",
                "the chapter imports itself: mtl_annotated.toy",
            ),
            (
                "from mtl_annotated import toy",
                "the chapter imports itself: mtl_annotated.toy",
            ),
            (
                "import mtl_annotated as mtl",
                "import from the chapter that defines the name (mtl_annotated.<name>), not"
                " from mtl_annotated, which imports this chapter",
            ),
            (
                "from mtl_annotated.weaving import add_to as patch",
                "import add_to under its own name",
            ),
            (
                "from __future__ import generator_stop",
                "from __future__ import generator_stop",
            ),
        ],
    )
    def test_refused(self, line, why):
        assert refused(line) == f"book/toy.md, code cell 1 ({line!r}): {why}"

    def test_self_import_inside_a_function(self):
        why = refused("def f():\n    from mtl_annotated.toy import g\n    return g")
        assert why == (
            "book/toy.md, code cell 1 ('def f():'): the chapter imports itself:"
            " mtl_annotated.toy"
        )


class TestClasses:
    def test_stacked_decorators_and_kinds_of_methods(self):
        module = body(
            "import functools\n" + ADD_TO,
            CLASS,
            """
            @add_to(Gate)  # read-only
            @property
            def area(self):
                return self.width**2
            """,
            """
            @add_to(Gate)
            @staticmethod
            # Any gate has it.
            @functools.cache
            def unit():
                return Gate(1)

            @add_to(Gate)
            @classmethod
            def of(cls, width):
                return cls(width)

            @add_to(Gate)
            async def later(self):
                return self.area
            """,
        )
        assert module == text(
            '''
            import functools


            # Chapter 'Toy'
            class Gate:
                """A gate."""

                def __init__(self, width):
                    self.width = width

                # read-only
                @property
                def area(self):
                    return self.width**2

                @staticmethod
                # Any gate has it.
                @functools.cache
                def unit():
                    return Gate(1)

                @classmethod
                def of(cls, width):
                    return cls(width)

                async def later(self):
                    return self.area
            '''
        )
        assert run(module, "print(Gate.of(3).area, Gate.unit().width)") == "9 1"

    def test_methods_of_two_classes_in_reading_order(self):
        module = body(
            ADD_TO,
            "class A:\n    pass",
            "class B: x = 1",
            "@add_to(B)\ndef one(self):\n    return 1",
            "@add_to(A)\ndef two(self):\n    return 2",
            "@add_to(B)\ndef three(self):\n    return 3",
        )
        assert module == text(
            """
            # Chapter 'Toy'
            class A:
                def two(self):
                    return 2


            # Chapter 'Toy'
            class B:
                x = 1

                def one(self):
                    return 1

                def three(self):
                    return 3
            """
        )

    def test_multi_line_signature(self):
        module = body(
            ADD_TO,
            CLASS,
            """
            @add_to(Gate)
            def mix(
                self,
                experts: list[int],  # one per expert
                *,
                bias: bool = True,
            ) -> tuple[
                int,
                bool,
            ]:
                return (
                    sum(experts),
                    bias,
                )
            """,
        )
        assert text(
            """
            def mix(
                self,
                experts: list[int],  # one per expert
                *,
                bias: bool = True,
            ) -> tuple[
                int,
                bool,
            ]:
                return (
                    sum(experts),
                    bias,
                )
            """
        ) in textwrap.dedent(module[module.index("    def mix") :])

    def test_multi_line_strings_keep_their_text(self):
        method = '''
        @add_to(Gate)
        def words(self, name="x"):
            """A docstring
            of two lines.
            """
            plain = """first
          second
        third"""
            filled = f"""{name}
                {plain!r}
        end"""
            joined = (
                "a"
                "b"
            )
            return plain, filled, joined
        '''
        module = body(ADD_TO, CLASS, method)
        free = textwrap.dedent(method).replace("@add_to(Gate)", "")
        expected = run(free, "print(repr(words(None)))")
        assert run(module, "print(repr(Gate(1).words()))") == expected
        assert '        """A docstring\n        of two lines.\n        """\n' in module

    def test_nothing_but_the_place_of_a_method_changes(self):
        method = text(
            '''
            def hard(self, x, /, y=(1, 2), *a, z: "int" = 3, **k):
                """One.

                    Two.
                """

                def inner(q=[i for i in range(3)]):
                    """Inner
                    docstring."""
                    return f"{q!r:>{10}} {x:.2f}", lambda: (yield)

                if (n := 3) > 2:
                    return {**k, "s": """
              kept
            """}, inner, n, a, y, z
                return b"""
            bytes"""
            '''
        )
        module = body(ADD_TO, CLASS, f"@add_to(Gate)\n{method}")
        (cls,) = ast.parse(module).body
        (mine,) = ast.parse(method).body
        assert isinstance(cls, ast.ClassDef)
        merged = cls.body[-1]
        for tree in (mine, merged):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    node.body[0] = ast.Expr(ast.Constant(ast.get_docstring(node)))
        assert ast.dump(merged) == ast.dump(mine)

    def test_comments(self):
        module = body(
            ADD_TO,
            """
            # What a gate is.
            class Gate:
                def width(self):
                    return 1
                    # and no more

                # Later cells add more.
            # A gate is small.
            """,
            """
            # Two lines
            # of reason.
            @add_to(Gate)
            def area(self):
                return 2
                # end of area
            # after area
            """,
        )
        assert module == text(
            """
            # Chapter 'Toy'
            # What a gate is.
            class Gate:
                def width(self):
                    return 1
                    # and no more

                # Later cells add more.

                # Two lines
                # of reason.
                def area(self):
                    return 2
                    # end of area

                # after area


            # A gate is small.
            """
        )

    def test_replace_one_of_the_class_cell(self):
        module = body(
            ADD_TO,
            """
            class Gate:
                def width(self):
                    return 1

                # The first try.
                @property
                def area(self):
                    return 2

                def depth(self):
                    return 3
            """,
            "@add_to(Gate, replace=True)\ndef area(self):\n    return 4",
        )
        assert module == text(
            """
            # Chapter 'Toy'
            class Gate:
                def width(self):
                    return 1

                def depth(self):
                    return 3

                def area(self):
                    return 4
            """
        )

    def test_replace_an_added_one(self):
        module = body(
            ADD_TO,
            "class Gate: ...",
            "@add_to(Gate)\ndef area(self):\n    return 1",
            "@add_to(Gate)\ndef depth(self):\n    return 2",
            "@add_to(Gate, replace=True)\ndef area(self):\n    return 3",
        )
        assert module == text(
            """
            # Chapter 'Toy'
            class Gate:
                def area(self):
                    return 3

                def depth(self):
                    return 2
            """
        )

    def test_a_method_may_bear_the_name_of_a_function(self):
        module = body(
            ADD_TO,
            "def area(width):\n    return width**2",
            CLASS,
            "@add_to(Gate)\ndef area(self):\n    return area(self.width)",
        )
        assert run(module, "print(Gate(3).area(), area(4))") == "9 16"


class TestOrder:
    def test_a_default_between_class_and_method(self):
        module = body(
            ADD_TO,
            CLASS,
            "# Five were enough.\nEXPERTS = 5",
            "@add_to(Gate)\ndef mix(self, experts=EXPERTS):\n    return experts",
        )
        assert module.startswith(
            "# Five were enough.\nEXPERTS = 5\n\n\n# Chapter 'Toy'"
        )
        assert run(module, "print(Gate(1).mix())") == "5"

    def test_a_decorator_between_class_and_method_brings_what_it_calls(self):
        module = body(
            ADD_TO,
            CLASS,
            "BASE = 2",
            "def twice(f):\n    return lambda self: BASE * f(self)",
            "HALF = twice(lambda self: 0.5)(None)",
            "LAST = 1",
            "@add_to(Gate)\n@twice\ndef area(self, at=HALF):\n    return self.width",
        )
        order = [module.index(f"\n{name}") for name in ("class Gate", "LAST")]
        assert order == sorted(order)
        assert module.index("BASE") < module.index("def twice") < module.index("HALF")
        assert run(module, "print(Gate(3).area(), HALF)") == "6 1.0"

    def test_otherwise_reading_order_stays(self):
        module = body(
            "def first():\n    return SECOND + len(third())",
            "SECOND = 2",
            "def third():\n    return [Fourth]",
            "class Fourth:\n    pass",
        )
        found = [
            module.index(n) for n in ("def first", "SECOND = ", "def third", "class")
        ]
        assert found == sorted(found)

    def test_a_circle_is_refused(self):
        why = refused(
            ADD_TO,
            CLASS,
            "NARROW = Gate(1)",
            "@add_to(Gate)\ndef wider(self, than=NARROW):\n    return 1",
        )
        assert why == (
            "book/toy.md, code cell 3 ('NARROW = Gate(1)'): NARROW needs Gate before it"
            " is complete: Gate needs NARROW needs Gate"
        )

    def test_a_default_that_means_something_else_inside_the_class(self):
        why = refused(
            ADD_TO,
            "def area():\n    return 1",
            "class Gate:\n    def area(self):\n        return 2",
            "@add_to(Gate)\ndef mix(self, how=area):\n    return how()",
        )
        assert why == (
            "book/toy.md, code cell 4 ('@add_to(Gate)'): Gate.mix needs area for a"
            " decorator or a default value, and inside the class that is Gate.area"
        )


NOT_THESE = "is not an import, a class, a function or an UPPERCASE constant"


class TestRefusals:
    @pytest.mark.parametrize(
        ("cell", "why"),
        [
            ("print(1)", f"'print(1)' {NOT_THESE}"),
            ("width = 3", f"'width = 3' {NOT_THESE}"),
            ("Width = 3", f"'Width = 3' {NOT_THESE}"),
            ("WIDTH: int", f"'WIDTH: int' {NOT_THESE}"),
            ("WIDTH.x = 3", f"'WIDTH.x = 3' {NOT_THESE}"),
            ("'words'", f"\"'words'\" {NOT_THESE}"),
            ("for i in []: pass", f"'for i in []: pass' {NOT_THESE}"),
            ("try:\n    import a\nexcept E:\n    a = 1", f"'try:' {NOT_THESE}"),
            ("A = 1; B = 2", "two statements on one line: 'A = 1; B = 2'"),
            ("# only words", "the cell is tagged export, but holds no code"),
            (
                "%matplotlib inline",
                "exported cells are plain Python, '%matplotlib inline' is notebook magic",
            ),
            (
                "!pip install x",
                "exported cells are plain Python, '!pip install x' is notebook magic",
            ),
            (
                "def f(:\n    pass",
                "syntax error in line 1: 'def f(:': invalid syntax",
            ),
        ],
    )
    def test_a_cell(self, cell, why):
        first = cell.split("\n")[0]
        message = refused("> Words.", "#no\n1 + 1", cell)
        assert message == f"book/toy.md, code cell 2 ({first!r}): {why}"

    @pytest.mark.parametrize("cell", ["_A, B2 = 1, 2", "A = B = 3", "A: int = 4"])
    def test_constants(self, cell):
        assert body(cell) == cell

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("A = 1", "A = 1"),
            ("def a():\n    pass", "class a:\n    pass"),
            ("from math import a", "from cmath import a"),
            ("from math import a", "def a():\n    pass"),
            ("def a():\n    pass", "import a"),
            ("import numpy as a", "import pandas as a"),
        ],
    )
    def test_defined_twice(self, first, second):
        name = "A" if "A" in first else "a"
        assert refused(first, second) == (
            f"book/toy.md, code cell 2 ({second.split(chr(10))[0]!r}): {name} is defined"
            " twice, first in code cell 1"
        )

    def test_the_same_import_twice_is_fine(self):
        body("import os.path\nimport math as m", "import os\nimport math as m")

    @pytest.mark.parametrize(
        ("cell", "names"),
        [
            ("def f():\n    return shown + 1", "shown"),
            ("def f(x=shown):\n    return x", "shown"),
            ("def f(x: Shown) -> Other:\n    return x", "Other, Shown"),
            ("class A(Shown):\n    x: int = other()", "Shown, other"),
            ("A = [shown for i in range(3)]", "shown"),
            (
                "def f():\n    def g():\n        return lambda: shown\n    return g",
                "shown",
            ),
            ("def f():\n    return __file__", "__file__"),
            ("def f():\n    return area", "area"),
        ],
    )
    def test_a_name_that_no_exported_cell_defines(self, cell, names):
        why = refused(
            ADD_TO,
            "#no\nshown = 1\nclass Shown: pass",
            CLASS,
            "@add_to(Gate)\ndef area(self):\n    area = 1\n    return area",
            cell,
        )
        assert why == (
            f"book/toy.md, code cell 5 ({cell.split(chr(10))[0]!r}): uses {names}, which"
            " no exported cell of the chapter defines or imports"
        )

    def test_names_defined_in_any_exported_cell_are_known(self):
        body(
            "import math",
            "def f(x):\n    total = [y for y in x]\n    return g(total, len(x), __name__)",
            "def g(*x):\n    try:\n        return math.pi\n    except ValueError as e:\n        return e",
        )

    def test_add_to_must_be_imported_too(self):
        why = refused(CLASS, "@add_to(Gate)\ndef area(self):\n    return 1")
        assert why == (
            "book/toy.md, code cell 2 ('@add_to(Gate)'): uses add_to, which no exported"
            " cell of the chapter defines or imports"
        )

    @pytest.mark.parametrize(
        ("method", "why"),
        [
            (
                "@add_to(Other)\ndef area(self):\n    return 1",
                "@add_to(Other): the chapter exports no class Other above; it has Gate",
            ),
            (
                "@add_to(Gate)\ndef width(self):\n    return 1",
                "Gate.width is defined twice; @add_to(Gate, replace=True) replaces the"
                " first",
            ),
            (
                "@add_to(Gate, replace=False)\ndef width(self):\n    return 1",
                "Gate.width is defined twice; @add_to(Gate, replace=True) replaces the"
                " first",
            ),
            (
                "@add_to(Gate, replace=True)\ndef area(self):\n    return 1",
                "Gate has no method area to replace",
            ),
            (
                "@add_to(Gate, replace=True)\ndef depth(self):\n    return 1",
                "Gate has no method depth to replace",
            ),
            (
                "@add_to(Gate)\ndef area(self):\n    return super().area()",
                "method Gate.area calls super() without arguments, which works only in"
                " the cell of class Gate itself",
            ),
            (
                "@add_to(Gate)\ndef area(self):\n    return [super() for i in 'a']",
                "method Gate.area calls super() without arguments, which works only in"
                " the cell of class Gate itself",
            ),
            (
                "@add_to(Gate)\ndef area(self):\n    return __class__",
                "method Gate.area uses __class__, which it does not have here",
            ),
            (
                "@add_to(Gate)\ndef area(self):\n    return self.__width",
                "method Gate.area uses __width, which Python renames inside a class",
            ),
            (
                "@add_to(Gate)\ndef __init__(self):\n    pass",
                "method Gate.__init__ belongs in the cell of class Gate itself",
            ),
            (
                "@add_to(Gate)\ndef __eq__(self, other):\n    return True",
                "method Gate.__eq__ belongs in the cell of class Gate itself",
            ),
            (
                "@property\n@add_to(Gate)\ndef area(self):\n    return 1",
                "@add_to(Gate) must stand above the other decorators",
            ),
            (
                "@add_to(Gate)\nclass Part:\n    pass",
                "@add_to(Gate) adds a method, and this is none",
            ),
            (
                "@add_to\ndef area(self):\n    return 1",
                "@add_to is none of @add_to(Class), @add_to(Class, replace=True)",
            ),
            (
                "@weaving.add_to(Gate)\ndef area(self):\n    return 1",
                "@weaving.add_to(Gate) is none of @add_to(Class), @add_to(Class,"
                " replace=True)",
            ),
        ],
    )
    def test_a_method(self, method, why):
        gate = "class Gate:\n    depth = 1\n\n    def width(self):\n        return 1"
        first = method.split("\n")[0]
        assert refused(ADD_TO, gate, method) == (
            f"book/toy.md, code cell 3 ({first!r}): {why}"
        )

    def test_super_with_arguments_and_in_inner_classes_is_fine(self):
        body(
            ADD_TO,
            CLASS,
            """
            @add_to(Gate)
            def area(self):
                class Inner(Gate):
                    def __init__(self):
                        super().__init__(2)
                return super(Gate, self), Inner
            """,
        )

    def test_a_class_is_unknown_above_its_cell(self):
        why = refused(ADD_TO, "@add_to(Gate)\ndef area(self):\n    return 1", CLASS)
        assert why == (
            "book/toy.md, code cell 2 ('@add_to(Gate)'): @add_to(Gate): the chapter"
            " exports no class Gate above; it has none"
        )


def test_headings():
    markdown = "# Title\n\n```python\n# no\n```\n\n## One `x` ##\n~~~\n## no\n~~~\n#no\n### Deep"
    assert [*tangle.headings(markdown)] == [(1, "Title"), (2, "One `x`"), (3, "Deep")]


def test_weaving_exports_add_to_itself():
    module = tangled("def add_to(cls):\n    return cls", name="weaving")
    assert "def add_to(cls):" in module


@pytest.fixture
def book(tmp_path):
    """A throw-away book of two chapters beside its package."""
    (tmp_path / "book").mkdir()
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys/__init__.py").write_text("")
    (tmp_path / "book/one.md").write_text(page("def one():\n    return 1"))
    (tmp_path / "book/two.md").write_text(
        page("from toys.one import one", "def two():\n    return one() + one()")
    )
    (tmp_path / "book/words.md").write_text(page("> Words."))
    return tmp_path


def main(root, *arguments):
    return tangle.main(arguments, root / "book", root / "toys")


def test_command_writes_then_finds_nothing_stale(book, capsys):
    assert main(book) == 0
    assert capsys.readouterr().out == "wrote toys/one.py\nwrote toys/two.py\n"
    assert main(book) == 0
    assert main(book, "--check") == 0
    assert capsys.readouterr() == ("", "")


def test_check_shows_what_is_stale(book, capsys):
    main(book)
    (book / "book/one.md").write_text(page("def one():\n    return 11"))
    (book / "toys/left.py").write_text("")
    (book / "toys/two.py").unlink()
    capsys.readouterr()
    assert main(book, "--check") == 1
    assert (
        capsys.readouterr().err
        == text(
            """
        stale: toys/one.py
        --- on disk
        +++ tangled
        @@ -10,2 +10,2 @@
         def one():
        -    return 1
        +    return 11
        stale: toys/two.py
        it is missing
        stale: toys/left.py
        no chapter exports it
        """
        )
        + "\n"
    )
    assert not (book / "toys/two.py").exists()


def test_check_sees_an_edited_module(book, capsys):
    main(book)
    path = book / "toys/one.py"
    path.write_text(path.read_text().replace("return 1", "return 2"))
    assert main(book, "--check", "one") == 1
    assert "-    return 2\n+    return 1" in capsys.readouterr().err
    assert main(book, "--check", "two") == 0


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("A = B\nB = 1", None),
        ("A = 1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
        (
            "from toys.two import two\n\n\ndef one():\n    return two",
            "partially initialized",
        ),
    ],
)
def test_modules_are_imported_in_a_clean_process(book, capsys, cell, why):
    main(book)
    (book / "book/one.md").write_text(page(cell))
    if why is None:
        assert main(book, "one") == 0
    else:
        for arguments in (["one"], ["--check"]):
            assert main(book, *arguments) == 1
            shown = capsys.readouterr().err
            assert "toys/one.py does not import: " in shown
            assert why in shown


def test_a_module_that_prints_is_refused(book, capsys):
    (book / "book/one.md").write_text(page("A = print('hello')"))
    assert main(book, "one") == 1
    assert "toys/one.py prints on import: 'hello\\n'" in capsys.readouterr().err


def test_an_error_in_one_chapter_leaves_the_others(book, capsys):
    (book / "book/one.md").write_text(page("one = 1"))
    (book / "book/two.md").write_text(page("def two():\n    return 2"))
    assert main(book) == 1
    assert (book / "toys/two.py").exists()
    assert not (book / "toys/one.py").exists()


def test_an_unknown_chapter(book, capsys):
    with pytest.raises(SystemExit):
        main(book, "three")
    assert (
        "book/ has no chapter three; it has one, two, words" in capsys.readouterr().err
    )


def test_order_of_the_contents(book):
    assert tangle.chapter_names(book / "book") == ["one", "two", "words"]
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: book/words.ipynb\nparts:\n- caption: I\n  chapters:\n"
        "  - file: book/two\n"
    )
    assert tangle.chapter_names(book / "book") == ["words", "two", "one"]
