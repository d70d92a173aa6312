"""How this book is woven

Chapter: book/weaving.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pandas as pd
from matplotlib import rcsetup, style


# Chapter 'How this book is woven', section 'A decorator that grows a class'
def layers(method: Any) -> Iterator[Any]:
    """A method and all that it wraps; the innermost function comes last."""
    while method is not None:
        yield method
        places = ("__wrapped__", "fget", "func")
        found = (getattr(method, place, None) for place in places)
        method = next((layer for layer in found if layer is not None), None)


# Chapter 'How this book is woven', section 'A decorator that grows a class'
def add_to(cls: type, *, replace: bool = False) -> Callable[[Any], Any]:
    """Make the decorated function a method of `cls`, as if written in its body.

    A name that the notebook uses for something else keeps its meaning.

    Raises:
        TypeError: `cls` is no class.
        ValueError: `cls` itself already defines the name; `replace` is not set.
    """
    if not isinstance(cls, type):
        raise TypeError(f"@add_to(Class) needs a class, found {cls!r}")

    def add(method: Any) -> Any:
        *_, function = layers(method)
        name = function.__name__
        if name in vars(cls) and not replace:
            raise ValueError(
                f"{cls.__qualname__} already has {name}; to replace it write"
                f" @add_to({cls.__name__}, replace=True)"
            )
        for layer in layers(method):
            if hasattr(layer, "__qualname__"):
                layer.__qualname__ = f"{cls.__qualname__}.{name}"
                layer.__module__ = cls.__module__
        setattr(cls, name, method)
        if hasattr(method, "__set_name__"):
            method.__set_name__(cls, name)
        return function.__globals__.get(name)

    return add


# Chapter 'How this book is woven', section 'Long experiments'
def results(name: str) -> pd.DataFrame:
    """The stored rows of a chapter's long experiment, one a setting and seed.

    Raises: ValueError for a name without results, with the names that have some.
    """
    stored = files("mtl_annotated") / "results"
    known = sorted(each.name for each in stored.iterdir() if each.name.endswith(".csv"))
    if f"{name}.csv" not in known:
        valid = ", ".join(each.removesuffix(".csv") for each in known)
        raise ValueError(f"no results of {name!r}, choose from {valid}")
    with (stored / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, comment="#")


GRAY = "#767676"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


GRAY_PARTS = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
    "grid.color",
    "hatch.color",
    "boxplot.boxprops.color",
    "boxplot.whiskerprops.color",
    "boxplot.capprops.color",
    "boxplot.flierprops.markeredgecolor",
)
STYLE = dict.fromkeys(GRAY_PARTS, GRAY) | {
    "axes.prop_cycle": rcsetup.cycler(color=PALETTE),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtl_annotated",
}


# Chapter 'How this book is woven', section 'Pictures'
def picture_style() -> None:
    """Draw pictures that read on white and dark, the same bytes every time."""
    style.use(STYLE)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})
