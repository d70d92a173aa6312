"""Features: from rows to tensors

Chapter: book/features.md
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, replace
from datetime import date
from functools import cached_property
from numbers import Integral, Number, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    QuantileTransformer,
    StandardScaler,
)
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.nn import functional as F

from mtl_annotated.tasks import Task, check_tasks


# Chapter 'Features', section 'Three kinds of columns'
@dataclass(frozen=True)
class Column:
    """An input column, called `name` in the rows."""

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(
                f"a column needs a name, expected a str, found {self.name!r};"
                " frame.rename(columns=str) makes all names of a frame strings"
            )


# Chapter 'Features', section 'Three kinds of columns'
def check_size(column: Column, setting: str) -> None:
    """Make a size a plain int; refuse all but whole numbers of at least 1."""
    size = getattr(column, setting)
    whole = isinstance(size, Integral) and not isinstance(size, bool)
    if not whole or size < 1:
        kind = ValueError if whole else TypeError
        raise kind(
            f"column {column.name!r}: {setting} must be an integer of at"
            f" least 1, found {size!r}"
        )
    object.__setattr__(column, setting, int(size))


# Chapter 'Features', section 'Three kinds of columns'
def check_choice(column: Column, setting: str, choices: tuple) -> None:
    """Refuse a setting that is not among its choices."""
    found = getattr(column, setting)
    if found not in choices:
        raise ValueError(
            f"column {column.name!r}: unknown {setting} {found!r},"
            f" choose from {', '.join(map(repr, choices))}"
        )


# Chapter 'Features', section 'Three kinds of columns'
@dataclass(frozen=True)
class IdColumn(Column):
    """What `Sparse` and `Sequence` have in common: ids that read a table."""

    _: KW_ONLY
    width: int = 16
    buckets: int | None = None
    shares: str | None = None
    min_count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self, "width")
        check_size(self, "min_count")
        if self.buckets is not None:
            check_size(self, "buckets")
        check_table_settings(self)

    @property
    def table(self) -> str:
        """The name of the table it reads: its own, or the one it shares."""
        return self.shares or self.name


# Chapter 'Features', section 'Three kinds of columns'
def check_table_settings(column: IdColumn) -> None:
    """Refuse settings of a table that contradict each other."""
    who = f"column {column.name!r}"
    if column.shares == column.name:
        raise ValueError(f"{who}: shares must name another column")
    if column.shares is not None and (column.buckets or column.min_count > 1):
        raise ValueError(
            f"{who}: buckets and min_count are set where the table is, in"
            f" column {column.shares!r}; leave them out here"
        )
    if column.buckets is not None and column.min_count > 1:
        raise ValueError(
            f"{who}: min_count={column.min_count} needs a vocabulary, and"
            f" buckets={column.buckets} keeps none; choose one"
        )


# Chapter 'Features', section 'Three kinds of columns'
@dataclass(frozen=True)
class Sparse(IdColumn):
    """One id a row: a string, an integer, a boolean or a category.

    `width` is the size of its vectors; `buckets` hashes values instead of
    listing them; `shares` names the column whose table it reads; a value met
    fewer than `min_count` times in training counts as unseen.

    Raises: TypeError or ValueError for settings of no meaning.
    """


POOLINGS = ("mean", "sum", "max")


# Chapter 'Features', section 'Three kinds of columns'
@dataclass(frozen=True)
class Sequence(IdColumn):
    """A list of ids a row, of which the last `length` are read.

    `pooling` ("mean", "sum" or "max") makes one vector of theirs. Unseen and
    missing items have a vector too and count in the mean; padding does not.
    The other settings are those of `Sparse`.

    Raises: TypeError or ValueError for settings of no meaning.
    """

    _: KW_ONLY
    length: int = 50
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self, "length")
        check_choice(self, "pooling", POOLINGS)


SCALES = ("standard", "minmax", "quantile", "log", "none")


# Chapter 'Features', section 'Three kinds of columns'
@dataclass(frozen=True)
class Dense(Column):
    """One number a row.

    `scale` is one of `SCALES`. `missing` fills gaps: "mean" or "median" of the
    training rows, or a number in the column's own units. None refuses gaps.

    Raises: ValueError for an unknown `scale` or `missing`.
    """

    _: KW_ONLY
    scale: str = "standard"
    missing: int | float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scale", SCALES)
        check_missing(self)


# Chapter 'Features', section 'Three kinds of columns'
def check_missing(column: Dense) -> None:
    """Refuse a filling that is not a finite number, "mean" or "median"."""
    found = column.missing
    if isinstance(found, str):
        check_choice(column, "missing", ("mean", "median"))
    elif found is not None:
        number = isinstance(found, Real) and not isinstance(found, bool)
        if not number or not math.isfinite(found):
            raise ValueError(
                f"column {column.name!r}: missing must be 'mean', 'median' or"
                f" a finite number, found {found!r}"
            )
        plain = int(found) if isinstance(found, Integral) else float(found)
        object.__setattr__(column, "missing", plain)


# Chapter 'Features', section 'When are two ids the same?'
def exact_below(dtype: Any) -> int:
    """The bound below which a float type holds every whole number."""
    return 2 ** (np.finfo(dtype).nmant + 1)


DATES = (date, np.datetime64)
DATE_HINT = (
    "; of a date take .dt.hour or .dt.dayofweek, or make it an id with .astype(str)"
)


# Chapter 'Features', section 'When are two ids the same?'
def id_text(value: Any) -> str:
    """The text of one id: a string as it stands, a whole number in digits.

    Raises: TypeError for anything else, and for a float that is too large
    for its type to hold every whole number (2**53 for a Python float).
    """
    if isinstance(value, str):
        return str(value)
    whole = isinstance(value, (int, np.integer, np.bool_))
    if isinstance(value, (float, np.floating)):
        bound, value = exact_below(type(value)), float(value)
        whole = value.is_integer() and abs(value) < bound
    if not whole:
        hint = DATE_HINT if isinstance(value, DATES) else ""
        raise TypeError(f"{value!r} is not an id{hint}")
    return str(int(value))


# Chapter 'Features', section 'When are two ids the same?'
def plain_ids(values: pd.Index) -> pd.Index:
    """Ids as int64 if their type is numeric and all fit, as text otherwise.

    Missing values must have been taken out.

    Raises: TypeError for values that are no ids.
    """
    if isinstance(values, pd.CategoricalIndex):
        values = pd.Index(values.to_numpy())
    if values.dtype == object and not any(
        isinstance(value, (np.float16, np.float32)) for value in values
    ):
        values = values.infer_objects()
    if values.dtype == "str":
        return values
    if values.dtype.kind == "f":
        numbers: np.ndarray = values.to_numpy()
        bound = exact_below(numbers.dtype)
        odd = (np.floor(numbers) != numbers) | (np.abs(numbers) >= bound)
        for number in numbers[odd]:
            id_text(number)  # raises, and names the first
    fits = values.dtype.kind == "u" and (values < 2**63).all()
    if values.dtype.kind in "bif" or fits:
        return values.astype("int64")
    texts = [id_text(value) for value in values.tolist()]
    return pd.Index(texts, dtype="str")


# Chapter 'Features', section 'When are two ids the same?'
def check_half(values: pd.Series) -> None:
    """Refuse float16 values too large to hold every whole number."""
    if values.dtype == np.float16:
        numbers = values.to_numpy()
        for number in numbers[np.abs(numbers) >= exact_below(np.float16)]:
            id_text(number)  # raises, and names the first


# Chapter 'Features', section 'A vocabulary'
class Vocabulary:
    """A table's list of values: the value at place k has id k + 1.

    Integers come first, then strings, and last None if missing is a category.

    Raises: ValueError for values of another type or in another order.
    """

    def __init__(self, values: Iterable[int | str | None]) -> None:
        self.values = tuple(values)
        integers = [value for value in self.values if type(value) is int]
        strings = [value for value in self.values if type(value) is str]
        listed = [*integers, *strings]
        rest = self.values[len(listed) :]
        if (*listed, *rest) != self.values or rest not in ((), (None,)):
            raise ValueError("a vocabulary lists integers, then strings, then None")
        self.integers = pd.Index(integers, dtype="int64")
        self.listed = listed
        # A missing value reads the last row, or that of the unseen.
        self.missing = len(self.values) if rest else 0
        self.rows = len(self.values) + 1

    @cached_property
    def texts(self) -> pd.Index:
        """The values as text, in their places."""
        return pd.Index([str(value) for value in self.listed], dtype="str")

    def ids(self, values: pd.Index) -> Int[np.ndarray, " values"]:
        """The ids of plain values, 0 for those it does not list."""
        known = self.integers if values.dtype.kind == "i" else self.texts
        places = known.get_indexer(values)
        places += 1
        return places


INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


# Chapter 'Features', section 'A vocabulary'
def integer_or_text(text: str) -> int | str:
    """The integer that a text spells in its usual form, or the text itself."""
    if INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63:
        return int(text)
    return str(text)  # NumPy's strings are a type of their own


# Chapter 'Features', section 'A vocabulary'
def count_ids(values: pd.Series) -> tuple[pd.Series, int]:
    """How often each integer and string occurs, and how many are missing."""
    check_half(values)
    counts = values.value_counts(sort=False, dropna=False)
    missing = np.asarray(counts.index.isna())
    known = counts[~missing]
    plain = plain_ids(known.index)
    if plain.dtype.kind != "i":
        values_found = [integer_or_text(text) for text in plain.tolist()]
        plain = pd.Index(values_found, dtype=object)
    return known.set_axis(plain), int(counts[missing].sum())


# Chapter 'Features', section 'A vocabulary'
def ordered(values: pd.Index) -> list[int | str]:
    """Integers first, then strings, both ascending."""
    if values.dtype.kind == "i":
        return values.sort_values().tolist()
    plain = values.tolist()
    integers = sorted(value for value in plain if isinstance(value, int))
    return integers + sorted(value for value in plain if isinstance(value, str))


# Chapter 'Features', section 'A vocabulary'
def learn_vocabulary(
    parts: Iterable[tuple[pd.Series, int]], min_count: int = 1
) -> Vocabulary:
    """The vocabulary of all values that read one table, from their counts."""
    counts, missing = zip(*parts, strict=True)
    totals: pd.Series = pd.concat(counts).groupby(level=0, sort=False).sum()
    kept = ordered(totals.index[totals >= min_count])
    return Vocabulary([*kept, *[None] * (sum(missing) >= min_count)])


# Chapter 'Features', section 'Hashing'
def bucket(text: str, buckets: int) -> int:
    """The bucket of a text, 1 to `buckets`.

    BLAKE2b (RFC 7693) of the text in UTF-8, with a digest of 8 bytes, read as
    a little-endian number. Fixed for ever: trained weights depend on it.
    """
    data = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % buckets


# Chapter 'Features', section 'Hashing'
class Buckets:
    """Stands in for a `Vocabulary` in a column that hashes its values."""

    missing = 0

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.rows = buckets + 1

    def ids(self, values: pd.Index) -> Int[np.ndarray, " values"]:
        """The ids of plain values, 1 to the number of buckets."""
        found = [bucket(str(value), self.buckets) for value in values.tolist()]
        return np.array(found, dtype=np.int64)


# Chapter 'Features', section 'Hashing'
def look_up(
    values: pd.Series, table: Vocabulary | Buckets
) -> Int[np.ndarray, " values"]:
    """The ids of values of any type that ids may have."""
    dtype = values.dtype
    plain = isinstance(dtype, np.dtype) and dtype.kind in "bi"
    if isinstance(dtype, pd.StringDtype):
        plain = dtype == "str" and dtype.storage == "python"
    if isinstance(table, Vocabulary) and plain:
        ids = table.ids(plain_ids(pd.Index(values)))
        if table.missing:
            ids[values.isna()] = table.missing
        return ids
    check_half(values)
    codes, distinct = pd.factorize(values)
    ids = table.ids(plain_ids(pd.Index(distinct)))
    return np.append(ids, table.missing)[codes]


# Chapter 'Features', section 'Numbers'
def refuse(bad: np.ndarray, what: str, values: Any) -> None:
    """Raise ValueError if any row is bad, with their count and the first."""
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        found = np.asarray(values, dtype=object)[first]
        raise ValueError(
            f"{what} in {int(bad.sum())} of {len(bad)} rows"
            f" (first in row {first}: {found!r})"
        )


# Chapter 'Features', section 'Numbers'
@contextmanager
def naming(who: str, hint: str = "") -> Iterator[None]:
    """Put a name before, and a hint behind, the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{who}: {error}{hint}") from error


