"""Chapter `simulation`: generators with a known truth."""

import math
import re
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_annotated import simulation
from mtl_annotated.simulation import (
    CATEGORIES,
    FIGURE_2,
    SEGMENTS,
    SineRecipe,
    shop_log,
    sine_recipe,
)

COLUMNS = [
    "user_id",
    "age",
    "segment",
    "item_id",
    "category",
    "price",
    "hour",
    "history",
    "click",
    "purchase",
    "dwell_time",
    "true_ctr",
    "true_cvr",
]
SMALL = SineRecipe(7, 0.5, (2.0, 3.0, 5.0), (0.0, 1.0, 2.0), noise=0.0)
recipes = st.sampled_from(["recovered", "copied", "ple"])
correlations = st.floats(-1.0, 1.0)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def log():
    return shop_log(200_000, seed=0)


# The regression tasks


@pytest.mark.parametrize(("p", "point"), FIGURE_2.items())
def test_the_recovered_recipe_draws_figure_2_in_closed_form(p, point):
    assert sine_recipe("recovered").label_correlation(p) == pytest.approx(
        point, abs=0.0012
    )


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98, 1.0])
def test_the_recovered_recipe_draws_figure_2_in_samples(p):
    # One sample of 100,000 rows has a standard error of 0.003; take eight.
    recipe = sine_recipe("recovered")
    found = [
        np.corrcoef(recipe.sample(100_000, p, seed=seed)[1].T)[0, 1]
        for seed in range(8)
    ]
    assert np.mean(found) == pytest.approx(FIGURE_2[p], abs=0.005)


def test_the_second_fit_draws_figure_2_too():
    second = SineRecipe(
        100,
        0.5771,
        (3.829, 9.476, 9.541, 4.989, 14.639),
        (1.342, 5.302, 0.526, 2.880, 3.107),
    )
    for p, point in FIGURE_2.items():
        assert second.label_correlation(p) == pytest.approx(point, abs=0.001)


def test_the_copied_recipe_keeps_its_labels_correlated():
    found = [sine_recipe("copied", seed=s).label_correlation(0.5) for s in range(500)]
    assert np.mean(found) == pytest.approx(0.39, abs=0.03)
    assert np.std(found) == pytest.approx(0.12, abs=0.02)


def test_the_ple_recipe_keeps_its_labels_correlated():
    found = [sine_recipe("ple", seed=s).label_correlation(0.5) for s in range(500)]
    assert np.mean(found) == pytest.approx(0.335, abs=0.02)
    high = [sine_recipe("ple", seed=s).label_correlation(0.9) for s in range(500)]
    assert np.mean(high) == pytest.approx(0.80, abs=0.02)


@pytest.mark.parametrize("name", ["recovered", "copied", "ple"])
@pytest.mark.parametrize("p", [-1.0, -0.4, 0.0, 0.7, 1.0])
def test_closed_form_and_samples_agree(name, p):
    recipe = sine_recipe(name, seed=3)
    _, y = recipe.sample(20_000, p, seed=4)
    covariance = np.cov(y.T)
    variance = recipe.label_covariance(1.0) + recipe.noise**2
    assert np.diag(covariance) == pytest.approx([variance] * 2, rel=0.06)
    assert np.corrcoef(y.T)[0, 1] == pytest.approx(
        recipe.label_correlation(p), abs=0.035
    )


def test_the_variance_of_the_recovered_labels():
    recipe = sine_recipe("recovered")
    assert recipe.label_covariance(1.0) + 0.01 == pytest.approx(2.82, abs=0.01)
    assert recipe.label_correlation(-1.0) == pytest.approx(0.776, abs=0.001)


def test_a_straight_line_without_noise_has_correlation_p():
    line = SineRecipe(3, 2.0, (), (), noise=0.0)
    for p in (-1.0, -0.3, 0.0, 0.5, 1.0):
        assert line.label_correlation(p) == pytest.approx(p)


