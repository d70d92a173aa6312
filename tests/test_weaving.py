"""The decorator that grows a class, and the style of the pictures."""

import functools
import io
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from mtl_annotated import weaving
from mtl_annotated.weaving import add_to, picture_style


@pytest.fixture
def gate():
    class Gate:
        def __init__(self, width=3):
            self.width = width

    return Gate


def area(self):
    return self.width**2


FUNCTION = area


def fresh(function=FUNCTION):
    """A copy, since add_to renames what it is given."""
    code, names = function.__code__, function.__globals__
    return type(function)(code, names, function.__name__)


def test_a_method_is_called_and_named_like_one_of_the_body(gate):
    add_to(gate)(fresh())
    assert gate(4).area() == 16
    assert gate.area.__qualname__ == f"{gate.__qualname__}.area"
    assert gate.area.__module__ == gate.__module__
    with pytest.raises(TypeError, match=r"Gate\.area\(\) takes 1 positional argument"):
        gate().area(1)


def test_the_name_keeps_what_it_stood_for(gate):
    assert add_to(gate)(fresh()) is area

    def nowhere_else(self):
        return 1

    assert add_to(gate)(nowhere_else) is None


def test_the_name_is_looked_up_where_the_method_was_written(gate):
    # functools.cache lives in another module, whose names are none of our business.
    assert add_to(gate)(functools.cache(fresh())) is area


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (property, 9),
        (functools.cached_property, 9),
        (lambda f: property(functools.lru_cache(f)), 9),
    ],
)
def test_properties(gate, kind, value):
    add_to(gate)(kind(fresh()))
    assert gate().area == value
    *_, function = weaving.layers(vars(gate)["area"])
    assert function.__qualname__ == f"{gate.__qualname__}.area"


def test_a_cached_property_is_cached(gate):
    add_to(gate)(functools.cached_property(fresh()))
    it = gate()
    assert it.area == 9
    it.width = 4
    assert it.area == 9


def test_static_and_class_methods(gate):
    @add_to(gate)
    @staticmethod
    def unit():
        return 1

    @add_to(gate)
    @classmethod
    def of(cls, width):
        return cls(width)

    assert (gate.unit(), gate().unit(), gate.of(5).width) == (1, 1, 5)
    assert gate.of.__qualname__ == f"{gate.__qualname__}.of"
    assert gate.unit.__qualname__ == f"{gate.__qualname__}.unit"


def test_nothing_is_replaced_in_silence(gate):
    add_to(gate)(fresh())
    with pytest.raises(ValueError, match=r"Gate already has area; to replace it write"):
        add_to(gate)(fresh())
    with pytest.raises(ValueError, match="already has __init__"):

        @add_to(gate)
        def __init__(self):
            pass

    def area(self):
        return 0

    add_to(gate, replace=True)(area)
    assert gate().area() == 0


def test_an_inherited_method_may_be_overridden(gate):
    class Wide(gate):
        pass

    add_to(gate)(fresh())
    assert "area" not in vars(Wide)
    add_to(Wide)(fresh())
    assert "area" in vars(Wide)


def test_without_a_class():
    # With the tests' import hook the annotation refuses it first.
    with pytest.raises(TypeError, match=r"needs a class, found|parameter 'cls'"):
        add_to(fresh())


@pytest.fixture
def style():
    with mpl.rc_context():
        mpl.rcdefaults()
        picture_style()
        yield mpl.rcParams


def picture():
    figure, axes = plt.subplots()
    axes.plot([1, 2], label="line")
    axes.boxplot([[1, 2, 3]])
    axes.bar([1], [2], hatch="/")
    axes.set_title("title")
    axes.legend()
    axes.grid()
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file.getvalue().decode()


def test_a_picture_is_the_same_every_time(style):
    assert picture() == picture()


def test_a_picture_holds_no_black_or_white_and_no_date(style):
    svg = picture()
    # What has no color of its own is black: every stroke and text must name one.
    assert not {c for c in ("#000000", "#ffffff", "black", "white") if c in svg.lower()}
    assert "dc:date" not in svg
    assert "matplotlib.org" not in svg
    assert "fill: #767676" in svg  # text that is text


def contrast(color, page):
    def luminance(c):
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in mpl.colors.to_rgb(c)
        ]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([luminance(color), luminance(page)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["white", "#121212"])
def test_text_and_the_first_colors_stand_out(style, page):
    cycle = style["axes.prop_cycle"].by_key()["color"]
    assert all(contrast(color, page) >= 3 for color in cycle[:4])
    assert contrast(style["text.color"], page) >= 4


def test_outside_ipython_nothing_of_it_is_loaded():
    code = (
        "import sys; sys.modules.pop('IPython', None)\n"
        "from mtl_annotated.weaving import picture_style; picture_style()\n"
        "print('matplotlib_inline' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("False"), done.stderr


def test_results_are_read_without_their_first_line():
    found = weaving.results("esmm")
    assert {"bias", "click_rate", "runner", "seed", "auc_all"} <= set(found)
    assert found["seed"].nunique() >= 10
    assert not found.isna().any().any()


def test_results_that_are_not_there_are_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"no results of 'esm', choose from .*\besmm\b"
    ):
        weaving.results("esm")