# Chapter 'Features', section 'Numbers'
def read_numbers(values: pd.Series) -> Float[np.ndarray, " rows"]:
    """Values as float64, missing ones as NaN.

    Raises: TypeError if some are not numbers, ValueError if some are infinite.
    """
    if values.dtype.kind not in "biuf":
        check_numbers(values.dropna(), values.dtype)
        values = values.astype(object)
    numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
    refuse(np.isinf(numbers), "infinite value", numbers)
    return numbers


# Chapter 'Features', section 'Numbers'
def check_numbers(cells: Iterable, dtype: Any) -> None:
    """Refuse cells that are not numbers."""
    for cell in cells:
        if not isinstance(cell, Number):
            hint = "; convert the column, for instance with pandas.to_numeric"
            if isinstance(cell, DATES):
                hint = DATE_HINT
            raise TypeError(f"{cell!r} is not a number (dtype {dtype}){hint}")


# Chapter 'Features', section 'Numbers'
def new_scale(scale: str, rows: int) -> Any:
    """The scikit-learn transformer of a scale, not yet fitted."""
    if scale == "standard":
        return StandardScaler()
    if scale == "minmax":
        return MinMaxScaler()
    if scale == "quantile":
        points = min(1000, rows)
        # A subsample would make the scale depend on a seed.
        return QuantileTransformer(n_quantiles=points, subsample=None)
    return FunctionTransformer(np.log1p if scale == "log" else None)