@pytest.mark.parametrize(
    ("name", "inputs", "scale", "waves"),
    [("recovered", 100, 0.5572, 4), ("copied", 100, 0.3, 5), ("ple", 512, 1.0, 10)],
)
def test_the_constants_of_the_recipes(name, inputs, scale, waves):
    recipe = sine_recipe(name, seed=5)
    assert (recipe.inputs, recipe.scale, recipe.noise) == (inputs, scale, 0.1)
    assert len(recipe.frequencies) == len(recipe.phases) == waves
    x, y = recipe.sample(3, 0.5, seed=0)
    assert x.shape == (3, inputs)
    assert y.shape == (3, 2)


def test_the_seed_draws_a_member_of_the_family():
    assert sine_recipe("recovered", seed=1) == sine_recipe("recovered", seed=2)
    for name in ("copied", "ple"):
        assert sine_recipe(name, seed=1) == sine_recipe(name, seed=1)
        assert sine_recipe(name, seed=1) != sine_recipe(name, seed=2)
    drawn = [sine_recipe("copied", seed=s) for s in range(400)]
    for constants in ("frequencies", "phases"):
        values = np.array([getattr(recipe, constants) for recipe in drawn])
        assert values.mean() == pytest.approx(0.0, abs=0.07)
        assert values.std() == pytest.approx(1.0, abs=0.05)


def test_a_recipe_is_a_frozen_hashable_value():
    with pytest.raises(FrozenInstanceError):
        SMALL.scale = 1.0  # type: ignore[misc]
    assert SineRecipe(**asdict(SMALL)) == SMALL
    assert len({SMALL, SineRecipe(**asdict(SMALL))}) == 1


def test_labels_by_hand():
    x, y = SMALL.sample(5, 0.8, seed=0)
    rng = np.random.default_rng(0)
    w = SMALL.weights(0.8, seed=rng)
    assert np.array_equal(x, rng.standard_normal((5, 7)))
    for row in range(5):
        for task in range(2):
            t = float(w[task] @ x[row])
            waves = math.sin(2 * t) + math.sin(3 * t + 1) + math.sin(5 * t + 2)
            assert y[row, task] == pytest.approx(t + waves)
    assert y[0, 0] == pytest.approx(1.6452, abs=5e-5)


def test_fixed_directions_and_new_rows():
    recipe = sine_recipe("recovered")
    rng = np.random.default_rng(0)
    w = recipe.weights(1.0, seed=rng)
    x = rng.standard_normal((1_000, 100))
    first, second = (recipe.labels(x, w, seed=rng) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.std(first - second) == pytest.approx(0.1 * math.sqrt(2), rel=0.1)


def test_curve_leaves_its_argument_alone():
    at = np.array([0.0, 1.0])
    SMALL.curve(at)
    assert at.tolist() == [0.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(name=recipes, p=correlations, rows=st.integers(1, 20), seed=seeds)
def test_any_sample(name, p, rows, seed):
    recipe = sine_recipe(name, seed=seed)
    x, y = recipe.sample(rows, p, seed=seed)
    assert x.shape == (rows, recipe.inputs)
    assert y.shape == (rows, 2)
    assert x.dtype == y.dtype == np.float64
    assert np.isfinite(x).all()
    assert np.isfinite(y).all()
    again = recipe.sample(rows, p, seed=np.random.default_rng(seed))
    assert np.array_equal(x, again[0])
    assert np.array_equal(y, again[1])


@settings(max_examples=40, deadline=None)
@given(name=recipes, p=correlations, seed=seeds)
def test_any_pair_of_directions(name, p, seed):
    recipe = sine_recipe(name)
    w1, w2 = recipe.weights(p, seed=seed)
    assert np.linalg.norm([w1, w2], axis=1) == pytest.approx([recipe.scale] * 2)
    assert w1 @ w2 == pytest.approx(p * recipe.scale**2, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    p=correlations,
    scale=st.floats(0.01, 3.0),
    waves=st.lists(st.tuples(st.floats(-20.0, 20.0), st.floats(-7.0, 7.0)), max_size=6),
)
def test_any_label_correlation_is_one(p, scale, waves):
    frequencies = tuple(frequency for frequency, _ in waves)
    recipe = SineRecipe(2, scale, frequencies, tuple(phase for _, phase in waves))
    assert abs(recipe.label_correlation(p)) <= 1.0
    assert abs(recipe.label_covariance(0.0)) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": 1}, "inputs must be at least 2, found 1"),
        ({"scale": 0.0}, "scale must be in [1e-06, inf] and finite, found 0.0"),
        ({"scale": math.nan}, "scale must be in [1e-06, inf] and finite, found nan"),
        ({"noise": -0.1}, "noise must be in [0, inf] and finite, found -0.1"),
        ({"phases": (0.0,)}, "3 frequencies need 3 phases, found 1"),
        ({"phases": (0.0, 1.0, math.inf)}, "frequencies and phases must be"),
    ],
)
def test_recipes_that_cannot_be_sampled_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SineRecipe(**(asdict(SMALL) | arguments))


