"""The chapter `features`: ids, numbers, lists and labels to tensors, and the lookup."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, asdict, replace
from decimal import Decimal

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import (
    MinMaxScaler,
    OrdinalEncoder,
    QuantileTransformer,
    StandardScaler,
)
from torch.func import functional_call, stack_module_state

from mtl_annotated import features
from mtl_annotated.features import (
    PADDING,
    POOLINGS,
    SCALES,
    STD,
    Batch,
    Buckets,
    Dense,
    Encoder,
    FeatureEmbedding,
    Scaler,
    Sequence,
    Sparse,
    Table,
    Vocabulary,
    bucket,
    count_ids,
    id_text,
    integer_or_text,
    learn_vocabulary,
    look_up,
    pool,
)
from mtl_annotated.tasks import Task

CLICK = Task("click")
TASKS = (CLICK, Task("purchase", given="click"))


@pytest.fixture(scope="module")
def plain():
    """The module without run-time type checks, to see its own messages."""
    spec = importlib.util.spec_from_file_location("plain_features", features.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_features"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plain_features"]


@pytest.fixture
def rows():
    return pd.DataFrame(
        {
            "user": ["ana", "bo", "ana", "cem", "bo"],
            "item": [31, 17, 17, 42, 31],
            "history": [[17, 31], [], None, (42,), np.array([31, 17, 42])],
            "age": [25, 40, np.nan, 31, 40],
            "price": [1.5, 3.0, 0.0, 20.0, 7.0],
            "click": [1, 0, 0, 1, 1],
            "purchase": [0, 0, 0, 1, 0],
        }
    )


@pytest.fixture
def columns():
    return [
        Sparse("user", width=3),
        Dense("age", missing="median"),
        Sequence("history", shares="item", width=2, length=2),
        Dense("price", scale="log"),
        Sparse("item", width=2),
    ]


@pytest.fixture
def encoder(columns, rows):
    return Encoder(columns, TASKS).fit(rows)


def message(text):
    return re.escape(text)


# Columns


@pytest.mark.parametrize(
    "column", [Sparse("a"), Dense("a"), Sequence("a")], ids=lambda c: type(c).__name__
)
def test_columns_are_frozen_hashable_and_comparable(column):
    with pytest.raises(FrozenInstanceError):
        column.name = "b"
    assert column == type(column)(**asdict(column))
    assert len({column, type(column)("a")}) == 1


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        Sparse("a", 8)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Sparse("u", width=0), "'u': width must be an integer of at least 1"),
        (lambda: Sparse("u", width=-3), "found -3"),
        (lambda: Sparse("u", buckets=0), "'u': buckets must be an integer of at least"),
        (lambda: Sparse("u", min_count=0), "'u': min_count must be"),
        (lambda: Sequence("h", length=0), "'h': length must be"),
        (
            lambda: Sequence("h", pooling="avg"),
            "'h': unknown pooling 'avg', choose from 'mean', 'sum', 'max'",
        ),
        (
            lambda: Dense("a", scale="zscore"),
            "'a': unknown scale 'zscore', choose from 'standard', 'minmax'",
        ),
        (
            lambda: Dense("a", missing="zero"),
            "'a': unknown missing 'zero', choose from 'mean', 'median'",
        ),
        (lambda: Dense("a", missing=float("nan")), "'a': missing must be 'mean'"),
        (
            lambda: Sparse("u", buckets=9, min_count=2),
            "'u': min_count=2 needs a vocabulary, and buckets=9 keeps none",
        ),
        (lambda: Sparse("u", shares="u"), "'u': shares must name another column"),
        (
            lambda: Sparse("u", shares="v", buckets=9),
            "'u': buckets and min_count are set where the table is, in column 'v'",
        ),
        (lambda: Sequence("u", shares="v", min_count=2), "leave them out here"),
    ],
)
def test_columns_refuse_settings_of_no_meaning(make, expected):
    with pytest.raises(ValueError, match=message(expected)):
        make()


def test_columns_refuse_other_types(plain):
    with pytest.raises(TypeError, match="'u': width must be an integer .* found 0.5"):
        plain.Sparse("u", width=0.5)
    expected = (
        "a column needs a name, expected a str, found 0;"
        " frame.rename(columns=str) makes all names of a frame strings"
    )
    with pytest.raises(TypeError, match=message(expected)):
        plain.Sparse(0)
    with pytest.raises(TypeError, match="expected a str, found ''"):
        plain.Dense("")
    for size in (True, np.float64(3)):
        with pytest.raises(TypeError, match="'u': width must be an integer"):
            plain.Sparse("u", width=size)
    with pytest.raises(ValueError, match="'a': missing must be .* found True"):
        plain.Dense("a", missing=True)


def test_numpy_numbers_become_plain_settings(plain):
    column = plain.Sequence("h", width=np.int64(3), length=np.uint8(5))
    assert column == plain.Sequence("h", width=3, length=5)
    assert json.dumps(asdict(column))
    for missing, kind in ((np.int64(0), int), (np.float32(0.5), float)):
        found = plain.Dense("a", missing=missing).missing
        assert (found, type(found)) == (missing, kind)


# Ids


SAME = [
    pd.Series([17, 3, 17]),
    pd.Series([17, 3, 17], dtype="int32"),
    pd.Series([17, 3, 17], dtype="uint8"),
    pd.Series([17, 3, 17], dtype="uint64"),
    pd.Series([17, 3, 17], dtype="Int64"),
    pd.Series([17.0, 3.0, 17.0]),
    pd.Series([17.0, 3.0, 17.0], dtype="float32"),
    pd.Series(["17", "3", "17"]),
    pd.Series(["17", "3", "17"], dtype=object),
    pd.Series(["17", "3", "17"], dtype="string"),
    pd.Series([17, "3", 17.0], dtype=object),
    pd.Series([np.int64(17), Decimal(3) and 3, "17"], dtype=object),
    pd.Series(["17", "3", "17"], dtype="category"),
    pd.Series([17, 3, 17], dtype="category"),
]


@pytest.mark.parametrize("seen", SAME, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("served", SAME, ids=lambda s: str(s.dtype))
def test_an_id_is_its_text_whatever_its_type(seen, served):
    vocabulary = learn_vocabulary([count_ids(seen)])
    assert vocabulary.values == (3, 17)
    np.testing.assert_array_equal(look_up(served, vocabulary), [2, 1, 2])
    hashed = [bucket("17", 1000), bucket("3", 1000), bucket("17", 1000)]
    np.testing.assert_array_equal(look_up(served, Buckets(1000)), hashed)


def test_one_gap_changes_the_type_of_a_column_but_not_its_ids():
    vocabulary = learn_vocabulary([count_ids(pd.Series([17, 3]))])
    for gap in (None, np.nan, pd.NA):
        for values in ([17, gap, 3], ["17", gap, "3"]):
            served = pd.Series(values, dtype=object)
            np.testing.assert_array_equal(look_up(served, vocabulary), [2, 0, 1])
            inferred = served.infer_objects()
            np.testing.assert_array_equal(look_up(inferred, vocabulary), [2, 0, 1])
            np.testing.assert_array_equal(look_up(served, Buckets(9))[1], 0)


def test_booleans_count_as_0_and_1():
    vocabulary = learn_vocabulary([count_ids(pd.Series([True, False]))])
    assert vocabulary.values == (0, 1)
    served = pd.Series([1, True, 0, "1"], dtype=object)
    np.testing.assert_array_equal(look_up(served, vocabulary), [2, 2, 1, 2])
    nullable = pd.Series([True, None], dtype="boolean")
    np.testing.assert_array_equal(look_up(nullable, vocabulary), [2, 0])


def test_large_integers_keep_their_last_digit():
    ids = [2**62, 2**62 + 1, 16_777_216, 16_777_217]
    vocabulary = learn_vocabulary([count_ids(pd.Series(ids))])
    assert len(vocabulary.values) == 4
    for served in (
        pd.Series(ids),
        pd.Series(ids, dtype=object),
        pd.Series([*ids, None], dtype=object),
    ):
        assert set(look_up(served, vocabulary)[:4]) == {1, 2, 3, 4}
    beyond = pd.Series([2**63 + 1, 2**63 + 2], dtype="uint64")
    listed = learn_vocabulary([count_ids(beyond)])
    np.testing.assert_array_equal(look_up(beyond, listed), [1, 2])
    np.testing.assert_array_equal(look_up(beyond.astype(str), listed), [1, 2])


@pytest.mark.parametrize(
    "values", [[1, 0.5], [1.0, np.inf], [float(2**53), 1.0], ["a", b"b"], [0.5, "a"]]
)
@pytest.mark.parametrize("table", [Vocabulary([1]), Buckets(9)])
def test_what_is_no_id_is_refused(values, table):
    with pytest.raises(TypeError, match="is not an id"):
        look_up(pd.Series(values), table)
    with pytest.raises(TypeError, match="is not an id"):
        count_ids(pd.Series(values))


def test_dates_are_no_ids():
    expected = (
        "is not an id; of a date take .dt.hour or .dt.dayofweek, or make it an id"
    )
    for values in (
        pd.to_datetime(["2024-01-01"]),
        pd.Series([pd.Timestamp(0).date()], dtype=object),
    ):
        with pytest.raises(TypeError, match=message(expected)):
            look_up(pd.Series(values), Buckets(9))
    rows = pd.DataFrame({"s": ["2024-01-01"]})
    encoder = Encoder([Sparse("s")], [CLICK])
    assert encoder.fit(rows).vocabularies == {"s": ("2024-01-01",)}


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float16", 2**11), ("float32", 2**24), ("Float32", 2**24), ("float64", 2**53)],
)
def test_floats_are_ids_up_to_the_digits_of_their_type(dtype, bound):
    fine = pd.Series([bound - 1, 3, -bound + 1], dtype=dtype)
    vocabulary = learn_vocabulary([count_ids(fine)])
    assert vocabulary.values == (1 - bound, 3, bound - 1)
    np.testing.assert_array_equal(look_up(fine, vocabulary), [3, 2, 1])
    # Both become the same float.
    merged = pd.Series([bound, bound + 1], dtype=dtype)
    assert merged.nunique() == 1
    cells = [merged, merged.astype("category") if dtype != "float16" else merged]
    if dtype == "float32":
        cells.append(pd.Series([np.float32(bound), np.float32(3)], dtype=object))
    for values in cells:
        for call in (
            lambda values=values: count_ids(values),
            lambda values=values: look_up(values, vocabulary),
            lambda values=values: look_up(values, Buckets(9)),
        ):
            with pytest.raises(TypeError, match="is not an id"):
                call()
    with pytest.raises(TypeError, match="column 'h': .* is not an id"):
        listed([merged.to_numpy(dtype=dtype.lower())])


@pytest.mark.parametrize("dtype", [object, None, "category"])
def test_strings_of_numpy_are_strings(dtype):
    words = [np.str_("b"), np.str_("17"), np.str_("a")]
    values = pd.Series(words if dtype else np.array(words), dtype=dtype)
    vocabulary = learn_vocabulary([count_ids(values)])
    assert vocabulary.values == (17, "a", "b")
    assert [type(value) for value in vocabulary.values] == [int, str, str]
    np.testing.assert_array_equal(look_up(values, vocabulary), [3, 1, 2])
    np.testing.assert_array_equal(look_up(values, Buckets(99))[1], bucket("17", 99))
    encoder, ids = listed([np.array(words), words])
    assert encoder.vocabularies == {"h": (17, "a", "b")}
    assert ids[0][:3] == ids[1][:3] == [3, 1, 2]


VALUES = st.one_of(
    st.none(), st.integers(-(2**70), 2**70), st.text(max_size=5), st.booleans()
)


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_vocabulary_does_not_depend_on_the_order_of_rows(values, random):
    shuffled = random.sample(values, len(values))
    learned = [
        learn_vocabulary([count_ids(pd.Series(v, dtype=object))])
        for v in (values, shuffled)
    ]
    assert learned[0].values == learned[1].values
    ids = look_up(pd.Series(values, dtype=object), learned[0])
    assert (ids > 0).all()
    assert ids.max() < learned[0].rows
    again = Vocabulary(json.loads(json.dumps(learned[0].values)))
    assert again.values == learned[0].values


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=3), min_size=1), st.lists(st.text(max_size=3)))
def test_vocabulary_of_strings_equals_ordinal_encoder(seen, served):
    words = [[f"x{word}" for word in part] for part in (seen, served)]
    theirs = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    theirs.fit(np.array(words[0], dtype=object)[:, None])
    vocabulary = learn_vocabulary([count_ids(pd.Series(words[0], dtype="str"))])
    found = look_up(pd.Series(words[1], dtype="str"), vocabulary)
    if words[1]:
        expected = theirs.transform(np.array(words[1], dtype=object)[:, None])[:, 0] + 1
        np.testing.assert_array_equal(found, expected)


def slow_vocabulary(values, min_count=1):
    """Integers, strings and a gap, counted one by one."""
    counts, gaps = {}, 0
    for value in values:
        if pd.isna(value):
            gaps += 1
        else:
            counts[id_text(value)] = counts.get(id_text(value), 0) + 1
    kept = [integer_or_text(text) for text, n in counts.items() if n >= min_count]
    integers = sorted(value for value in kept if isinstance(value, int))
    strings = sorted(value for value in kept if isinstance(value, str))
    return (*integers, *strings, *[None] * (gaps >= min_count))


def slow_ids(values, listed):
    """The ids by definition: the place of the text, plus 1."""
    texts = [value if value is None else str(value) for value in listed]
    known = {text: place + 1 for place, text in enumerate(texts)}
    return [known.get(None if pd.isna(v) else id_text(v), 0) for v in values]


SMALL = st.sampled_from([0, 1, -1, 7, 200])
INT64 = st.one_of(SMALL, st.integers(-(2**63), 2**63 - 1))
UINT64 = st.one_of(SMALL.map(abs), st.integers(0, 2**64 - 1))
WORDS = st.one_of(st.sampled_from(["17", "017", "-1", "a", ""]), st.text(max_size=2))
OF_TYPE = {
    "int8": SMALL.map(lambda value: value % 100),
    "int64": INT64,
    "uint8": SMALL.map(abs),
    "uint32": SMALL.map(abs),
    "uint64": UINT64,
    "UInt64": st.one_of(UINT64, st.none()),
    "Int64": st.one_of(INT64, st.none()),
    "bool": st.booleans(),
    "boolean": st.one_of(st.booleans(), st.none()),
    "float64": st.one_of(st.integers(-(2**53) + 1, 2**53 - 1), st.none()),
    "str": st.one_of(WORDS, st.none()),
    "string": st.one_of(WORDS, st.none()),
    "object": st.one_of(WORDS, INT64, UINT64, st.booleans(), st.none()),
}


@st.composite
def cells(draw):
    dtype = draw(st.sampled_from([*OF_TYPE, "category"]))
    kind = draw(st.sampled_from(["str", "Int64"])) if dtype == "category" else dtype
    values = draw(st.lists(OF_TYPE[kind], max_size=9))
    return pd.Series(values, dtype=kind).astype(dtype)


@settings(deadline=None, max_examples=200)
@given(cells(), cells(), st.sampled_from([1, 2]))
def test_every_way_to_look_up_gives_the_ids_of_the_definition(seen, served, min_count):
    vocabulary = learn_vocabulary([count_ids(seen)], min_count)
    assert vocabulary.values == slow_vocabulary(seen.tolist(), min_count)
    for values in (seen, served):
        expected = slow_ids(values.tolist(), vocabulary.values)
        assert look_up(values, vocabulary).tolist() == expected
        hashed = [0 if pd.isna(v) else bucket(id_text(v), 7) for v in values.tolist()]
        assert look_up(values, Buckets(7)).tolist() == hashed


@pytest.mark.parametrize("dtype", ["int64", "uint32", "str", "object", "category"])
def test_what_needs_conversion_is_looked_up_once_for_each_value(dtype, monkeypatch):
    values = pd.Series([3, 1, 3, 99, 1, 3] * 10).astype(dtype)
    vocabulary, asked = learn_vocabulary([count_ids(values[:5])]), []
    ids = Vocabulary.ids
    monkeypatch.setattr(
        Vocabulary, "ids", lambda self, v: asked.append(len(v)) or ids(self, v)
    )
    assert look_up(values, vocabulary).tolist() == [2, 1, 2, 3, 1, 2] * 10
    direct = dtype == "int64" or getattr(values.dtype, "storage", "") == "python"
    assert asked == [60 if direct else 3]


def test_min_count_leaves_rare_values_and_rare_gaps_out():
    values = pd.Series(["a", "a", "b", "b", "b", "c", None])
    counts = [count_ids(values)]
    assert learn_vocabulary(counts, 1).values == ("a", "b", "c", None)
    assert learn_vocabulary(counts, 2).values == ("a", "b")
    assert learn_vocabulary(counts, 3).values == ("b",)
    assert learn_vocabulary(counts, 9).values == ()
    ids = look_up(values, learn_vocabulary(counts, 2))
    np.testing.assert_array_equal(ids, [1, 1, 2, 2, 2, 0, 0])


def test_missing_is_a_category_of_its_own_if_training_holds_some():
    vocabulary = learn_vocabulary([count_ids(pd.Series(["a", None, "b"]))])
    assert vocabulary.values == ("a", "b", None)
    for dtype in ("str", object, "string", "category"):
        served = pd.Series(["b", None, "new"], dtype=dtype)
        np.testing.assert_array_equal(look_up(served, vocabulary), [2, 3, 0])


def test_categories_that_do_not_occur_are_not_listed():
    values = pd.Series(pd.Categorical(["b"], categories=["a", "b", "c"]))
    assert learn_vocabulary([count_ids(values)]).values == ("b",)


@pytest.mark.parametrize("values", [["a", 1], [None, "a"], [1.5], [None, None]])
def test_vocabulary_refuses_another_order(plain, values):
    with pytest.raises(ValueError, match="a vocabulary lists integers, then strings"):
        plain.Vocabulary(values)


# Hashing


GOLDEN = {
    # text: buckets of 1,000 and of 1,000,000, as printed in the chapter
    "17": (257, 156257),
    "ana": (142, 215142),
    "日本": (161, 717161),
    "": (757, 838757),
    "-1": (160, 584160),
}


def test_buckets_are_fixed_for_ever():
    for text, expected in GOLDEN.items():
        assert (bucket(text, 1_000), bucket(text, 1_000_000)) == expected


def test_buckets_do_not_depend_on_the_process():
    code = "from mtl_annotated.features import bucket; print(bucket('ana', 10**6))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == 215142


def test_buckets_are_in_range_and_even():
    found = Buckets(10).ids(pd.RangeIndex(20_000))
    counts = np.bincount(found, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    # 2,000 expected in each; five standard deviations are 212.
    assert abs(counts[1:] - 2_000).max() < 212
    assert Buckets(1).ids(pd.Index(["a", "b"])).tolist() == [1, 1]


# Numbers


def scaled(scale, train, served, **options):
    scaler = Scaler(Dense("a", scale=scale, **options), len(train))
    return scaler.fit(np.array(train, float)).transform(np.array(served, float))


def test_scales_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    train, served = rng.lognormal(size=300), rng.lognormal(size=50)
    theirs = {
        "standard": StandardScaler(),
        "minmax": MinMaxScaler(),
        "quantile": QuantileTransformer(n_quantiles=300, subsample=None),
    }
    for scale, transformer in theirs.items():
        expected = transformer.fit(train[:, None]).transform(served[:, None])[:, 0]
        np.testing.assert_array_equal(scaled(scale, train, served), expected)
    np.testing.assert_array_equal(scaled("log", train, served), np.log1p(served))
    np.testing.assert_array_equal(scaled("none", train, served), served)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("train", [[7.0] * 4, [7.0], [0.0, 0.0]])
def test_constant_columns_and_single_rows_give_finite_numbers(scale, train):
    assert np.isfinite(scaled(scale, train, [7.0, 0.0, 1e6])).all()


def test_gaps_are_filled_in_raw_units_from_training_rows():
    train, served = [1.0, 2.0, 6.0, np.nan], [np.nan, 100.0]
    assert scaled("none", train, served, missing="mean").tolist() == [3.0, 100.0]
    assert scaled("none", train, served, missing="median").tolist() == [2.0, 100.0]
    assert scaled("none", train, served, missing=-5).tolist() == [-5.0, 100.0]
    assert scaled("log", train, served, missing=0)[0] == 0.0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("missing", [None, "mean", "median", 2, 0.1])
def test_scalers_come_back_from_json_to_the_last_bit(scale, missing):
    rng = np.random.default_rng(1)
    train, served = rng.lognormal(size=1_500), rng.lognormal(size=700)
    if missing is not None:
        train[::7] = served[::5] = np.nan
    column = Dense("a", scale=scale, missing=missing)
    scaler = Scaler(column, len(train)).fit(train)
    again = Scaler(column).restore(json.loads(json.dumps(scaler.state())))
    np.testing.assert_array_equal(again.transform(served), scaler.transform(served))
    assert again.state() == scaler.state()


@pytest.mark.parametrize(
    ("values", "options", "kind", "expected"),
    [
        (
            [1, np.nan, np.nan],
            {},
            ValueError,
            "column 'age': missing value (missing='mean', 'median' or a number would"
            " fill it) in 2 of 3 rows (first in row 1: nan)",
        ),
        (
            [1, 2, np.inf],
            {"missing": "mean"},
            ValueError,
            "column 'age': infinite value in 1 of 3 rows (first in row 2: inf)",
        ),
        (
            [1, -1, -7],
            {"scale": "log"},
            ValueError,
            "column 'age': log(1 + x) needs x > -1; too small in 2 of 3 rows"
            " (first in row 1: -1.0)",
        ),
        (
            [np.nan] * 3,
            {"missing": "median"},
            ValueError,
            "column 'age': all 3 training rows are missing, which leaves no median",
        ),
        (
            ["1", "2", "n/a"],
            {},
            TypeError,
            "column 'age': '1' is not a number (dtype str); convert the column, for"
            " instance with pandas.to_numeric",
        ),
        ([1, "n/a", 2], {}, TypeError, "column 'age': 'n/a' is not a number"),
        (
            pd.to_datetime(["2024-01-01"] * 3),
            {},
            TypeError,
            "column 'age': Timestamp('2024-01-01 00:00:00') is not a number (dtype"
            " datetime64[us]); of a date take .dt.hour or .dt.dayofweek, or make it"
            " an id with .astype(str)",
        ),
        ([[1], [2], [3]], {}, TypeError, "column 'age': [1] is not a number"),
    ],
)
def test_dense_columns_refuse(values, options, kind, expected):
    rows = pd.DataFrame({"age": values, "click": 1})
    expected = re.sub(
        r"dtype (str|datetime64\[us\])", f"dtype {rows['age'].dtype}", expected
    )
    with pytest.raises(kind, match=message(expected)):
        Encoder([Dense("age", **options)], [CLICK]).fit(rows)
    fitted = Encoder([Dense("age", **options)], [CLICK])
    fitted.fit(pd.DataFrame({"age": [1.0, 2.0]}))
    if "training rows" not in expected:
        with pytest.raises(kind, match=message(expected)):
            fitted.transform(rows)


def test_dense_columns_take_all_kinds_of_numbers():
    want = [[1.0], [0.0]]
    for values in (
        pd.Series([1, 0], dtype="int8"),
        pd.Series([1, 0], dtype="Int64"),
        pd.Series([True, False]),
        pd.Series([1, 0], dtype="float32"),
        pd.Series([1, 0], dtype="Float64"),
        pd.Series([Decimal(1), 0], dtype=object),
        pd.Series([1, 0], dtype="category"),
    ):
        rows = pd.DataFrame({"a": values})
        batch = Encoder([Dense("a", scale="none")], [CLICK]).fit(rows).transform(rows)
        assert batch.dense.tolist() == want
    for gap in (None, np.nan, pd.NA):
        rows = pd.DataFrame({"a": pd.Series([1, gap], dtype=object)})
        column = Dense("a", scale="none", missing=0)
        assert (
            Encoder([column], [CLICK]).fit(rows).transform(rows).dense.tolist() == want
        )


def test_numbers_beyond_single_precision_are_refused_once_scaled():
    rows = pd.DataFrame({"a": [1e300, 2e300]})
    with pytest.raises(
        ValueError,
        match=message(
            "column 'a': too large for float32 (divide the column by a constant first)"
            " in 2 of 2 rows"
        ),
    ):
        Encoder([Dense("a", scale="none")], [CLICK]).fit(rows).transform(rows)
    assert Encoder([Dense("a", scale="minmax")], [CLICK]).fit(rows).transform(
        rows
    ).dense.tolist() == [[0.0], [1.0]]


# Sequences


def listed(cells, **options):
    rows = pd.DataFrame({"h": pd.Series(cells, dtype=object)})
    encoder = Encoder([Sequence("h", **options)], [CLICK]).fit(rows)
    return encoder, encoder.transform(rows).ids.tolist()


def test_sequences_keep_the_last_and_pad_to_the_right():
    cells = [[1, 2, 3], [4], [], None, (3, 1), np.array([9, 8, 7]), np.nan]
    encoder, ids = listed(cells, length=2)
    # What lies before the last two is never read, so 9 has no id.
    assert encoder.vocabularies["h"] == (1, 2, 3, 4, 7, 8)
    p = PADDING
    assert ids == [[2, 3], [4, p], [p, p], [p, p], [3, 1], [6, 5], [p, p]]


def test_sequences_of_strings_gaps_and_mixed_arrays():
    cells = [["a", None], np.array(["b", "a"]), np.array([], dtype=float), [17, "17"]]
    encoder, ids = listed(cells, length=2)
    assert encoder.vocabularies["h"] == (17, "a", "b", None)
    assert ids == [[2, 4], [3, 2], [-1, -1], [1, 1]]


def test_gaps_in_lists_are_unseen_and_not_padding_if_training_has_none():
    encoder, _ = listed([[1, 2]], length=3)
    served = pd.DataFrame({"h": [[None, 2], [2.0, np.nan, 5]]})
    assert encoder.transform(served).ids.tolist() == [[0, 2, -1], [2, 0, 0]]


def test_large_integers_beside_a_gap_in_a_list():
    _, ids = listed([[2**62 + 1, None], [2**62, 2**62 + 1]], length=2)
    assert ids == [[2, 3], [1, 2]]


def test_all_sequences_empty():
    encoder, ids = listed([[], None], length=3)
    assert encoder.tables["h"] == Table(1, 16)
    assert ids == [[-1] * 3] * 2
    assert (
        FeatureEmbedding(encoder)(encoder.transform(pd.DataFrame({"h": [[5]]})))[
            0
        ].tolist()
        == [0.0] * 16
    )


def test_sequences_in_blocks_equal_sequences_in_one(monkeypatch):
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 30, rng.integers(0, 6)) for _ in range(53)]
    encoder, whole = listed(cells, length=4)
    monkeypatch.setattr(features, "BLOCK", 7)
    again, parts = listed(cells, length=4)
    assert parts == whole
    assert again.vocabularies == encoder.vocabularies


def test_a_block_of_lists_is_all_that_is_looked_up_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        features, "look_up", lambda v, table: asked.append(len(v)) or look_up(v, table)
    )
    monkeypatch.setattr(features, "BLOCK", 7)
    _, ids = listed([[1, 2, 3]] * 20, length=2)
    assert ids == [[1, 2]] * 20
    assert asked == [14, 14, 12]


def test_sequence_ids_equal_row_by_row_lookup():
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 30, rng.integers(0, 6)).tolist() for _ in range(53)]
    encoder, ids = listed(cells, length=4, min_count=3)
    known = {value: k + 1 for k, value in enumerate(encoder.vocabularies["h"])}
    for cell, found in zip(cells, ids, strict=True):
        last = [known.get(value, 0) for value in cell[-4:]]
        assert found == last + [-1] * (4 - len(last))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1 2", [3]], "column 'h': row 0: '1 2' is not a list, tuple or array of ids"),
        ([[1], 5], "column 'h': row 1: 5 is not a list, tuple or array of ids"),
        ([[1], None, [2, [3]]], "column 'h': row 2: [2, [3]] is not a list, tuple or"),
        ([[], [(1, 2)]], "column 'h': row 1: [(1, 2)] is not a list, tuple or array"),
        ([[1], [0.5]], "column 'h': 0.5 is not an id; an id is a string"),
        ([[1], np.ones((2, 2), int)], "column 'h': row 1: array([[1, 1],"),
        ([np.array(5)], "column 'h': row 0: array(5) is not a list"),
    ],
)
def test_sequences_refuse(cells, expected):
    with pytest.raises((TypeError, ValueError), match=message(expected)):
        listed(cells)
    fitted, _ = listed([[1]])
    rows = pd.DataFrame({"h": pd.Series(cells, dtype=object)})
    with pytest.raises((TypeError, ValueError), match=message(expected)):
        fitted.transform(rows)


def test_sequence_rows_are_counted_over_all_blocks(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 2)
    with pytest.raises(TypeError, match="column 'h': row 4: 'x' is not a list"):
        listed([[1], [2], None, [3], "x"])


def test_sequences_take_classes_derived_from_lists():
    class Items(list):
        pass

    class Pair(tuple):
        pass

    class Array(np.ndarray):
        pass

    cells = [Items([1, 2]), Pair((3,)), np.array([2, 1]).view(Array), Items()]
    _, ids = listed(cells, length=2)
    assert ids == [[1, 2], [3, -1], [2, 1], [-1, -1]]


def test_a_list_in_a_sparse_column_is_refused():
    rows = pd.DataFrame({"s": [[1], [2]]})
    expected = "column 's': .*; an id is a string, an integer"
    with pytest.raises(TypeError, match=expected):
        Encoder([Sparse("s")], [CLICK]).fit(rows)
    with pytest.raises(TypeError, match=expected):
        Encoder([Sparse("s", buckets=9)], [CLICK]).fit(rows).transform(rows)


# Shared tables


def test_shared_tables_learn_from_all_their_columns(rows):
    columns = [Sequence("history", shares="item", length=3), Sparse("item")]
    encoder = Encoder(columns, TASKS).fit(rows.assign(item=[1, 17, 17, 1, 1]))
    assert encoder.vocabularies == {"item": (1, 17, 31, 42)}
    assert encoder.tables == {"item": Table(5, 16)}
    batch = encoder.transform(rows.assign(item=42))
    assert batch.ids[3].tolist() == [4, -1, -1, 4]


def test_counts_of_shared_tables_add_up():
    rows = pd.DataFrame({"a": ["x", "y"], "b": ["x", "z"]})
    encoder = Encoder([Sparse("a", min_count=2), Sparse("b", shares="a")], [CLICK])
    assert encoder.fit(rows).vocabularies == {"a": ("x",)}


def test_shared_tables_may_hash():
    columns = [Sparse("a", buckets=100), Sparse("b", shares="a")]
    rows = pd.DataFrame({"a": ["x"], "b": ["x"]})
    encoder = Encoder(columns, [CLICK]).fit(rows)
    assert encoder.transform(rows).ids.tolist() == [[bucket("x", 100)] * 2]
    assert encoder.tables == {"a": Table(101, 16)}
    assert encoder.vocabularies == {}


# The encoder: what it refuses


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ([], {}, "columns: found none, expected at least one"),
        ([Sparse("a"), Dense("a")], {}, "columns: 'a' is declared more than once"),
        (
            [Sparse("a", shares="b"), Sparse("c")],
            {},
            "column 'a': shares='b' names no column with a table of its own;"
            " there are ['c']",
        ),
        (
            [Sparse("a", shares="b"), Sparse("b", shares="c"), Sparse("c")],
            {},
            "column 'a': shares='b' names no column with a table of its own",
        ),
        ([Sparse("a", shares="b"), Dense("b")], {}, "there are none"),
        (
            [Sparse("a", shares="b", width=3), Sparse("b", width=5)],
            {},
            "column 'a': width=3, but column 'b', whose table it shares, has width=5",
        ),
        (
            [Sparse("click")],
            {},
            "column 'click' is the label of task 'click' and cannot be an input",
        ),
        ([Dense("bought")], {}, "column 'bought' is the label of task 'purchase'"),
        ([Dense("seen")], {}, "column 'seen' is the given column of task 'purchase'"),
        ([Dense("w")], {"weight": "w"}, "column 'w' is the row weight"),
    ],
)
def test_encoders_refuse_columns_that_do_not_fit(columns, options, expected):
    tasks = [CLICK, Task("purchase", label="bought", given="seen")]
    with pytest.raises(ValueError, match=message(expected)):
        Encoder(columns, tasks, **options)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("click", "column 'click' is the label of task 'click' and cannot be the row"),
        ("bought", "column 'bought' is the label of task 'purchase' and cannot be"),
        ("seen", "column 'seen' is the given column of task 'purchase' and cannot be"),
    ],
)
def test_the_row_weight_has_no_second_role(weight, expected):
    tasks = [CLICK, Task("purchase", label="bought", given="seen")]
    with pytest.raises(ValueError, match=message(expected)):
        Encoder([Sparse("user")], tasks, weight=weight)


def test_encoders_refuse_single_columns_and_tasks(plain):
    column = plain.Sparse("user")
    with pytest.raises(TypeError, match="columns: expected a list, found Sparse"):
        plain.Encoder(column, [CLICK])
    with pytest.raises(TypeError, match="columns: expected a list, found 'user'"):
        plain.Encoder("user", [CLICK])
    with pytest.raises(TypeError, match="tasks: expected a list, found Task"):
        plain.Encoder([column], CLICK)


def test_column_names_of_several_levels_are_refused(encoder, rows):
    levels = rows.set_axis(pd.MultiIndex.from_product([rows.columns, ["a"]]), axis=1)
    expected = "rows: the column names have 2 levels (a MultiIndex), expected plain"
    for call in (encoder.fit, encoder.transform):
        with pytest.raises(TypeError, match=message(expected)):
            call(levels)


def test_encoders_refuse_other_types(plain, rows):
    with pytest.raises(
        TypeError, match="expected Sparse, Dense or Sequence, found 'a'"
    ):
        plain.Encoder(["a"], [CLICK])
    encoder = plain.Encoder([plain.Sparse("user")], [CLICK])
    for found in (rows["user"].tolist(), {"user": [1]}, None):
        kind = type(found).__name__
        expected = f"rows: expected a DataFrame, found {kind}"
        with pytest.raises(TypeError, match=expected):
            encoder.fit(found)
        with pytest.raises(TypeError, match=expected):
            encoder.fit(rows).transform(found)


def test_missing_columns_are_named(encoder, rows):
    expected = "rows: no columns ['age', 'item']; expected ['user', 'age', 'history',"
    for call in (encoder.fit, encoder.transform):
        with pytest.raises(KeyError, match=message(expected)):
            call(rows.drop(columns=["age", "item"]))
    with pytest.raises(KeyError, match="no columns \\['item'\\]"):
        encoder.unseen(rows.drop(columns="item"))


def test_duplicated_columns_are_named(encoder, rows):
    twice = pd.concat([rows, rows[["age"]]], axis=1)
    for call in (encoder.fit, encoder.transform):
        with pytest.raises(
            ValueError, match="rows: more than one column is called 'age'"
        ):
            call(twice)
    labels = pd.concat([rows, rows[["click"]]], axis=1)
    with pytest.raises(ValueError, match="more than one column is called 'click'"):
        encoder.transform(labels)


def test_extra_columns_are_ignored_even_twice(encoder, rows):
    extra = rows.assign(other="x", time=pd.Timestamp(0))
    extra = pd.concat([extra, extra[["other"]]], axis=1)[reversed(["age", *rows])]
    extra = extra.loc[:, ~extra.columns.duplicated()]
    assert torch.equal(encoder.transform(extra).ids, encoder.transform(rows).ids)


def test_ids_are_named_in_errors(rows):
    encoder = Encoder([Sparse("user")], TASKS)
    bad = rows.assign(user=[1, 2, 0.5, 3, 4])
    expected = "column 'user': 0.5 is not an id; an id is a string, an"
    with pytest.raises(TypeError, match=message(expected)):
        encoder.fit(bad)
    with pytest.raises(TypeError, match=message(expected)):
        encoder.fit(rows).transform(bad)


def test_nothing_works_before_fit(columns, rows):
    encoder = Encoder(columns, TASKS)
    for call in (
        lambda: encoder.transform(rows),
        lambda: encoder.unseen(rows),
        lambda: encoder.to_json(),
        lambda: encoder.tables,
        lambda: encoder.vocabularies,
        lambda: FeatureEmbedding(encoder),
    ):
        with pytest.raises(NotFittedError, match="call fit first"):
            call()


def test_fit_refuses_no_rows(encoder, rows):
    with pytest.raises(ValueError, match="fit needs at least one row, found none"):
        encoder.fit(rows[:0])


def test_transform_of_no_rows_is_an_empty_batch(encoder, rows):
    for empty in (rows[:0], pd.DataFrame(columns=list(rows))):
        batch = encoder.transform(empty)
        assert len(batch) == 0
        assert batch.ids.shape == (0, 4)
        assert batch.dense.shape == (0, 2)
        assert batch.labels.shape == (0, 2)
        assert FeatureEmbedding(encoder)(batch).shape == (0, 9)


def test_one_row_is_enough(columns, rows):
    encoder = Encoder(columns, TASKS).fit(rows[:1])
    batch = encoder.transform(rows[:1])
    assert len(batch) == 1
    assert torch.isfinite(batch.dense).all()
    assert FeatureEmbedding(encoder)(batch).shape == (1, 9)


# The encoder: what it does


def test_types_and_shapes(encoder, rows):
    batch = encoder.transform(rows)
    assert (batch.ids.dtype, batch.dense.dtype) == (torch.int64, torch.float32)
    assert batch.labels.dtype == torch.float32
    assert batch.ids.shape == (5, 4)
    assert batch.weights is None
    assert encoder.positions == {
        "user": slice(0, 1),
        "history": slice(1, 3),
        "item": slice(3, 4),
    }
    assert encoder.dense_names == ("age", "price")
    assert encoder.tables == {"user": Table(4, 3), "item": Table(4, 2)}
    assert encoder.vocabularies == {"user": ("ana", "bo", "cem"), "item": (17, 31, 42)}
    assert batch.ids[0].tolist() == [1, 1, 2, 2]


def test_unseen_values_are_row_0(encoder, rows):
    served = rows.assign(user="dia", item=99, history=[[99, 17]] * 5)
    batch = encoder.transform(served)
    assert batch.ids.tolist() == [[0, 0, 1, 0]] * 5
    assert encoder.unseen(served).to_dict() == {
        "user": 1.0,
        "history": 0.5,
        "item": 1.0,
    }
    assert encoder.unseen(rows).to_dict() == {"user": 0.0, "history": 0.0, "item": 0.0}
    empty = encoder.unseen(rows.assign(history=None))
    assert np.isnan(empty["history"])


def test_a_column_of_nothing_but_unseen_values_is_reported_once(plain, encoder, rows):
    strange = rows.assign(user=["a ", "b ", None, "c ", "d "], history=[[1, 2]] * 5)
    expected = (
        "column 'user': no value is known from training; found ['a ', 'b ', 'c '],"
        " training had ['ana', 'bo', 'cem']"
    )
    with pytest.warns(UserWarning, match=message(expected)):
        encoder.transform(strange)
    with pytest.warns(UserWarning, match=message(expected)) as caught:
        plain.Encoder.from_json(encoder.to_json()).transform(strange)
    assert [w.filename for w in caught] == [__file__]
    quiet = [
        strange,  # warned already
        strange.assign(history=[[1], [2], [], None, [1]]),  # two values are no news
        rows.assign(item=[9, 8, 7, 6, 31]),  # one is known
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in quiet:
            encoder.transform(part)
        encoder.unseen(strange)
    lists = rows.assign(history=[[1, 2], [2], [], None, [3]])
    expected = (
        "column 'history': no value is known .* found \\[1, 2, 3\\], .* \\[17, 31,"
    )
    with pytest.warns(UserWarning, match=expected):
        encoder.transform(lists)
    with pytest.warns(UserWarning, match="column 'user'"):
        encoder.fit(rows).transform(strange)


@pytest.mark.parametrize("known", [0, 4, 5, 12, None])
def test_one_known_value_in_any_block_is_enough(known, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 5)
    training = pd.DataFrame({"user": ["ana", None], "list": [["ana"], [None]]})
    encoder = Encoder([Sparse("user"), Sequence("list", length=2)], [CLICK])
    encoder.fit(training)
    users = [None if row % 3 else f"new {row}" for row in range(13)]
    if known is not None:
        users[known] = "ana"
    rows = pd.DataFrame({"user": users, "list": [[user, "x"] for user in users]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder.transform(rows)
    assert len(caught) == (2 if known is None else 0)


def test_encoders_and_batches_are_printed_in_short(encoder, columns, rows):
    assert repr(Encoder(columns, TASKS)) == "Encoder(columns=5, tasks=2, not fitted)"
    assert repr(encoder) == "Encoder(columns=5, tasks=2, fitted)"
    batch = encoder.transform(rows)
    assert repr(batch) == "Batch(ids=[5, 4], dense=[5, 2], labels=[5, 2])"
    weighted = Batch(batch.ids, batch.dense, batch.labels, batch.dense[:, 0])
    assert repr(weighted[:3]).endswith("labels=[3, 2], weights=[3])")


def test_only_training_rows_teach(columns, rows):
    encoder = Encoder(columns, TASKS).fit(rows[:2])
    first = encoder.to_json()
    encoder.transform(rows)
    assert encoder.to_json() == first


def test_a_second_fit_starts_from_scratch(columns, rows):
    encoder = Encoder(columns, TASKS).fit(rows)
    other = rows.assign(user=list("vwxyz"), age=[1.0, 2, 3, 4, 5])
    assert encoder.fit(other).to_json() == Encoder(columns, TASKS).fit(other).to_json()


def test_a_fit_that_fails_leaves_the_encoder_whole(encoder, rows):
    before = encoder.to_json()
    with pytest.raises(ValueError, match="infinite"):
        encoder.fit(rows.assign(user="new", price=np.inf))
    assert encoder.to_json() == before


def test_rows_are_never_changed(encoder, rows):
    rows.index = [3, 1, 4, 1, 5]
    before = rows.copy(deep=True)
    cells = [None if c is None else list(c) for c in rows["history"]]
    encoder.fit(rows)
    batch = encoder.transform(rows)
    encoder.unseen(rows)
    batch.dense.fill_(7)
    batch.labels.fill_(7)
    pd.testing.assert_frame_equal(
        rows.drop(columns="history"), before.drop(columns="history")
    )
    assert [None if c is None else list(c) for c in rows["history"]] == cells


def test_the_index_of_the_rows_does_not_matter(encoder, rows):
    shuffled = rows.set_axis([9, 9, 0, 1, 2])
    for name in ("ids", "dense"):
        expected = getattr(encoder.transform(rows), name)
        assert torch.equal(getattr(encoder.transform(shuffled), name), expected)


def test_peak_memory_of_transform_is_bounded():
    import tracemalloc

    rng = np.random.default_rng(0)
    size = 200_000
    rows = pd.DataFrame({f"i{k}": rng.integers(0, 1_000, size) for k in range(6)})
    rows = rows.assign(**{f"x{k}": rng.normal(size=size) for k in range(6)})
    rows["h"] = list(rng.integers(0, 1_000, (size, 10)))
    columns = [Sparse(name) if name[0] == "i" else Dense(name) for name in rows][:-1]
    encoder = Encoder([*columns, Sequence("h", length=10)], [CLICK]).fit(rows)
    tracemalloc.start()
    batch = encoder.transform(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    output = sum(t.nbytes for t in (batch.ids, batch.dense, batch.labels))
    assert peak < 3 * output


# Labels and weights


def test_given_takes_rows_out_of_a_task(encoder, rows):
    labels = encoder.transform(rows).labels
    assert labels[:, 0].tolist() == [1, 0, 0, 1, 1]
    assert labels[:, 1].isnan().tolist() == [False, True, True, False, False]
    gap = encoder.transform(rows.assign(click=[1, np.nan, 0, 1, 1])).labels
    assert gap[:, 1].isnan().tolist() == [False, True, True, False, False]
    assert gap[1].isnan().all()


def test_given_need_not_be_a_task(rows):
    tasks = [Task("buy", label="purchase", given="click")]
    encoder = Encoder([Sparse("user")], tasks).fit(rows)
    assert encoder.transform(rows).labels.isnan().sum() == 2
    with pytest.raises(KeyError, match=message("no columns ['click']")):
        encoder.transform(rows.drop(columns="click"))
    with pytest.raises(
        ValueError, match="task 'buy': given column 'click': expected 0,"
    ):
        encoder.transform(rows.assign(click=2))


def test_two_tasks_may_read_one_column(rows):
    tasks = [
        Task("cvr", label="purchase", given="click"),
        Task("ctcvr", label="purchase"),
    ]
    labels = Encoder([Sparse("user")], tasks).fit(rows).transform(rows).labels
    assert labels.isnan().sum(0).tolist() == [2, 0]


def test_without_any_label_all_are_missing(encoder, rows):
    batch = encoder.transform(rows.drop(columns=["click", "purchase"]))
    assert batch.labels.shape == (5, 2)
    assert batch.labels.isnan().all()


def test_some_labels_without_others_is_an_error(encoder, rows):
    expected = "rows: no columns ['purchase']; expected ['click', 'purchase'], found"
    with pytest.raises(KeyError, match=message(expected)):
        encoder.transform(rows.drop(columns="purchase"))


def test_fit_reads_no_label(columns, rows):
    Encoder(columns, TASKS).fit(rows.drop(columns=["click", "purchase"]))
    Encoder(columns, TASKS).fit(rows.assign(click="garbage"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 1, 2], "in 2 of 5 rows (first in row 2: 2)"),
        ([0, 1, 0.5, 1, 0], "in 1 of 5 rows (first in row 2: 0.5)"),
        ([0, 1, -1, 1, 0], "in 1 of 5 rows (first in row 2: -1)"),
        (["0", "1", "0", "1", "1"], "in 5 of 5 rows (first in row 0: '0')"),
        ([0, 1, np.inf, 1, 0], "in 1 of 5 rows (first in row 2: inf)"),
    ],
)
def test_binary_labels_outside_0_and_1_are_refused(encoder, rows, values, expected):
    expected = (
        "task 'click': label column 'click': expected 0, 1, True, False or missing;"
        f" another value {expected}"
    )
    with pytest.raises(ValueError, match=message(expected)):
        encoder.transform(rows.assign(click=values))


@pytest.mark.parametrize(
    "values",
    [
        pd.Series([True, False, True]),
        pd.Series([1.0, 0.0, 1.0]),
        pd.Series([1, 0, 1], dtype="int8"),
        pd.Series([True, False, True], dtype="boolean"),
        pd.Series([1, False, True], dtype=object),
        pd.Series([1, 0, 1], dtype="category"),
    ],
    ids=lambda v: str(v.dtype),
)
def test_binary_labels_of_all_types(values):
    rows = pd.DataFrame({"user": list("abc"), "click": values})
    encoder = Encoder([Sparse("user")], [CLICK]).fit(rows)
    assert encoder.transform(rows).labels.tolist() == [[1.0], [0.0], [1.0]]
    gap = rows["click"].astype(object).where([True, False, True], None)
    for cells in (gap, gap.astype(float)):
        labels = encoder.transform(rows.assign(click=cells)).labels
        assert labels.isnan().tolist() == [[False], [True], [False]]


def test_regression_labels(rows):
    encoder = Encoder([Sparse("user")], [Task("time", "regression")]).fit(rows)
    labels = encoder.transform(rows.assign(time=[1.5, -1, None, 0, 9])).labels[:, 0]
    assert labels.isnan().tolist() == [False, False, True, False, False]
    assert labels[1] == -1
    with pytest.raises(ValueError, match="task 'time': label column 'time': infinite"):
        encoder.transform(rows.assign(time=[1, 2, 3, 4, np.inf]))
    with pytest.raises(TypeError, match="task 'time': .* 'x' is not a number"):
        encoder.transform(rows.assign(time="x"))


def test_labels_too_large_for_single_precision_are_refused(rows):
    encoder = Encoder([Sparse("user")], [Task("time", "regression")]).fit(rows)
    expected = (
        "task 'time': label column 'time': too large for float32 (divide the column by"
        " a constant first) in 1 of 5 rows (first in row 1: 1e+300)"
    )
    with pytest.raises(ValueError, match=message(expected)):
        encoder.transform(rows.assign(time=[1, 1e300, 0, 0, 0]))


def test_class_labels_become_positions(rows):
    tasks = [
        Task("rating", "multiclass", classes=("bad", "good")),
        Task("stars", "multiclass", classes=3),
        Task("size", "multiclass", classes=(10, 5)),
    ]
    encoder = Encoder([Sparse("user")], tasks).fit(rows)
    labeled = rows.assign(
        rating=["good", None, "bad", "bad", "bad"],
        stars=[0, 2, np.nan, 1, 1],
        size=[5, 10, 5, 5, 10],
    )
    labels = encoder.transform(labeled).labels
    np.testing.assert_array_equal(labels[:, 0], [1, np.nan, 0, 0, 0])
    np.testing.assert_array_equal(labels[:, 1], [0, 2, np.nan, 1, 1])
    np.testing.assert_array_equal(labels[:, 2], [1, 0, 1, 1, 0])
    again = Encoder.from_json(encoder.to_json())
    assert again.tasks == encoder.tasks
    expected = (
        "task 'stars': label column 'stars': expected one of [0, 1, 2] or missing;"
        " another value in 1 of 5 rows (first in row 0: 3)"
    )
    with pytest.raises(ValueError, match=message(expected)):
        encoder.transform(labeled.assign(stars=[3, 2, 1, 0, 0]))


def test_row_weights(rows):
    encoder = Encoder([Sparse("user")], TASKS, weight="w").fit(rows)
    weighted = rows.assign(w=[1, 0.5, 0, 2, 3])
    weights = encoder.transform(weighted).weights
    assert weights.tolist() == [1, 0.5, 0, 2, 3]
    assert weights.dtype == torch.float32
    with pytest.raises(KeyError, match=message("no columns ['w']")):
        encoder.transform(rows)
    served = weighted.drop(columns=["click", "purchase"])
    assert encoder.transform(served).weights.tolist() == [1, 0.5, 0, 2, 3]
    assert encoder.transform(served.drop(columns="w")).weights is None
    for value, expected in (
        (-1, "row weight 'w': negative or missing weight in 1 of 5 rows (first in row"),
        (np.nan, "negative or missing weight in 1 of 5 rows (first in row 1: nan)"),
        (np.inf, "row weight 'w': infinite value in 1 of 5 rows"),
        (1e39, "row weight 'w': too large for float32 (divide the column by"),
    ):
        with pytest.raises(ValueError, match=message(expected)):
            encoder.transform(weighted.assign(w=[1, value, 1, 1, 1]))


# JSON


def test_round_trip_through_json(rows):
    columns = [
        Sparse("user", min_count=2),
        Sparse("click_id", buckets=1_000, width=4),
        *[Dense(f"x{scale}", scale=scale, missing="mean") for scale in SCALES],
        Sequence("history", shares="item", length=3, pooling="max"),
        Sparse("item"),
    ]
    rng = np.random.default_rng(0)
    rows = rows.loc[rng.integers(0, 5, 400)].reset_index(drop=True)
    rows["click_id"] = rng.integers(0, 10**12, 400)
    for scale in SCALES:
        rows[f"x{scale}"] = np.where(
            rng.random(400) < 0.1, np.nan, rng.lognormal(size=400)
        )
    rows["item"] = rows["item"].where(rng.random(400) < 0.9)
    rows["w"] = rng.random(400)
    encoder = Encoder(columns, TASKS, weight="w").fit(rows)
    text = encoder.to_json()
    again = Encoder.from_json(text)
    assert again.to_json() == text
    assert again.columns == encoder.columns
    assert again.tasks == encoder.tasks
    assert again.tables == encoder.tables
    assert again.vocabularies == encoder.vocabularies
    one, two = encoder.transform(rows), again.transform(rows)
    for name in ("ids", "dense", "weights"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    torch.testing.assert_close(one.labels, two.labels, equal_nan=True, rtol=0, atol=0)


def test_a_weight_ratio_survives_json_and_is_left_out_if_it_is_one(columns, rows):
    fading = [replace(TASKS[0], weight_ratio=0.5), *TASKS[1:]]
    text = Encoder(columns, fading).fit(rows).to_json()
    assert Encoder.from_json(text).tasks == tuple(fading)
    without = json.loads(Encoder(columns, TASKS).fit(rows).to_json())["tasks"]
    assert all("weight_ratio" not in settings for settings in without)


def test_an_encoder_keeps_the_name_it_had_before_weight_ratios(columns, rows):
    # Written by hand here, so that a new field of Task cannot slip into it.
    settings = [
        {"name": t.name, "kind": t.kind, "weight": t.weight, "label": t.label}
        | {"given": t.given, "classes": t.classes}
        for t in TASKS
    ]
    encoder = Encoder(columns, TASKS).fit(rows)
    text = change(encoder.to_json(), tasks=settings)
    assert text == encoder.to_json()
    assert Encoder.from_json(text).fingerprint == encoder.fingerprint


def test_the_text_none_and_a_gap_are_two_values():
    rows = pd.DataFrame({"a": ["None", None, "nan", "", "1.0", "01", "-0"]})
    encoder = Encoder([Sparse("a")], [CLICK]).fit(rows)
    again = Encoder.from_json(encoder.to_json())
    for one in (encoder, again):
        assert sorted(one.transform(rows).ids[:, 0].tolist()) == list(range(1, 8))


def change(text, **changes):
    return json.dumps(json.loads(text) | changes)


def test_json_of_another_kind_is_refused(plain, encoder):
    text = encoder.to_json()
    for bad, expected in (
        ("{", "this text is not JSON: "),
        ("", "this text is not JSON: "),
        ("[1, 2]", "expected JSON of format 'mtl_annotated.Encoder/1', found [1, 2]"),
        ("{}", "expected JSON of format 'mtl_annotated.Encoder/1', found None"),
        (
            change(text, format="mtl_annotated.Encoder/2"),
            "expected JSON of format 'mtl_annotated.Encoder/1', found"
            " 'mtl_annotated.Encoder/2'",
        ),
        (change(text, columns=[]), "this JSON describes no Encoder: "),
        (change(text, columns=[{"type": "Wide", "name": "a"}]), "'Wide'"),
        (change(text, columns=[{"type": "Sparse"}]), "describes no Encoder"),
        (change(text, columns=[{"type": "Sparse", "name": "user", "wide": 3}]), "wide"),
        (change(text, tasks=[]), "tasks: found none"),
        (change(text, vocabularies={}), "describes no Encoder: KeyError('user')"),
        (change(text, vocabularies=None), "describes no Encoder"),
        (change(text, vocabularies={"user": "ana", "item": []}), "a list of different"),
        (change(text, vocabularies={"user": ["a", "a"], "item": []}), "different"),
        (change(text, vocabularies={"user": [0.5], "item": []}), "lists integers"),
        (change(text, scalers={}), "describes no Encoder: KeyError('age')"),
        (
            change(text, scalers={"age": {"fill": 1, "scale": {}}, "price": {}}),
            "describes no Encoder",
        ),
        (
            change(text, scalers={"age": {"fill": 1, "scale": {"__class__": 1}}}),
            "'__class__' is not something that a scale learns",
        ),
    ):
        with pytest.raises(ValueError, match=message(expected)):
            plain.Encoder.from_json(bad)


# Batches


def test_batches_are_indexed_by_slices_and_tensors(encoder, rows):
    batch = encoder.transform(rows)
    assert len(batch) == 5
    picked = batch[torch.tensor([3, 0])]
    assert torch.equal(picked.ids, batch.ids[[3, 0]])
    assert torch.equal(picked.dense, batch.dense[[3, 0]])
    assert picked.weights is None
    assert len(batch[1:4]) == 3
    assert len(batch[torch.tensor([True, False, True, False, False])]) == 2
    assert len(batch[5:]) == 0
    for bad in (torch.tensor(3),):
        with pytest.raises(TypeError, match="one row is batch\\[3:4\\]"):
            batch[bad]


def test_batches_refuse_row_numbers(plain, rows):
    batch = plain.Encoder([plain.Sparse("user")], TASKS).fit(rows).transform(rows)
    with pytest.raises(TypeError, match="a slice or a 1-D tensor, found 3; one row is"):
        batch[3]


def test_weights_follow_their_rows():
    ids, floats = torch.arange(6).reshape(3, 2), torch.rand(3, 1)
    batch = Batch(ids, floats, floats, torch.tensor([1.0, 2.0, 3.0]))
    assert batch[1:].weights.tolist() == [2, 3]
    assert batch.to(dtype=torch.float64).weights.dtype == torch.float64


def test_dtype_changes_floats_only(encoder, rows):
    batch = encoder.transform(rows).to("cpu", torch.float64)
    assert batch.ids.dtype == torch.int64
    assert (batch.dense.dtype, batch.labels.dtype) == (torch.float64, torch.float64)
    assert batch.to(device="cpu").dense.dtype == torch.float64
    with pytest.raises(TypeError, match="dtype is for the floats, found torch.int32"):
        batch.to(dtype=torch.int32)


def test_batches_can_be_taken_apart_and_put_together(encoder, rows):
    batch = encoder.transform(rows)
    parts, how = torch.utils._pytree.tree_flatten(batch)
    assert len(parts) == 4
    for part, own in zip(parts, (batch.ids, batch.dense, batch.labels), strict=False):
        assert part is own
    assert parts[3] == encoder.fingerprint
    again = torch.utils._pytree.tree_unflatten(parts, how)
    assert again.weights is None
    assert vars(again).keys() == vars(batch).keys()
    assert again.labels is batch.labels


def test_batches_are_frozen(encoder, rows):
    with pytest.raises(FrozenInstanceError):
        encoder.transform(rows).ids = None


# The embedding


def slow(embedding, encoder, batch):
    """One column, one row, one id at a time."""
    first = features.first_rows(encoder.tables)
    out = torch.zeros(len(batch), embedding.width, dtype=batch.dense.dtype)
    end = 0
    for column in encoder.columns:
        start, end = end, end + getattr(column, "width", 1)
        if isinstance(column, Dense):
            place = encoder.dense_names.index(column.name)
            out[:, start] = batch.dense[:, place]
            continue
        weight = embedding.weights[str(column.width)].detach()[first[column.table] :]
        for row, ids in enumerate(
            batch.ids[:, encoder.positions[column.name]].tolist()
        ):
            found = torch.stack(
                [weight[i] for i in ids if i != PADDING]
                or [torch.zeros(column.width, dtype=weight.dtype)]
            )
            pooling = getattr(column, "pooling", "sum")
            out[row, start:end] = (
                found.amax(0) if pooling == "max" else getattr(found, pooling)(0)
            )
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_packed_lookup_equals_a_loop(rows, pooling, order):
    columns = [
        Sparse("user", width=3),
        Dense("price"),
        Sequence("history", shares="item", width=2, length=2, pooling=pooling),
        Sparse("click_id", width=3, buckets=7),
        Sparse("item", width=2),
        Dense("age", missing=0),
    ]
    columns = [columns[:], columns[::-1], columns[3:] + columns[:3]][order]
    rows = rows.assign(click_id=[5, 6, 7, 8, 9])
    encoder = Encoder(columns, TASKS).fit(rows)
    served = rows.assign(
        user=["ana", "new", None, "cem", "bo"], item=[31, 17, 9, 42, 9]
    )
    batch = encoder.transform(served).to(dtype=torch.float64)
    embedding = FeatureEmbedding(encoder).double()
    with torch.no_grad():
        for weight in embedding.weights.values():
            weight.normal_()
    expected = slow(embedding, encoder, batch)
    torch.testing.assert_close(embedding(batch), expected, rtol=0, atol=1e-12)


def test_tables_lie_below_each_other_without_overlap():
    tables = {"a": Table(4, 3), "b": Table(4, 2), "c": Table(6, 3), "d": Table(1, 3)}
    assert features.first_rows(tables) == {"a": 0, "b": 0, "c": 4, "d": 10}
    packed = features.packed_weight([tables[name] for name in "acd"]).detach()
    assert packed.shape == (11, 3)
    assert (~packed.any(1)).nonzero()[:, 0].tolist() == [0, 4, 10]


def test_neighbors_of_one_source_are_one_piece_and_sequences_stay_apart(rows):
    columns = [
        Sparse("user", width=2),
        Sparse("item", width=2),
        Sequence("history", shares="item", width=2, length=3),
        Sequence("again", shares="item", width=2, length=2, pooling="sum"),
        Sparse("other", width=2, buckets=5),
        Dense("price"),
        Dense("age", missing=0),
    ]
    pieces = features.merge(map(features.piece_of, columns))
    assert [tuple(piece) for piece in pieces] == [
        (2, 2, None),
        (2, 3, "mean"),
        (2, 2, "sum"),
        (2, 1, None),
        (0, 2, None),
    ]
    rows = rows.assign(again=rows["history"], other=[1, 2, 3, 4, 5])
    encoder = Encoder(columns, TASKS).fit(rows)
    batch = encoder.transform(rows).to(dtype=torch.float64)
    embedding = FeatureEmbedding(encoder).double()
    torch.testing.assert_close(embedding(batch), slow(embedding, encoder, batch))


def test_every_declared_column_is_in_the_output(encoder, rows):
    embedding = FeatureEmbedding(encoder)
    base = embedding(encoder.transform(rows))
    changes = {
        "user": "cem",
        "age": 90,
        "history": [[42, 42]] * 5,
        "price": 900.0,
        "item": 42,
    }
    start = 0
    for column in encoder.columns:
        stop = start + getattr(column, "width", 1)
        served = rows.assign(**{column.name: changes[column.name]})
        moved = (embedding(encoder.transform(served)) != base).any(0)
        assert moved[start:stop].all()
        assert moved.sum() == stop - start
        start = stop
    assert start == embedding.width == base.shape[1]


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        ([Dense("age", missing=0)], 1),
        ([Sparse("user", width=5)], 5),
        ([Sequence("history", width=7)], 7),
        ([Dense("price"), Dense("age", missing=0)], 2),
    ],
)
def test_columns_of_one_kind_alone(rows, columns, width):
    encoder = Encoder(columns, TASKS).fit(rows)
    embedding = FeatureEmbedding(encoder)
    for count in (5, 1):
        assert embedding(encoder.transform(rows[:count])).shape == (count, width)
    assert embedding.width == width


def test_parameters_have_stable_names(encoder):
    names = {n: list(p.shape) for n, p in FeatureEmbedding(encoder).named_parameters()}
    assert names == {"weights.3": [4, 3], "weights.2": [4, 2]}
    stored = FeatureEmbedding(encoder).state_dict()
    assert list(stored) == ["_extra_state", "weights.3", "weights.2"]
    assert stored["_extra_state"] == encoder.fingerprint


def test_tables_start_small_and_row_0_at_zero():
    rows = pd.DataFrame({"a": range(3_000), "b": range(3_000), "click": 0})
    columns = [Sparse("a", width=11), Sparse("b", width=11)]
    encoder = Encoder(columns, [CLICK]).fit(rows)
    torch.manual_seed(0)
    weight = FeatureEmbedding(encoder).weights["11"].detach()
    assert weight.shape == (6_002, 11)
    assert not weight[[0, 3_001]].any()
    others = weight[weight.any(1)]
    assert len(others) == 6_000
    assert abs(others.std() / STD - 1) < 0.02
    assert abs(others.mean()) < 0.001


def test_row_0_can_be_trained(encoder, rows):
    embedding = FeatureEmbedding(encoder)
    embedding(encoder.transform(rows.assign(user="new"))).sum().backward()
    grad = embedding.weights["3"].grad
    assert (grad[0] == 5).all()
    assert not grad[1:].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_moves_nothing(rows, pooling):
    columns = [Sequence("history", width=3, length=4, pooling=pooling)]
    encoder = Encoder(columns, TASKS).fit(rows)
    embedding = FeatureEmbedding(encoder)
    out = embedding(encoder.transform(rows))
    out.sum().backward()
    grad = embedding.weights["3"].grad
    assert torch.isfinite(grad).all()
    assert not grad[0].any()
    assert not out[1:3].any()


def test_an_id_beyond_its_table_reads_row_0_of_that_table(encoder, rows):
    embedding = FeatureEmbedding(encoder)
    batch = encoder.transform(rows)
    wild = Batch(batch.ids + 10_000, batch.dense, batch.labels)
    out = embedding(wild)
    assert not out[:, :3].any()
    assert not out[:, -2:].any()
    columns = [Sparse("user", width=2), Sparse("item", width=2)]
    both = Encoder(columns, TASKS).fit(rows)
    embedding, batch = FeatureEmbedding(both), both.transform(rows)
    with torch.no_grad():
        embedding.weights["2"][4] = 1.0  # row 0 of item, right below user's rows
    just_beyond = Batch(torch.full_like(batch.ids, 4), batch.dense, batch.labels)
    assert embedding(just_beyond).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5


def test_only_a_batch_without_gaps_and_strays_is_clean(encoder, rows, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 2)
    embedding, batch = FeatureEmbedding(encoder), encoder.transform(rows)
    whole = replace(batch, labels=torch.ones_like(batch.labels))
    found = embedding.inspected(whole)
    assert found.clean
    assert not batch.clean
    assert found[:2].clean
    assert found.to(dtype=torch.float64).clean
    gap = whole.labels.clone()
    gap[-1, 1] = torch.nan
    assert not embedding.inspected(replace(whole, labels=gap)).clean
    for column, stray in ((0, 10_000), (0, -1), (1, -2)):
        ids = whole.ids.clone()
        ids[-1, column] = stray
        padding = stray == -1
        assert embedding.inspected(replace(whole, ids=ids)).clean == padding
    assert not replace(found, labels=gap).clean
    assert not replace(found, ids=found.ids + 10_000).clean
    plain = Encoder([Sparse("user"), Sparse("item")], TASKS).fit(rows)
    without = FeatureEmbedding(plain)
    whole = replace(plain.transform(rows), labels=torch.ones_like(batch.labels))
    assert without.inspected(whole).clean
    for column, stray in ((0, -1), (1, -1), (1, 10_000)):
        ids = whole.ids.clone()
        ids[-1, column] = stray
        assert not without.inspected(replace(whole, ids=ids)).clean
    other = Encoder([Sparse("user")], TASKS).fit(rows)
    with pytest.raises(ValueError, match="come from different encoders"):
        embedding.inspected(other.transform(rows))


def test_a_clean_batch_gives_the_vectors_that_it_gave_before(encoder, rows):
    columns = [Sparse("user", width=2), Sparse("item", width=2)]
    plain = Encoder(columns, TASKS).fit(rows)
    for each in (encoder, plain):
        embedding, batch = FeatureEmbedding(each), each.transform(rows)
        with torch.no_grad():
            for weight in embedding.weights.values():
                weight.normal_()
        assert torch.equal(embedding(replace(batch).marked(True)), embedding(batch))


def test_a_batch_of_another_encoder_is_refused(encoder, rows):
    other = Encoder([Sparse("user")], TASKS).fit(rows)
    batch, embedding = other.transform(rows), FeatureEmbedding(encoder)
    expected = (
        "the batch and the model come from different encoders, or from one that was"
        f" fitted again in between: the batch has fingerprint {other.fingerprint[:8]},"
        f" the model {encoder.fingerprint[:8]}"
    )
    for part in (batch, batch[:2], batch.to(dtype=torch.float64)):
        with pytest.raises(ValueError, match=message(expected)):
            embedding(part)
    by_hand = Batch(batch.ids, batch.dense, batch.labels)
    expected = "the batch has 1 positions of ids, the embedding 4"
    with pytest.raises(ValueError, match=expected):
        embedding(by_hand)


def test_a_model_keeps_to_the_encoder_as_it_was(encoder, rows):
    embedding, before = FeatureEmbedding(encoder), encoder.transform(rows)
    out = embedding(before)
    again = Encoder.from_json(encoder.to_json())
    assert torch.equal(embedding(again.transform(rows)), out)
    first = encoder.fingerprint
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert encoder.fit(rows).fingerprint == first
    assert encoder.fit(rows[1:]).fingerprint != first
    assert embedding.encoder == before.encoder == before[:2].encoder == first
    assert torch.equal(embedding(before), out)
    with pytest.raises(ValueError, match="fitted again in between"):
        embedding(encoder.transform(rows))


def test_stored_weights_know_their_encoder(encoder, rows, tmp_path):
    embedding, path = FeatureEmbedding(encoder), tmp_path / "weights.pt"
    torch.save(embedding.state_dict(), path)
    state = torch.load(path, weights_only=True)
    mine = FeatureEmbedding(Encoder.from_json(encoder.to_json()))
    mine.load_state_dict(state)
    batch = encoder.transform(rows)
    assert torch.equal(mine(batch), embedding(batch))
    assert torch.equal(copy.deepcopy(mine)(batch), embedding(batch))
    # Another order of the same number of users: all shapes agree.
    renamed = rows["user"].map({"ana": "zoe", "bo": "bo", "cem": "cem"})
    other = Encoder(encoder.columns, TASKS).fit(rows.assign(user=renamed))
    assert other.tables == encoder.tables
    expected = (
        "these weights were trained with another encoder: theirs has fingerprint"
        f" {encoder.fingerprint[:8]}, the model's {other.fingerprint[:8]}"
    )
    model = torch.nn.Sequential(FeatureEmbedding(other))
    stored = {f"0.{name}": value for name, value in state.items()}
    with pytest.raises(ValueError, match=message(expected)):
        model.load_state_dict(stored)
    del stored["0._extra_state"]
    model.load_state_dict(stored, strict=False)
    assert torch.equal(model[0].weights["3"], embedding.weights["3"])


def test_the_backward_pass_fills_nothing_with_zeros():
    rows = pd.DataFrame({"a": range(9), "b": range(9), "x": 0.5, "y": 1.5})
    columns = [Sparse("a"), Sparse("b"), Dense("x"), Dense("y")]
    encoder = Encoder(columns, [CLICK]).fit(rows)
    embedding, batch = FeatureEmbedding(encoder), encoder.transform(rows)
    with torch.profiler.profile() as profile:
        embedding(batch).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in names
    slow = {"aten::embedding_dense_backward", "aten::slice_backward", "aten::split"}
    assert not names & slow
    assert embedding.in_order
    reordered = [Sparse("a", width=3), Sparse("b"), Sparse("c", width=3)]
    rows["c"] = rows["a"]
    assert not FeatureEmbedding(Encoder(reordered, [CLICK]).fit(rows)).in_order


def test_a_width_by_row_gets_a_sparse_gradient_with_the_dense_one_s_numbers(
    encoder, rows
):
    embedding, batch = FeatureEmbedding(encoder).double(), encoder.transform(rows)
    batch = batch.to(dtype=torch.float64)
    scale = torch.linspace(-1, 1, embedding.width, dtype=torch.float64)
    (embedding(batch) * scale).sum().backward()
    dense = {name: weight.grad for name, weight in embedding.weights.items()}
    embedding.zero_grad()
    embedding.by_row = frozenset(map(int, dense))
    (embedding(batch) * scale).sum().backward()
    for name, weight in embedding.weights.items():
        assert weight.grad.is_sparse
        assert dense[name].any()
        found = weight.grad.to_dense()
        torch.testing.assert_close(found, dense[name], rtol=0, atol=1e-12)


def test_models_of_one_encoder_share_nothing(encoder, rows):
    one, two = FeatureEmbedding(encoder), FeatureEmbedding(encoder)
    tensors = [*one.parameters(), *one.buffers()]
    others = {t.data_ptr() for t in [*two.parameters(), *two.buffers()]}
    assert others.isdisjoint(t.data_ptr() for t in tensors)
    before = two(encoder.transform(rows)).detach().clone()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.fill_(3)
    assert torch.equal(two(encoder.transform(rows)), before)
    text = encoder.to_json()
    encoder.fit(rows.assign(user="other"))
    assert torch.equal(two(Encoder.from_json(text).transform(rows)), before)


def test_no_graph_breaks(plain, encoder, rows):
    torch._dynamo.reset()
    # The run-time type checks of the tests are not part of the package.
    encoder = plain.Encoder.from_json(encoder.to_json())
    embedding, batch = plain.FeatureEmbedding(encoder), encoder.transform(rows)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), embedding(batch))


def test_replicas_can_be_batched(encoder, rows):
    models = [FeatureEmbedding(encoder) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    batch = encoder.transform(rows)

    def run(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (batch,))

    expected = torch.stack([model(batch) for model in models])
    torch.testing.assert_close(torch.vmap(run)(parameters, buffers), expected)


def test_pooling_of_rows_without_any_id_is_zero():
    vectors = torch.randn(5, 3, 7, requires_grad=True)
    real = torch.zeros(5, 3, dtype=torch.bool)
    for pooling in POOLINGS:
        out = pool(vectors, real, pooling)
        assert not out.any()
        (grad,) = torch.autograd.grad(out.sum(), vectors)
        assert not grad.any()


def test_half_precision(encoder, rows):
    embedding = FeatureEmbedding(encoder).to(torch.bfloat16)
    out = embedding(encoder.transform(rows).to(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
