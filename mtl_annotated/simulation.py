"""Data whose truth is known

Chapter: book/simulation.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import expit, logit


# Chapter 'Data whose truth is known', section 'The question'
def _check_integer(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value!r}")


# Chapter 'Data whose truth is known', section 'The question'
def _check_number(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {value!r}")
    if not (math.isfinite(value) and low <= float(value) <= high):
        span = f"[{low:g}, {high:g}] and finite"
        raise ValueError(f"{name} must be in {span}, found {value!r}")


# Chapter 'Data whose truth is known', section 'The question'
def _generator(seed: int | np.random.Generator) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    _check_integer("seed", seed, least=0)
    return np.random.default_rng(seed)


# Chapter 'Data whose truth is known', section 'Two tasks from one curve'
@dataclass(frozen=True)
class SineRecipe:
    """Two regression tasks that read one curve along two directions.

    A label is w·x + Σ sin(α w·x + β) + noise, where w has length ``scale``.

    Source: Ma et al. (KDD 2018), sections 3.2 and 5.1.
    """

    inputs: int
    scale: float
    frequencies: tuple[float, ...]
    phases: tuple[float, ...]
    noise: float = 0.1

    def __post_init__(self) -> None:
        _check_recipe(self)

    def weights(
        self, correlation: float, *, seed: int | np.random.Generator
    ) -> Float[np.ndarray, "2 inputs"]:
        """The two tasks' directions; ``correlation`` is their cosine."""
        _check_number("correlation", correlation, low=-1.0, high=1.0)
        normals = _generator(seed).standard_normal((self.inputs, 2))
        u1, u2 = np.linalg.qr(normals)[0].T
        mixed = correlation * u1 + math.sqrt(1 - correlation**2) * u2
        return self.scale * np.stack([u1, mixed])

    def curve(self, projection: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """The label without noise at each projection w·x."""
        height = projection.copy()
        for frequency, phase in zip(self.frequencies, self.phases, strict=True):
            height += np.sin(frequency * projection + phase)
        return height

    def labels(
        self,
        x: Float[np.ndarray, "batch inputs"],
        weights: Float[np.ndarray, "2 inputs"],
        *,
        seed: int | np.random.Generator,
    ) -> Float[np.ndarray, "batch 2"]:
        """Noisy labels of the rows ``x`` for two directions."""
        clean = self.curve(x @ weights.T)
        return clean + self.noise * _generator(seed).standard_normal(clean.shape)

    def sample(
        self, rows: int, correlation: float, *, seed: int | np.random.Generator
    ) -> tuple[Float[np.ndarray, "batch inputs"], Float[np.ndarray, "batch 2"]]:
        """Inputs and labels of ``rows`` rows of one pair of tasks."""
        _check_integer("rows", rows, least=1)
        rng = _generator(seed)
        weights = self.weights(correlation, seed=rng)
        x = rng.standard_normal((rows, self.inputs))
        return x, self.labels(x, weights, seed=rng)

    def label_covariance(self, correlation: float) -> float:
        """Covariance of the two labels at the given cosine, for normal inputs."""
        _check_number("correlation", correlation, low=-1.0, high=1.0)
        omega = self.scale * np.array(self.frequencies)
        phase = np.array(self.phases)
        shared = correlation * np.multiply.outer(omega, omega)
        halves = np.add.outer(omega**2, omega**2) / 2
        near = np.cos(np.subtract.outer(phase, phase)) * np.exp(shared - halves)
        far = np.cos(np.add.outer(phase, phase)) * np.exp(-shared - halves)
        damped = np.exp(-(omega**2) / 2)
        mean = (damped * np.sin(phase)).sum()
        slopes = (omega * damped * np.cos(phase)).sum()
        line = correlation * self.scale * (self.scale + 2 * slopes)
        return float(line + (near - far).sum() / 2 - mean**2)

    def label_correlation(self, correlation: float) -> float:
        """Pearson correlation of the two labels at the given cosine."""
        variance = self.label_covariance(1.0) + self.noise**2
        return self.label_covariance(correlation) / variance


# Chapter 'Data whose truth is known', section 'Two tasks from one curve'
def _check_recipe(recipe: SineRecipe) -> None:
    _check_integer("inputs", recipe.inputs, least=2)
    _check_number("scale", recipe.scale, low=1e-6)
    _check_number("noise", recipe.noise, low=0.0)
    waves, found = len(recipe.frequencies), len(recipe.phases)
    if waves != found:
        raise ValueError(f"{waves} frequencies need {waves} phases, found {found}")
    for number in (*recipe.frequencies, *recipe.phases):
        _check_number("frequencies and phases", number)


DRAWN_RECIPES = {"copied": (100, 0.3, 5), "ple": (512, 1.0, 10)}


# Chapter 'Data whose truth is known', section 'Three published recipes'
def sine_recipe(name: str, *, seed: int | np.random.Generator = 0) -> SineRecipe:
    """The recipe "recovered" (no seed needed), "copied" or "ple"."""
    if name == "recovered":
        frequencies = (3.664, 6.637, 10.826, 14.085)
        return SineRecipe(100, 0.5572, frequencies, (-math.pi / 2,) * 4)
    if name not in DRAWN_RECIPES:
        choices = ["recovered", *DRAWN_RECIPES]
        raise ValueError(f"recipe must be one of {choices}, found {name!r}")
    inputs, scale, waves = DRAWN_RECIPES[name]
    alpha, beta = _generator(seed).standard_normal((2, waves)).tolist()
    return SineRecipe(inputs, scale, tuple(alpha), tuple(beta))


# Ma et al. (KDD 2018), Figure 2: cosine of the weights, correlation of the labels.
FIGURE_2 = {
    0.4: 0.0546,
    0.5: 0.0739,
    0.6: 0.0995,
    0.7: 0.1343,
    0.8: 0.1927,
    0.9: 0.3053,
    0.95: 0.4463,
    0.98: 0.6571,
    1.0: 0.9965,
}


SEGMENTS = ("city", "country", "suburb", "town")
CATEGORIES = ("books", "garden", "music", "shoes", "sport", "toys")
TRAITS = 8


# Chapter 'Data whose truth is known', section 'A shop's log'
def _latent(
    groups: np.ndarray, count: int, rng: np.random.Generator
) -> Float[np.ndarray, "members traits"]:
    """Vectors of unit variance, half of it shared within each of the groups."""
    shared = rng.standard_normal((count, TRAITS))[groups]
    own = rng.standard_normal((len(groups), TRAITS))
    return math.sqrt(0.5) * (shared + own)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _users(
    users: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, Float[np.ndarray, "users traits"]]:
    segment = rng.integers(len(SEGMENTS), size=users)
    age = np.clip(rng.normal(42, 14, users), 18, 90).round()
    activity = rng.gamma(2.0, size=users)
    people = {
        "segment": segment,
        "age": age.astype(np.int64),
        "activity": activity / activity.sum(),
        "eagerness": 0.5 * rng.standard_normal(users) - 0.02 * (age - 42),
    }
    return pd.DataFrame(people), _latent(segment, len(SEGMENTS), rng)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _items(
    items: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, Float[np.ndarray, "items traits"]]:
    category = rng.integers(len(CATEGORIES), size=items)
    level = rng.normal(3.0, 0.7, len(CATEGORIES))[category]
    dearness = rng.standard_normal(items)
    popularity = 1.0 / rng.permutation(np.arange(1, items + 1))
    goods = {
        "category": category,
        "price": np.exp(level + 0.5 * dearness).round(2),
        "dearness": dearness,
        "popularity": popularity / popularity.sum(),
    }
    return pd.DataFrame(goods), _latent(category, len(CATEGORIES), rng)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _match(
    tastes: Float[np.ndarray, "rows traits"],
    traits: Float[np.ndarray, "rows traits"],
) -> Float[np.ndarray, " rows"]:
    """How well each user's tastes match each item's traits."""
    return np.einsum("rt,rt->r", tastes, traits) / math.sqrt(TRAITS)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _histories(
    tastes: Float[np.ndarray, "users traits"],
    traits: Float[np.ndarray, "items traits"],
    popularity: Float[np.ndarray, " items"],
    rng: np.random.Generator,
) -> np.ndarray:
    lengths = rng.poisson(rng.exponential(6.0, len(tastes)))
    user = np.repeat(np.arange(len(tastes)), lengths)
    seen = rng.choice(len(traits), (3, len(user)), p=popularity)
    fit = [_match(tastes[user], traits[item]) for item in seen]
    best = np.argmax(fit, axis=0)
    chosen = seen[best, np.arange(len(user))]
    chosen.flags.writeable = False
    histories = np.empty(len(tastes), dtype=object)
    histories[:] = np.split(chosen, np.cumsum(lengths)[:-1])
    return histories


# Chapter 'Data whose truth is known', section 'A shop's log'
def _calibrated(score: Float[np.ndarray, " rows"], rate: float) -> np.ndarray:
    """Probabilities sigmoid(constant + score) whose mean is ``rate``."""
    low = logit(rate) - score.max() - 1.0
    high = logit(rate) - score.min() + 1.0
    constant = brentq(lambda shift: expit(shift + score).mean() - rate, low, high)
    return expit(constant + score)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _impressions(
    rows: int,
    people: pd.DataFrame,
    goods: pd.DataFrame,
    rng: np.random.Generator,
) -> pd.DataFrame:
    busy = 1 + 0.8 * np.cos((np.arange(24) - 20) * math.pi / 12)
    user = rng.choice(len(people), rows, p=people["activity"].to_numpy())
    item = rng.choice(len(goods), rows, p=goods["popularity"].to_numpy())
    segment = people["segment"].to_numpy()[user]
    category = goods["category"].to_numpy()[item]
    columns = {
        "user_id": user,
        "age": people["age"].to_numpy()[user],
        "segment": pd.Categorical.from_codes(segment, pd.Index(SEGMENTS)),
        "item_id": item,
        "category": pd.Categorical.from_codes(category, pd.Index(CATEGORIES)),
        "price": goods["price"].to_numpy()[item],
        "hour": rng.choice(24, rows, p=busy / busy.sum()),
    }
    return pd.DataFrame(columns)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _outcomes(
    true_ctr: np.ndarray,
    true_cvr: np.ndarray,
    affinity: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    click = rng.random(len(true_ctr)) < true_ctr
    purchase = click & (rng.random(len(true_cvr)) < true_cvr)
    mood = 0.6 * rng.standard_normal(len(affinity))
    seconds = np.exp(3.0 + 0.5 * affinity + mood)
    columns = {
        "click": click.astype(np.int64),
        "purchase": purchase.astype(np.int64),
        "dwell_time": np.where(click, seconds, np.nan),
        "true_ctr": true_ctr,
        "true_cvr": true_cvr,
    }
    return pd.DataFrame(columns)


# Chapter 'Data whose truth is known', section 'A shop's log'
def _true_rates(
    log: pd.DataFrame,
    people: pd.DataFrame,
    goods: pd.DataFrame,
    affinity: np.ndarray,
    *,
    bias: float,
    click_rate: float,
    purchase_rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    eagerness = people["eagerness"].to_numpy()[log["user_id"]]
    evening = 0.3 * np.cos((log["hour"].to_numpy() - 21) * math.pi / 12)
    dearness = goods["dearness"].to_numpy()[log["item_id"]]
    true_ctr = _calibrated(eagerness + evening + bias * affinity, click_rate)
    true_cvr = _calibrated(affinity - 0.5 * dearness, purchase_rate)
    return true_ctr, true_cvr


# Chapter 'Data whose truth is known', section 'A shop's log'
def _check_shop(
    counts: dict[str, int], rates: dict[str, float], bias: float, hidden: float
) -> None:
    for name, count in counts.items():
        _check_integer(name, count, least=1)
    for name, rate in rates.items():
        _check_number(name, rate, low=1e-6, high=1 - 1e-6)
    _check_number("bias", bias, low=0.0)
    _check_number("hidden", hidden, low=0.0, high=1.0)


# Chapter 'Data whose truth is known', section 'A shop's log'
def shop_log(
    rows: int,
    *,
    users: int = 10_000,
    items: int = 2_000,
    click_rate: float = 0.05,
    purchase_rate: float = 0.1,
    bias: float = 1.0,
    hidden: float = 0.25,
    seed: int | np.random.Generator = 0,
) -> pd.DataFrame:
    """A shop's log, one impression a row, with the probabilities behind it.

    Columns: user_id, age (years), segment, item_id, category, price, hour,
    history (read-only array of item ids, may be empty), click, purchase (0
    wherever click is 0), dwell_time (seconds, NaN without a click), true_ctr,
    true_cvr (both for every row).

    ``click_rate`` and ``purchase_rate`` are the means of true_ctr and true_cvr
    over all rows. ``bias`` >= 0 is the weight of the affinity in the click's
    logit; ``hidden`` is the share of its variance that no column shows.

    Raises:
        TypeError, ValueError: a setting that is not in its range.
    """
    counts = {"rows": rows, "users": users, "items": items}
    rates = {"click_rate": click_rate, "purchase_rate": purchase_rate}
    _check_shop(counts, rates, bias, hidden)
    rng = _generator(seed)
    people, tastes = _users(users, rng)
    goods, traits = _items(items, rng)
    histories = _histories(tastes, traits, goods["popularity"].to_numpy(), rng)
    log = _impressions(rows, people, goods, rng)
    log["history"] = histories[log["user_id"]]
    match = _match(tastes[log["user_id"]], traits[log["item_id"]])
    affinity = math.sqrt(1 - hidden) * match
    affinity += math.sqrt(hidden) * rng.standard_normal(rows)
    true = _true_rates(log, people, goods, affinity, bias=bias, **rates)
    return log.join(_outcomes(*true, affinity, rng))