@pytest.mark.parametrize("p", [-1.01, 1.5, math.nan, math.inf])
def test_a_correlation_outside_its_range_is_refused(p):
    message = rf"correlation must be in \[-1, 1\] and finite, found {p}"
    with pytest.raises(ValueError, match=message):
        SMALL.sample(5, p, seed=0)
    with pytest.raises(ValueError, match=message):
        SMALL.label_correlation(p)


def test_other_refusals_of_the_sampler():
    with pytest.raises(ValueError, match="rows must be at least 1, found 0"):
        SMALL.sample(0, 0.5, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, found -1"):
        SMALL.sample(5, 0.5, seed=-1)
    with pytest.raises(TypeError, match="rows"):
        SMALL.sample(5.5, 0.5, seed=0)  # type: ignore[arg-type]
    message = "recipe must be one of ['recovered', 'copied', 'ple'], found 'google'"
    with pytest.raises(ValueError, match=re.escape(message)):
        sine_recipe("google")


@pytest.mark.parametrize("value", [5.0, "5", None, True])
def test_what_is_no_integer_is_refused(value):
    message = re.escape(f"rows must be an integer, found {value!r}")
    with pytest.raises(TypeError, match=message):
        simulation._check_integer("rows", value, least=1)


@pytest.mark.parametrize("value", ["0.5", None, False, 1j])
def test_what_is_no_number_is_refused(value):
    message = re.escape(f"bias must be a number, found {value!r}")
    with pytest.raises(TypeError, match=message):
        simulation._check_number("bias", value)


def test_numpy_numbers_are_numbers():
    simulation._check_integer("rows", np.int32(5), least=1)
    simulation._check_number("bias", np.float32(0.5))


# The shop's log


def test_columns_and_kinds(log):
    assert list(log.columns) == COLUMNS
    assert len(log) == 200_000
    assert log["user_id"].between(0, 9_999).all()
    assert log["item_id"].between(0, 1_999).all()
    assert log["hour"].between(0, 23).all()
    assert log["age"].between(18, 90).all()
    assert (log["price"] > 0).all()
    assert set(log["segment"]) == set(SEGMENTS)
    assert set(log["category"]) == set(CATEGORIES)
    assert set(log["click"]) == set(log["purchase"]) == {0, 1}
    assert log.drop(columns="dwell_time").notna().all().all()


def test_the_funnel_is_nested(log):
    assert (log["purchase"] <= log["click"]).all()
    assert (log["dwell_time"].notna() == (log["click"] == 1)).all()
    assert (log["dwell_time"].dropna() > 0).all()


def test_users_and_items_keep_their_columns(log):
    assert (log.groupby("user_id")[["age", "segment"]].nunique() == 1).all().all()
    assert (log.groupby("item_id")[["category", "price"]].nunique() == 1).all().all()


@pytest.mark.parametrize("bias", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("click", "buy"), [(0.05, 0.1), (0.3, 0.01), (0.001, 0.7)])
def test_the_true_rates_have_the_means_asked_for(bias, click, buy):
    log = shop_log(20_000, click_rate=click, purchase_rate=buy, bias=bias, seed=2)
    assert log["true_ctr"].mean() == pytest.approx(click, rel=1e-6)
    assert log["true_cvr"].mean() == pytest.approx(buy, rel=1e-6)


def test_the_coins_obey_the_true_rates(log):
    clicked = log[log["click"] == 1]
    ctcvr = log["true_ctr"] * log["true_cvr"]
    for label, rate in [
        (log["click"], log["true_ctr"]),
        (clicked["purchase"], clicked["true_cvr"]),
        (log["purchase"], ctcvr),
    ]:
        group = pd.qcut(rate, 10, labels=False)
        gap = (label - rate).groupby(group).sum()
        spread = (rate * (1 - rate)).groupby(group).sum() ** 0.5
        assert (gap / spread).abs().max() < 4.0


def test_popularity_follows_zipf(log):
    counts = log["item_id"].value_counts().to_numpy()[:200]
    slope, _ = np.polyfit(np.log(np.arange(1, 201)), np.log(counts), 1)
    assert slope == pytest.approx(-1.0, abs=0.03)


def test_an_id_does_not_tell_the_popularity(log):
    counts = log["item_id"].value_counts()
    assert abs(counts.rank().corr(counts.index.to_series())) < 0.1


def test_prices_are_log_normal(log):
    prices = np.log(log.drop_duplicates("item_id")["price"])
    within = prices - prices.groupby(log["category"], observed=True).transform("mean")
    assert within.std() == pytest.approx(0.5, abs=0.05)
    assert abs(within.skew()) < 0.25


def test_histories_belong_to_users(log):
    ids = log["user_id"].to_numpy()
    firsts = dict(zip(ids[::-1], log["history"].to_numpy()[::-1], strict=True))
    assert all(
        history is firsts[user]
        for user, history in zip(ids, log["history"], strict=True)
    )
    lengths = pd.Series({user: len(history) for user, history in firsts.items()})
    assert 0.05 < (lengths == 0).mean() < 0.3
    assert lengths.mean() == pytest.approx(6.0, abs=0.3)
    seen = np.concatenate(list(firsts.values()))
    assert seen.dtype.kind == "i"
    assert seen.min() >= 0
    assert seen.max() < 2_000


def test_a_shared_history_cannot_be_changed_by_accident(log):
    longest = max(log["history"].head(100), key=len)
    with pytest.raises(ValueError, match="read-only"):
        longest[0] = 0


def test_histories_tell_something_about_tastes(log):
    category = log.drop_duplicates("item_id").set_index("item_id")["category"]
    some = log[log["history"].map(len) > 0].head(20_000)
    viewed = np.array(
        [
            kind in set(category.reindex(history))
            for kind, history in zip(some["category"], some["history"], strict=True)
        ]
    )
    rate = some["true_cvr"]
    assert rate[viewed].mean() > 1.15 * rate[~viewed].mean()


def test_columns_tell_something_about_the_rates(log):
    cells = log.groupby(["segment", "category"], observed=True)["true_cvr"].mean()
    assert cells.max() > 2 * cells.min()


def excess(bias, seed):
    """How far the true CVR of clicked rows lies above that of all rows."""
    log = shop_log(50_000, bias=bias, seed=seed)
    return log.loc[log["click"] == 1, "true_cvr"].mean() / log["true_cvr"].mean()


def test_the_bias_knob_is_monotone_and_off_at_zero():
    ratios = np.array([[excess(b, s) for b in (0.0, 0.5, 1.0, 2.0)] for s in range(8)])
    assert (np.diff(ratios, axis=1) > 0.1).all()
    error = ratios[:, 0].std(ddof=1) / math.sqrt(8)
    assert abs(ratios[:, 0].mean() - 1.0) < 4 * error
    assert error < 0.02
    assert ratios[:, 2].mean() == pytest.approx(1.95, abs=0.15)


def test_propensity_weights_undo_the_selection():
    found = []
    for seed in range(8):
        log = shop_log(50_000, seed=seed)
        found.append((log["purchase"] / log["true_ctr"]).mean())
    assert np.mean(found) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("hidden", "low", "high"), [(0.0, 1, 1), (0.5, 1.2, 1.5)])