# Chapter 'Features', section 'Numbers'
class Scaler:
    """What a `Dense` column learns: a number for its gaps, and its scale."""

    def __init__(self, column: Dense, rows: int = 1000) -> None:
        self.column = column
        # "mean" and "median" become numbers in fit.
        self.fill = None if isinstance(column.missing, str) else column.missing
        self.scale = new_scale(column.scale, rows)

    def complete(
        self, numbers: Float[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "rows 1"]:
        """Numbers [rows] as one column [rows, 1] without gaps.

        Raises: ValueError for a gap that nothing fills, or for a number that
        has no logarithm.
        """
        if self.fill is None:
            options = "missing='mean', 'median' or a number would fill it"
            refuse(np.isnan(numbers), f"missing value ({options})", numbers)
        else:
            numbers = np.where(np.isnan(numbers), self.fill, numbers)
        if self.column.scale == "log":
            refuse(numbers <= -1, "log(1 + x) needs x > -1; too small", numbers)
        return numbers[:, None]

    def fit(self, numbers: Float[np.ndarray, " rows"]) -> Scaler:
        """Learn from the training rows. Returns the scaler itself."""
        if isinstance(self.column.missing, str):
            if np.isnan(numbers).all():
                raise ValueError(
                    f"all {len(numbers)} training rows are missing, which leaves no"
                    f" {self.column.missing} to fill gaps with"
                )
            imputer = SimpleImputer(strategy=self.column.missing)
            self.fill = float(imputer.fit(numbers[:, None]).statistics_[0])
        self.scale.fit(self.complete(numbers))
        return self

    def transform(
        self, numbers: Float[np.ndarray, " rows"]
    ) -> Float[np.ndarray, " rows"]:
        """Scaled numbers, in double precision."""
        if len(numbers) == 0:
            return numbers  # which scikit-learn would refuse
        return self.scale.transform(self.complete(numbers))[:, 0]

    def state(self) -> dict[str, Any]:
        """What it learned, as JSON can hold it."""
        learned = {
            name: np.asarray(value).tolist()
            for name, value in vars(self.scale).items()
            if name.endswith("_")
        }
        return {"fill": self.fill, "scale": learned}

    def restore(self, state: dict[str, Any]) -> Scaler:
        """Take over what another one learned. Returns the scaler itself."""
        self.fill = state["fill"]
        for name, value in state["scale"].items():
            if name.startswith("_") or not name.endswith("_"):
                raise ValueError(f"{name!r} is not something that a scale learns")
            learned = np.array(value) if isinstance(value, list) else value
            setattr(self.scale, name, learned)
        # If something is absent, fail now and not in service.
        self.transform(np.zeros(1))
        return self


LISTS = (list, tuple, np.ndarray)


# Chapter 'Features', section 'Lists of ids'
def is_flat(cell: Any) -> bool:
    """Whether a cell is a list, tuple or array without lists inside."""
    if isinstance(cell, np.ndarray):
        if cell.dtype.kind != "O" or cell.ndim != 1:
            return cell.ndim == 1
    elif not isinstance(cell, LISTS):
        return False
    return set(map(type, cell)).isdisjoint(LISTS)


# Chapter 'Features', section 'Lists of ids'
def check_lists(cells: pd.Series) -> None:
    """Refuse cells that are neither flat lists of ids nor missing."""
    present = cells.notna().to_numpy()
    for row, cell in enumerate(cells.to_numpy(dtype=object)):
        if present[row] and not is_flat(cell):
            raise TypeError(f"row {row}: {cell!r} is not a list, tuple or array of ids")


# Chapter 'Features', section 'Lists of ids'
def join(lists: list) -> pd.Series:
    """The ids of all lists, one after another."""
    full = [ids for ids in lists if len(ids)]
    if {getattr(ids, "dtype", None) for ids in full} == {np.dtype(np.int64)}:
        return pd.Series(np.concatenate(full))
    return pd.Series(full, dtype=object).explode()


# Chapter 'Features', section 'Lists of ids'
def flatten(
    cells: pd.Series, length: int
) -> tuple[pd.Series, Int[np.ndarray, " rows"]]:
    """The last `length` ids of all rows end to end, and each row's number."""
    present = cells.notna().to_numpy()
    lists = cells.to_numpy(dtype=object)[present]
    last = [ids[-length:] if len(ids) > length else ids for ids in lists]
    counts = np.zeros(len(cells), dtype=np.int64)
    counts[present] = [len(ids) for ids in last]
    return join(last), counts


BLOCK = 16_384


# Chapter 'Features', section 'Lists of ids'
def blocks(
    cells: pd.Series, length: int, size: int
) -> Iterator[tuple[slice, pd.Series, Int[np.ndarray, " rows"]]]:
    """A sequence column in blocks of `size` rows: which, flat values, counts."""
    check_lists(cells)
    for start in range(0, len(cells), size):
        rows = slice(start, start + size)
        yield rows, *flatten(cells.iloc[rows], length)


PADDING = -1


# Chapter 'Features', section 'Lists of ids'
def look_up_lists(
    cells: pd.Series,
    table: Vocabulary | Buckets,
    out: Int[np.ndarray, "rows length"],
) -> None:
    """Write the ids of a sequence column into `out`, padding after them."""
    length = out.shape[1]
    out[:] = PADDING
    for rows, values, counts in blocks(cells, length, BLOCK):
        real = np.arange(length) < counts[:, None]
        out[rows][real] = look_up(values, table)


# Chapter 'Features', section 'A batch'
def exportable(cls: type) -> type:
    """Let `torch.export` take objects of this dataclass apart."""
    name = f"mtl_annotated.{cls.__name__}"
    register_dataclass(cls, serialized_type_name=name)
    return cls


# Chapter 'Features', section 'A batch'
@exportable
@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Encoded rows.

    ids      [batch, positions]  int64; -1: padding; 0: unseen, or missing if
                                 training had no missing value (always for a
                                 hashed column)
    dense    [batch, dense]      scaled numbers
    labels   [batch, tasks]      NaN: no label
    weights  [batch] or None     row weights
    encoder  str or None         the fingerprint of the encoder that made it
    clean    bool                known: no label is missing, each id is in its table
                                 or padding of a sequence
    """

    ids: Int[Tensor, "batch positions"]
    dense: Float[Tensor, "batch dense"]
    labels: Float[Tensor, "batch tasks"]
    weights: Float[Tensor, " batch"] | None = None
    encoder: str | None = None
    clean: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.ids)

    def marked(self, clean: bool) -> Batch:
        """This batch, with the mark."""
        object.__setattr__(self, "clean", clean)
        return self

    def __repr__(self) -> str:
        tensors = {name: getattr(self, name) for name in ("ids", "dense", "labels")}
        if self.weights is not None:
            tensors["weights"] = self.weights
        shapes = [f"{name}={list(t.shape)}" for name, t in tensors.items()]
        return f"Batch({', '.join(shapes)})"

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """The rows that a slice or a one-dimensional tensor picks."""
        many = isinstance(rows, Tensor) and rows.ndim == 1
        if not many and not isinstance(rows, slice):
            raise TypeError(
                f"a batch takes a slice or a 1-D tensor, found {rows!r};"
                " one row is batch[3:4]"
            )
        weights = None if self.weights is None else self.weights[rows]
        ids, dense, labels = self.ids[rows], self.dense[rows], self.labels[rows]
        return Batch(ids, dense, labels, weights, self.encoder).marked(self.clean)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Batch:
        """The batch on another device, its floats in another precision."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype is for the floats, found {dtype}; ids stay int64")
        weights = self.weights
        moved = Batch(
            self.ids.to(device=device),
            self.dense.to(device=device, dtype=dtype),
            self.labels.to(device=device, dtype=dtype),
            None if weights is None else weights.to(device=device, dtype=dtype),
            self.encoder,
        )
        return moved.marked(self.clean)