def test_hidden_is_what_the_pair_does_not_show(hidden, low, high):
    log = shop_log(60_000, users=40, items=15, hidden=hidden, seed=0)
    pair = log.groupby(["user_id", "item_id"])["true_cvr"].transform("mean")
    clicked = log["click"] == 1
    ratio = log.loc[clicked, "true_cvr"].mean() / pair[clicked].mean()
    assert low - 1e-9 <= ratio <= high + 1e-9


def test_bias_and_rates_leave_the_impressions_alone():
    shown = COLUMNS[: COLUMNS.index("click")]
    base = shop_log(500, seed=3)
    for other in (
        shop_log(500, seed=3, bias=0.0),
        shop_log(500, seed=3, click_rate=0.5, purchase_rate=0.5),
    ):
        plain = [name for name in shown if name != "history"]
        pd.testing.assert_frame_equal(base[plain], other[plain])
        for one, two in zip(base["history"], other["history"], strict=True):
            assert np.array_equal(one, two)
    assert not base["true_ctr"].equals(shop_log(500, seed=3, bias=0.0)["true_ctr"])
    assert base["true_cvr"].equals(shop_log(500, seed=3, bias=0.0)["true_cvr"])


def test_the_same_seed_gives_the_same_log():
    first, again, other = (shop_log(1_000, seed=seed) for seed in (5, 5, 6))
    pd.testing.assert_frame_equal(
        first.drop(columns="history"), again.drop(columns="history")
    )
    assert not first["item_id"].equals(other["item_id"])
    stream = shop_log(1_000, seed=np.random.default_rng(5))
    assert first["true_ctr"].equals(stream["true_ctr"])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    users=st.integers(1, 40),
    items=st.integers(1, 40),
    click_rate=st.floats(0.001, 0.999),
    purchase_rate=st.floats(0.001, 0.999),
    bias=st.floats(0.0, 5.0),
    hidden=st.floats(0.0, 1.0),
    seed=seeds,
)
def test_any_log(rows, click_rate, purchase_rate, **options):
    log = shop_log(rows, click_rate=click_rate, purchase_rate=purchase_rate, **options)
    assert list(log.columns) == COLUMNS
    assert len(log) == rows
    assert (log["purchase"] <= log["click"]).all()
    assert (log["dwell_time"].notna() == (log["click"] == 1)).all()
    assert log[["true_ctr", "true_cvr"]].stack().between(0, 1).all()
    assert log["true_ctr"].mean() == pytest.approx(click_rate, abs=1e-6)
    assert log["true_cvr"].mean() == pytest.approx(purchase_rate, abs=1e-6)
    assert log["history"].map(lambda history: history.dtype.kind == "i").all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, found 0"),
        ({"users": 0}, "users must be at least 1, found 0"),
        ({"items": -3}, "items must be at least 1, found -3"),
        ({"click_rate": -0.1}, "click_rate must be in [1e-06, 0.999999] and finite"),
        ({"click_rate": 0.0}, "click_rate must be in [1e-06, 0.999999] and finite"),
        ({"purchase_rate": 1.0}, "purchase_rate must be in [1e-06, 0.999999]"),
        ({"purchase_rate": math.nan}, "purchase_rate must be in"),
        ({"bias": -1.0}, "bias must be in [0, inf] and finite, found -1.0"),
        ({"bias": math.inf}, "bias must be in [0, inf] and finite, found inf"),
        ({"hidden": 1.5}, "hidden must be in [0, 1] and finite, found 1.5"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_settings_that_make_no_log_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shop_log(**({"rows": 10} | options))


@pytest.mark.parametrize("name", ["rows", "users", "items", "seed"])
def test_counts_that_are_no_integers_are_refused(name):
    with pytest.raises(TypeError, match=name):
        shop_log(**({"rows": 10} | {name: 2.5}))


@pytest.mark.slow
def test_a_million_rows():
    log = shop_log(1_000_000, seed=0)
    assert len(log) == 1_000_000
    assert log.memory_usage(deep=False).sum() < 120e6
    distinct = {id(history) for history in log["history"]}
    assert len(distinct) <= 10_000