# Chapter 'Features', section 'The encoder'
def check_list(what: str, found: Any) -> None:
    """Refuse what is not a list of something."""
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise TypeError(f"{what}: expected a list, found {found!r}")


# Chapter 'Features', section 'The encoder'
def check_columns(columns: Iterable[Column]) -> tuple[Column, ...]:
    """The columns as a tuple; refuses none at all, other types, equal names."""
    check_list("columns", columns)
    columns = tuple(columns)
    if not columns:
        raise ValueError("columns: found none, expected at least one")
    for column in columns:
        if not isinstance(column, (Sparse, Dense, Sequence)):
            raise TypeError(
                f"columns: expected Sparse, Dense or Sequence, found {column!r}"
            )
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"columns: {name!r} is declared more than once")
    return columns


# Chapter 'Features', section 'The encoder'
def check_shares(columns: Iterable[Column]) -> None:
    """Refuse `shares` that names no table, or one of another width."""
    readers = [column for column in columns if isinstance(column, IdColumn)]
    owners = {c.name: c for c in readers if c.shares is None}
    for column in readers:
        who, owner = f"column {column.name!r}", owners.get(column.table)
        if owner is None:
            raise ValueError(
                f"{who}: shares={column.shares!r} names no column with a table"
                f" of its own; there are {sorted(owners) or 'none'}"
            )
        if owner.width != column.width:
            raise ValueError(
                f"{who}: width={column.width}, but column {owner.name!r}, whose"
                f" table it shares, has width={owner.width}"
            )


# Chapter 'Features', section 'The encoder'
def check_leaks(
    columns: Iterable[Column], tasks: tuple[Task, ...], weight: str | None
) -> None:
    """Refuse a column with two roles: input, row weight, or of a task."""
    roles = {t.given: f"the given column of task {t.name!r}" for t in tasks}
    roles |= {t.column: f"the label of task {t.name!r}" for t in tasks}
    if weight is not None and weight in roles:
        raise ValueError(
            f"column {weight!r} is {roles[weight]} and cannot be the row weight"
        )
    roles[weight] = "the row weight"
    for column in columns:
        if column.name in roles:
            raise ValueError(
                f"column {column.name!r} is {roles[column.name]} and cannot be"
                " an input; take it out of the columns"
            )


# Chapter 'Features', section 'The encoder'
def lay_out(columns: Iterable[Column]) -> dict[str, slice]:
    """Where each column of ids lies along the positions of `Batch.ids`."""
    positions, start = {}, 0
    for column in columns:
        if isinstance(column, IdColumn):
            size = column.length if isinstance(column, Sequence) else 1
            positions[column.name] = slice(start, start + size)
            start += size
    return positions


# Chapter 'Features', section 'The encoder'
class Encoder:
    """Rows of a DataFrame to a `Batch`, by what the training rows taught it.

    `columns` are the inputs, `tasks` say which columns are labels, and `weight`
    names a column of row weights. Further columns of the rows are ignored.

    `positions` tells where each column of ids lies along `Batch.ids`, and
    `dense_names` the columns of `Batch.dense`. After `fit`, `tables` and
    `vocabularies` hold what was learned, and `fingerprint` names it.

    Raises: TypeError or ValueError for columns and tasks that do not fit.
    """

    def __init__(
        self,
        columns: Iterable[Column],
        tasks: Iterable[Task],
        *,
        weight: str | None = None,
    ) -> None:
        self.columns = check_columns(columns)
        check_list("tasks", tasks)
        self.tasks = check_tasks(tasks)
        self.weight = weight
        check_shares(self.columns)
        check_leaks(self.columns, self.tasks, weight)
        self.positions = lay_out(self.columns)
        dense = [column for column in self.columns if isinstance(column, Dense)]
        self.dense_names = tuple(column.name for column in dense)
        self._lookups: dict[str, Vocabulary | Buckets] = {}
        self._scalers: dict[str, Scaler] = {}
        self._fitted = False
        self._fingerprint: str | None = None
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        state = "fitted" if self._fitted else "not fitted"
        columns, tasks = len(self.columns), len(self.tasks)
        return f"Encoder(columns={columns}, tasks={tasks}, {state})"

    def _readers(self) -> list[IdColumn]:
        """The columns of ids."""
        return [c for c in self.columns if isinstance(c, IdColumn)]

    def _learn_table(self, owner: IdColumn, rows: pd.DataFrame) -> Vocabulary | Buckets:
        """A table's lookup, from all the columns that read it."""
        if owner.buckets is not None:
            return Buckets(owner.buckets)
        parts = []
        for column in self._readers():
            if column.table == owner.name:
                parts += count_column(column, rows[column.name])
        return learn_vocabulary(parts, owner.min_count)

    def _learn_scale(self, column: Dense, rows: pd.DataFrame) -> Scaler:
        """A dense column's scaler."""
        with naming(f"column {column.name!r}"):
            return Scaler(column, len(rows)).fit(read_numbers(rows[column.name]))

    def fit(self, rows: pd.DataFrame) -> Encoder:
        """Learn vocabularies and scales from training rows. Labels stay unread.

        A second call starts from scratch. Returns the encoder itself.

        Raises: KeyError, TypeError or ValueError naming the column at fault.
        """
        check_rows(rows, [column.name for column in self.columns])
        if len(rows) == 0:
            raise ValueError("rows: fit needs at least one row, found none")
        owners = [c for c in self._readers() if c.shares is None]
        dense = [c for c in self.columns if isinstance(c, Dense)]
        lookups = {c.name: self._learn_table(c, rows) for c in owners}
        scalers = {c.name: self._learn_scale(c, rows) for c in dense}
        self._lookups, self._scalers, self._fitted = lookups, scalers, True
        self._fingerprint, self._warned = None, set()
        return self

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise NotFittedError("this Encoder has learned nothing yet; call fit first")

    @property
    def tables(self) -> dict[str, Table]:
        """The tables that ids read, by the name of the column that owns them."""
        self._check_fitted()
        return {
            column.name: Table(self._lookups[column.name].rows, column.width)
            for column in self._readers()
            if column.shares is None
        }

    @property
    def vocabularies(self) -> dict[str, tuple]:
        """The values with an id of their own, by table; hashed tables have none."""
        self._check_fitted()
        return {
            name: lookup.values
            for name, lookup in self._lookups.items()
            if isinstance(lookup, Vocabulary)
        }

    def to_json(self) -> str:
        """Everything that `transform` needs, as text for `from_json`."""
        self._check_fitted()
        content = {
            "format": FORMAT,
            "columns": [
                {"type": type(column).__name__} | asdict(column)
                for column in self.columns
            ],
            "tasks": [task_settings(task) for task in self.tasks],
            "weight": self.weight,
            "vocabularies": self.vocabularies,
            "scalers": {name: scaler.state() for name, scaler in self._scalers.items()},
        }
        return json.dumps(content, allow_nan=False)

    @property
    def fingerprint(self) -> str:
        """32 hex digits, equal for encoders whose `to_json` is equal."""
        if self._fingerprint is None:
            text = self.to_json().encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(text, digest_size=16)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _ids(self, rows: pd.DataFrame) -> Int[np.ndarray, "rows positions"]:
        """The ids of all columns, side by side."""
        width = sum(place.stop - place.start for place in self.positions.values())
        ids = np.empty((len(rows), width), dtype=np.int64)
        for column in self._readers():
            place, table = self.positions[column.name], self._lookups[column.table]
            with naming(f"column {column.name!r}", ID_HINT):
                if isinstance(column, Sequence):
                    look_up_lists(rows[column.name], table, ids[:, place])
                else:
                    ids[:, place.start] = look_up(rows[column.name], table)
        return ids

    def _dense(self, rows: pd.DataFrame) -> Float[np.ndarray, "rows dense"]:
        """All scaled numbers, in single precision."""
        dense = np.empty((len(rows), len(self.dense_names)), dtype=np.float32)
        for place, name in enumerate(self.dense_names):
            with naming(f"column {name!r}"):
                numbers = read_numbers(rows[name])
                dense[:, place] = single(self._scalers[name].transform(numbers))
        return dense

    def _targets(self, rows: pd.DataFrame) -> list[str]:
        """The columns to read as labels and weight: at prediction time, none."""
        targets: list[str | None] = []
        if any(task.column in rows for task in self.tasks):
            for task in self.tasks:
                targets += [task.column, task.given]
        if targets or self.weight in rows:
            targets.append(self.weight)
        return [name for name in dict.fromkeys(targets) if name is not None]

    def _labels(self, rows: pd.DataFrame) -> Float[np.ndarray, "rows tasks"]:
        """The labels of all tasks; NaN everywhere if the rows hold none."""
        labels = np.full((len(rows), len(self.tasks)), np.nan, dtype=np.float32)
        for place, task in enumerate(self.tasks):
            if task.column in rows:
                labels[:, place] = read_labels(rows, task)
        return labels

    def _weights(self, rows: pd.DataFrame) -> Float[np.ndarray, " rows"]:
        """The row weights, which are finite and not negative."""
        with naming(f"row weight {self.weight!r}"):
            weights = read_numbers(rows[self.weight])
            refuse(~(weights >= 0), "negative or missing weight", weights)
            return single(weights)

    def _knows_any(
        self, column: IdColumn, ids: Int[np.ndarray, "rows positions"]
    ) -> bool:
        """Whether any value of a column is known from training."""
        missing = self._lookups[column.table].missing
        for start in range(0, len(ids), BLOCK):
            part = ids[start : start + BLOCK, self.positions[column.name]]
            if ((part > 0) & (part != missing)).any():
                return True
        return False

    def _warn_if_strange(
        self, rows: pd.DataFrame, ids: Int[np.ndarray, "rows positions"]
    ) -> None:
        """Warn of columns in which not one value is known."""
        for column in self._readers():
            name, table = column.name, self._lookups[column.table]
            if isinstance(table, Buckets) or name in self._warned:
                continue
            if self._knows_any(column, ids):
                continue
            found = first_values(column, rows[name])
            if len(found) == 3:
                self._warned.add(name)
                warnings.warn(
                    f"column {name!r}: no value is known from training; found"
                    f" {found}, training had {table.listed[:3]}",
                    stacklevel=3,
                )

    def transform(self, rows: pd.DataFrame) -> Batch:
        """Encode rows: ids in int64, numbers, labels and weights in float32.

        Rows without any label column, as at prediction time, get NaN labels.

        Raises: KeyError, TypeError or ValueError naming the column or task at
        fault; NotFittedError before fit.
        """
        self._check_fitted()
        check_rows(rows, [column.name for column in self.columns])
        targets = self._targets(rows)
        check_rows(rows, targets)
        weights = self._weights(rows) if self.weight in targets else None
        ids = self._ids(rows)
        self._warn_if_strange(rows, ids)
        return Batch(
            ids=torch.from_numpy(ids),
            dense=torch.from_numpy(self._dense(rows)),
            labels=torch.from_numpy(self._labels(rows)),
            weights=None if weights is None else torch.from_numpy(weights),
            encoder=self.fingerprint,
        )

    def unseen(self, rows: pd.DataFrame) -> pd.Series:
        """For each column of ids, the share of its values that read row 0."""
        self._check_fitted()
        check_rows(rows, list(self.positions))
        ids = self._ids(rows)
        shares = {}
        for name, place in self.positions.items():
            values = ids[:, place][ids[:, place] != PADDING]
            shares[name] = (values == 0).mean() if len(values) else np.nan
        return pd.Series(shares, name="unseen", dtype=np.float64)

    def _restore(self, content: dict[str, Any]) -> Encoder:
        """Take over what the encoder that wrote `content` had learned."""
        for column in self._readers():
            if column.buckets is not None:
                self._lookups[column.name] = Buckets(column.buckets)
            elif column.shares is None:
                values = content["vocabularies"][column.name]
                self._lookups[column.name] = vocabulary_from(values)
        for dense in self.columns:
            if isinstance(dense, Dense):
                state = content["scalers"][dense.name]
                self._scalers[dense.name] = Scaler(dense).restore(state)
        self._fitted = True
        return self

    @classmethod
    def from_json(cls, text: str) -> Encoder:
        """The encoder that `to_json` wrote as `text`; ValueError if it did not."""
        with naming("this text is not JSON"):
            content = json.loads(text)
        found = content.get("format") if isinstance(content, dict) else content
        if found != FORMAT:
            raise ValueError(f"expected JSON of format {FORMAT!r}, found {found!r}")
        try:
            columns = [column_from(settings) for settings in content["columns"]]
            tasks = [task_from(settings) for settings in content["tasks"]]
            encoder = cls(columns, tasks, weight=content["weight"])
            return encoder._restore(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"this JSON describes no Encoder: {error!r}"
            raise ValueError(reason) from error


# Chapter 'Features', section 'The encoder'
def check_rows(rows: pd.DataFrame, names: list[str]) -> None:
    """Refuse rows in which a named column is missing or there twice."""
    if not isinstance(rows, pd.DataFrame):
        kind = type(rows).__name__
        raise TypeError(f"rows: expected a DataFrame, found {kind}")
    if isinstance(rows.columns, pd.MultiIndex):
        raise TypeError(
            f"rows: the column names have {rows.columns.nlevels} levels (a"
            " MultiIndex), expected plain strings; join the levels first"
        )
    absent = [name for name in names if name not in rows.columns]
    if absent:
        raise KeyError(
            f"rows: no columns {absent}; expected {names},"
            f" found {rows.columns.tolist()}"
        )
    needed = rows.columns[rows.columns.isin(names)]
    if needed.has_duplicates:
        twice = needed[needed.duplicated()].unique().tolist()
        raise ValueError(f"rows: more than one column is called {twice[0]!r}")


ID_HINT = (
    "; an id is a string, an integer, a boolean, a category, or a float that"
    " holds a whole number below 2**53 (float32: below 2**24)"
)


# Chapter 'Features', section 'The encoder'
def count_column(column: IdColumn, cells: pd.Series) -> list[tuple[pd.Series, int]]:
    """The counts of a column's values, as `learn_vocabulary` takes them."""
    with naming(f"column {column.name!r}", ID_HINT):
        if isinstance(column, Sequence):
            found = blocks(cells, column.length, 4 * BLOCK)
            return [count_ids(values) for _, values, _ in found]
        return [count_ids(cells)]


# Chapter 'Features', section 'The encoder'
@dataclass(frozen=True)
class Table:
    """An embedding table's size: ids 0 to rows - 1, vectors of `width`."""

    rows: int
    width: int


FORMAT = "mtl_annotated.Encoder/1"


# Chapter 'Features', section 'The encoder'
def task_settings(task: Task) -> dict[str, Any]:
    """A task's settings for JSON, without a `weight_ratio` of 1."""
    settings = asdict(task)
    if task.weight_ratio == 1:
        del settings["weight_ratio"]
    return settings


# Chapter 'Features', section 'The encoder'
def single(
    numbers: Float[np.ndarray, " rows"],
) -> Float[np.ndarray, " rows"]:
    """Numbers in float32; ValueError for one that is too large for it."""
    with np.errstate(over="ignore"):
        short = numbers.astype(np.float32)
    what = "too large for float32 (divide the column by a constant first)"
    refuse(np.isinf(short), what, numbers)
    return short


# Chapter 'Features', section 'The encoder'
def read_binary(values: pd.Series) -> Float[np.ndarray, " rows"]:
    """0, 1, and NaN for missing; ValueError for any other value."""
    odd = (values.notna() & ~values.isin([0, 1])).to_numpy(dtype=bool)
    refuse(odd, "expected 0, 1, True, False or missing; another value", values)
    return values.to_numpy(dtype=np.float64, na_value=np.nan)


# Chapter 'Features', section 'The encoder'
def read_classes(
    values: pd.Series, classes: int | Iterable
) -> Float[np.ndarray, " rows"]:
    """Positions of classes, NaN for missing; ValueError for an unknown one."""
    listed = list(range(classes) if isinstance(classes, int) else classes)
    cells = pd.Index(values.to_numpy(dtype=object), dtype=object)
    found = pd.Index(listed, dtype=object).get_indexer(cells)
    missing = values.isna().to_numpy()
    expected = f"expected one of {listed} or missing; another value"
    refuse((found < 0) & ~missing, expected, values)
    return np.where(missing, np.nan, found)


# Chapter 'Features', section 'The encoder'
def read_labels(rows: pd.DataFrame, task: Task) -> Float[np.ndarray, " rows"]:
    """A task's labels; NaN where there is none or the task does not apply."""
    with naming(f"task {task.name!r}: label column {task.column!r}"):
        if task.kind == "binary":
            labels = read_binary(rows[task.column])
        elif task.classes is not None:
            labels = read_classes(rows[task.column], task.classes)
        else:
            labels = read_numbers(rows[task.column])
        labels = single(labels)
    if task.given is None:
        return labels
    with naming(f"task {task.name!r}: given column {task.given!r}"):
        return np.where(read_binary(rows[task.given]) == 1, labels, np.nan)


# Chapter 'Features', section 'The encoder'
def first_values(column: IdColumn, cells: pd.Series) -> list:
    """Up to three different values of a column of ids, for a message."""
    parts = [cells]
    if isinstance(column, Sequence):
        parts = [values for _, values, _ in blocks(cells, column.length, BLOCK)]
    found = [pd.Series(part.dropna().unique()) for part in parts]
    return pd.concat(found)[:3].tolist() if found else []


COLUMN_TYPES = {"Sparse": Sparse, "Dense": Dense, "Sequence": Sequence}


# Chapter 'Features', section 'The encoder'
def column_from(settings: dict[str, Any]) -> Column:
    """A column from its settings in JSON."""
    settings = dict(settings)
    return COLUMN_TYPES[settings.pop("type")](**settings)


# Chapter 'Features', section 'The encoder'
def task_from(settings: dict[str, Any]) -> Task:
    """A task from its settings in JSON, which turned a tuple into a list."""
    classes = settings["classes"]
    if isinstance(classes, list):
        settings = settings | {"classes": tuple(classes)}
    return Task(**settings)


# Chapter 'Features', section 'The encoder'
def vocabulary_from(values: Any) -> Vocabulary:
    """A vocabulary from its values in JSON, all of which must differ."""
    known = [value for value in values if value is not None]
    if type(values) is not list or len({*map(str, known)}) < len(known):
        raise ValueError("a vocabulary is a list of different values")
    return Vocabulary(values)


STD = 0.05


# Chapter 'Features', section 'One lookup for each width'
def packed_weight(tables: list[Table]) -> nn.Parameter:
    """Tables of one width below each other: normal, row 0 of each at zero."""
    rows = [table.rows for table in tables]
    weight = torch.randn(sum(rows), tables[0].width).mul_(STD)
    weight[np.cumsum([0, *rows[:-1]])] = 0
    return nn.Parameter(weight)


# Chapter 'Features', section 'One lookup for each width'
def first_rows(tables: dict[str, Table]) -> dict[str, int]:
    """Where each table starts in the packed weight of its width."""
    first: dict[str, int] = {}
    ends: dict[int, int] = {}
    for name, table in tables.items():
        first[name] = ends.get(table.width, 0)
        ends[table.width] = first[name] + table.rows
    return first


# Chapter 'Features', section 'One lookup for each width'
def reads(encoder: Encoder) -> dict[int, list[tuple[int, int, int]]]:
    """For each width its reads: a position, its table's last id and first row."""
    tables, first = encoder.tables, first_rows(encoder.tables)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for column in encoder.columns:
        if isinstance(column, IdColumn):
            place = encoder.positions[column.name]
            found.setdefault(column.width, []).extend(
                (position, tables[column.table].rows - 1, first[column.table])
                for position in range(place.start, place.stop)
            )
    return found


# Chapter 'Features', section 'One lookup for each width'
class Piece(NamedTuple):
    """A stretch of the output: the next `size` places of a `source`.

    The source is an embedding width, or 0 for the dense columns. `pooling` is
    None except for a sequence.
    """

    source: int
    size: int
    pooling: str | None


# Chapter 'Features', section 'One lookup for each width'
def piece_of(column: Column) -> Piece:
    """The piece that one column fills."""
    source = column.width if isinstance(column, IdColumn) else 0
    if isinstance(column, Sequence):
        return Piece(source, column.length, column.pooling)
    return Piece(source, 1, None)


# Chapter 'Features', section 'One lookup for each width'
def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """The same output in fewer pieces."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        pooled = piece.pooling or (last and last.pooling)
        if last and not pooled and last.source == piece.source:
            merged[-1] = last._replace(size=last.size + piece.size)
        else:
            merged.append(piece)
    return merged


# Chapter 'Features', section 'One lookup for each width'
class FeatureEmbedding(nn.Module):
    """A `Batch` to its input vectors [batch, width], column after column.

    A column of ids gives a vector, a dense column its number. Every instance
    has weights of its own, drawn from PyTorch's global generator. `width` is
    the output's, `encoder` the fingerprint of the encoder at construction,
    `by_row` the widths whose gradient is sparse, none at first.

    Raises: NotFittedError if the encoder has not been fitted.
    """

    order: Tensor
    last: Tensor
    first: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        found = reads(encoder)
        tables = list(encoder.tables.values())
        self.weights = nn.ParameterDict()
        for width in found:
            same = [table for table in tables if table.width == width]
            self.weights[str(width)] = packed_weight(same)
        self.counts = {width: len(places) for width, places in found.items()}
        flat: list[tuple[int, int, int]] = sum(found.values(), [])
        for place, name in enumerate(("order", "last", "first")):
            buffer = torch.tensor([entry[place] for entry in flat])
            self.register_buffer(name, buffer.long(), persistent=False)
        self.in_order = flat == sorted(flat)
        self.pieces = merge(map(piece_of, encoder.columns))
        self.pooled = any(piece.pooling for piece in self.pieces)
        self.sizes: dict[int, list[int]] = {}
        for piece in self.pieces:
            self.sizes.setdefault(piece.source, []).append(piece.size)
        self.width = sum(getattr(c, "width", 1) for c in encoder.columns)
        self.by_row: frozenset[int] = frozenset()
        self.encoder = encoder.fingerprint

    def by_width(self, values: Tensor) -> dict[int, Tensor]:
        """Values [batch, positions], sorted by `order`, a part for each width."""
        parts = cut(values, list(self.counts.values()))
        return dict(zip(self.counts, parts, strict=True))

    def inside(
        self, ids: Int[Tensor, "batch positions"]
    ) -> Bool[Tensor, "batch positions"]:
        """Which ids, sorted by `order`, lie in their tables; padding lies in none."""
        return ids.clamp(min=0).minimum(self.last) == ids

    def look_up(
        self, ids: Int[Tensor, "batch positions"], *, trusted: bool
    ) -> dict[int, Tensor]:
        """The vectors of ids: for each width [batch, its positions, width].

        Ids that are not trusted to lie in their tables are compared with them.
        """
        if not trusted:
            ids = ids * self.inside(ids)
        packed = self.by_width(ids + self.first)
        return {
            width: read_rows(
                self.weights[str(width)], rows, sparse=width in self.by_row
            )
            for width, rows in packed.items()
        }

    def in_pieces(self, by_width: dict[int, Tensor], dense: Tensor) -> list[Tensor]:
        """What each piece of the output takes from its source."""
        sources = {0: dense, **by_width}
        parts = {
            source: iter(cut(sources[source], sizes))
            for source, sizes in self.sizes.items()
        }
        return [next(parts[piece.source]) for piece in self.pieces]

    def check(self, batch: Batch) -> None:
        """Refuse a batch of another encoder."""
        if batch.encoder is not None and batch.encoder != self.encoder:
            raise ValueError(
                "the batch and the model come from different encoders, or from"
                f" one that was fitted again in between: the batch has fingerprint"
                f" {batch.encoder[:8]}, the model {self.encoder[:8]}"
            )
        if batch.ids.shape[1] != len(self.order):
            raise ValueError(
                f"the batch has {batch.ids.shape[1]} positions of ids, the"
                f" embedding {len(self.order)}; both must come from one encoder"
            )

    def forward(self, batch: Batch) -> Float[Tensor, "batch width"]:
        """Vectors and numbers of all columns, in the order of their declaration.

        Raises: ValueError for a batch of another encoder.
        """
        self.check(batch)
        ids = self.arranged(batch.ids)
        # A compiled program would otherwise be compiled for clean batches and for others.
        looks = torch.compiler.is_compiling() or self.pooled or not batch.clean
        vectors = self.look_up(ids, trusted=not looks)
        parts = masks = self.in_pieces(vectors, batch.dense)
        if self.pooled:
            real = self.by_width(ids != PADDING)
            masks = self.in_pieces(real, batch.dense)
        flat = [
            part.flatten(1) if pooling is None else pool(part, mask, pooling)
            for (*_, pooling), part, mask in zip(self.pieces, parts, masks, strict=True)
        ]
        return torch.cat(flat, 1)

    def arranged(
        self, ids: Int[Tensor, "rows positions"]
    ) -> Int[Tensor, "rows positions"]:
        """The columns of ids, those of one width next to each other."""
        return ids if self.in_order else ids.index_select(1, self.order)

    def inspected(self, batch: Batch) -> Batch:
        """The same rows, `clean` if no label is missing and each id lies in its table.

        One missing label, of whatever task, is enough for no. Padding is fine where there
        are sequences. Raises: ValueError for a batch of another encoder.
        """
        self.check(batch)
        clean = not batch.labels.isnan().any()
        for part in batch.ids.split(BLOCK):
            if not clean:
                break
            ids = self.arranged(part)
            inside = self.inside(ids)
            clean = bool((inside | (ids == PADDING) if self.pooled else inside).all())
        return replace(batch).marked(clean)

    def get_extra_state(self) -> str:
        """The fingerprint, to be stored with the weights."""
        return self.encoder

    def set_extra_state(self, state: str) -> None:
        """Refuse weights that were trained with another encoder."""
        if state != self.encoder:
            raise ValueError(
                "these weights were trained with another encoder: theirs has"
                f" fingerprint {state[:8]}, the model's {self.encoder[:8]}; load"
                " the encoder that was stored with them"
            )


# Chapter 'Features', section 'One lookup for each width'
def cut(values: Tensor, sizes: list[int]) -> Iterable[Tensor]:
    """Values [batch, places, ...] in parts of these sizes."""
    return (values,) if len(sizes) == 1 else values.split(sizes, 1)


# Chapter 'Features', section 'One lookup for each width'
def read_rows(
    weight: Float[Tensor, "rows width"],
    rows: Int[Tensor, "batch positions"],
    *,
    sparse: bool,
) -> Float[Tensor, "batch positions width"]:
    """The rows of a packed weight; `sparse` is how its gradient is kept."""
    if sparse or rows.device.type != "cpu":
        return F.embedding(rows, weight, sparse=sparse)
    return weight.index_select(0, rows.flatten()).unflatten(0, rows.shape)


# Chapter 'Features', section 'One lookup for each width'
def pool(
    vectors: Float[Tensor, "batch length width"],
    real: Bool[Tensor, "batch length"],
    pooling: str,
) -> Float[Tensor, "batch width"]:
    """One vector of each row's real ones; zeros if it has none."""
    if pooling == "max":
        top = vectors.masked_fill(~real.unsqueeze(2), -math.inf).amax(1)
        return top.where(real.any(1, keepdim=True), 0)
    total = torch.einsum("blw,bl->bw", vectors, real.to(vectors.dtype))
    if pooling == "sum":
        return total
    return total / real.sum(1, keepdim=True).clamp(min=1)
