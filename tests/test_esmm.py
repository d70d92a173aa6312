"""ESMM against a NumPy reference, by finite differences, and by its promises."""

import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_slopes, by_task, slopes_by_task
from torch.nn import functional as F

import mtl_annotated.training
from mtl_annotated.esmm import ESMM, conversion_logit, conversion_loss
from mtl_annotated.features import Dense, Encoder, FeatureEmbedding, Sparse
from mtl_annotated.mmoe import MMoE
from mtl_annotated.shared_bottom import SharedBottom
from mtl_annotated.tasks import Task
from mtl_annotated.training import evaluate, fit, predict
from mtl_annotated.weaving import results

FUNNEL = [Task("click"), Task("purchase")]
NAN = float("nan")


def rows(count, seed=0):
    generator = np.random.default_rng(seed)
    click = generator.integers(0, 2, count)
    return pd.DataFrame(
        {
            "item": generator.integers(0, 13, count),
            "price": generator.normal(size=count),
            "click": click,
            "purchase": click * generator.integers(0, 2, count),
            "stars": generator.integers(0, 3, count),
            "seconds": generator.normal(size=count),
        }
    )


def encoded(tasks=FUNNEL, count=11, table=None):
    encoder = Encoder([Sparse("item", width=3), Dense("price")], tasks).fit(rows(101))
    table = rows(count, seed=1) if table is None else table
    return encoder, encoder.transform(table).to(dtype=torch.float64)


def built(encoder, **options):
    torch.manual_seed(0)
    return ESMM(encoder, **{"tower_units": (5,)} | options).double()


def labeled(click, purchase, weights=None):
    """A batch with these labels, whatever its features."""
    _, batch = encoded(count=len(click))
    labels = torch.tensor([click, purchase], dtype=torch.float64).T
    if weights is not None:
        weights = torch.tensor(weights, dtype=torch.float64)
    return replace(batch, labels=labels, weights=weights)


def numpy_logits(model, batch):
    """Two separate relu networks on one embedding, from the weights alone."""
    state = {name: value.numpy() for name, value in by_task(model).items()}
    features = model.embedding(batch).detach().numpy()
    logits = []
    for task in ("click", "purchase"):
        hidden, layer = features, 0
        while f"towers.{task}.hidden.{layer}.weight" in state:
            own = f"towers.{task}.hidden.{layer}"
            x = hidden @ state[f"{own}.weight"].T + state[f"{own}.bias"]
            hidden, layer = np.maximum(x, 0), layer + 2
        own = f"towers.{task}.output"
        logits.append(hidden @ state[f"{own}.weight"].T + state[f"{own}.bias"])
    return np.concatenate(logits, axis=1)


def numpy_loss(logits, click, purchase, weights):
    """Equation 3 with means over rows, from plain probabilities."""
    ctr, cvr = (1 / (1 + np.exp(-logits))).T
    both, chance = click * purchase, ctr * cvr
    first = click * np.log(ctr) + (1 - click) * np.log(1 - ctr)
    second = both * np.log(chance) + (1 - both) * np.log(1 - chance)
    return -(weights * (first + second)).mean()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 7), max_size=3),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 9),
)
def test_forward_and_loss_equal_a_numpy_reference(units, count, weighted, seed):
    encoder, batch = encoded(table=rows(count, seed))
    model = ESMM(encoder, tower_units=units).double()
    weights = np.ones(count)
    if weighted:
        weights = np.random.default_rng(seed).uniform(0.5, 2, count)
        batch = replace(batch, weights=torch.tensor(weights))
    expected = numpy_logits(model, batch)
    logits = model(batch)
    assert logits.shape == (count, 2)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-10, rtol=0)
    click, purchase = batch.labels.numpy().T
    loss = numpy_loss(expected, click, purchase, weights)
    assert model.loss(batch).item() == pytest.approx(loss, abs=1e-10)
    ctr, cvr = (1 / (1 + np.exp(-expected))).T
    found = model.predictions(batch).detach().numpy()
    np.testing.assert_allclose(found, np.stack([ctr, cvr, ctr * cvr], 1), atol=1e-10)


def test_gradients_equal_finite_differences():
    encoder, batch = encoded()
    model = built(encoder, activation="tanh")
    assert_slopes(model, batch)


def exact(click, conversion):
    """The logit, its slopes, and by label the loss and its slopes, to 400 digits."""
    with localcontext() as context:
        context.prec = 400
        one, two = (-Decimal(click)).exp(), (-Decimal(conversion)).exp()
        both = one * two
        total = one + two + both
        slopes = (one + both) / total, (two + both) / total
        yes, no = 1 / (1 + total), total / (1 + total)
        return {
            "logit": (-total.ln(), *slopes),
            0: ((1 + 1 / total).ln(), *(yes * slope for slope in slopes)),
            1: ((1 + total).ln(), *(-no * slope for slope in slopes)),
        }


def found_by(function, click, conversion, dtype):
    """A value and its slopes in both logits, with 24 copies: the vectorized code."""
    logits = torch.tensor([[click], [conversion]], dtype=dtype).repeat(1, 24)
    logits.requires_grad_()
    value = function(*logits)
    value.sum().backward()
    return [Decimal(x.item()) for x in (value[0], *logits.grad[:, 0])]


def cross_entropy(label):
    return lambda a, b: conversion_loss(a, b, torch.full_like(a, label))


def assert_right(click, conversion, dtype):
    """Relative errors of a few roundings, times the larger logit."""
    expected, eps = exact(click, conversion), torch.finfo(dtype).eps
    rounding = Decimal(3 * eps * max(1, abs(click), abs(conversion)))
    value, *slopes = found_by(conversion_logit, click, conversion, dtype)
    assert abs(value - expected["logit"][0]) <= rounding
    pairs = list(zip(slopes, expected["logit"][1:], strict=True))
    for label in (0, 1):
        loss = found_by(cross_entropy(label), click, conversion, dtype)
        pairs += zip(loss, expected[label], strict=True)
    # Where the format has no more normal numbers, only the size can be right.
    least = Decimal(1000 * torch.finfo(dtype).tiny)
    for found, truth in pairs:
        assert abs(found - truth) <= max(rounding * abs(truth), least)


CORNERS = [
    (-3, -7),
    (-5, -12),
    (-8, -16),
    (-40, 0.5),
    (-69, -69),
    (20, 20),
    (200, 200),
    (-200, 200),
    (200, -200),
]


@pytest.mark.parametrize(("click", "conversion"), CORNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_right_in_the_corners(click, conversion, dtype):
    assert_right(click, conversion, dtype)


wide = st.floats(-200, 200, width=32)


@settings(max_examples=60, deadline=None)
@given(wide, wide, st.sampled_from([torch.float32, torch.float64]))
def test_values_and_slopes_are_right_to_a_few_roundings(click, conversion, dtype):
    assert_right(click, conversion, dtype)


moderate = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=100, deadline=None)
@given(moderate, moderate, st.sampled_from([0.0, 1.0]))
def test_loss_and_gradient_are_finite_for_any_moderate_logit(a, b, label):
    logits = torch.tensor([[a], [b]], requires_grad=True)
    loss = conversion_loss(*logits, torch.tensor([label]))
    loss.sum().backward()
    assert 0 <= loss.item() < torch.inf
    # In [-1, 0] with a conversion, in [0, 1] without, up to a rounding.
    assert (logits.grad * (1 - 2 * label) >= 0).all()
    assert (logits.grad.abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_loss_and_gradient_are_finite_in_all_corners(size, label):
    corners = torch.tensor([-size, 0.0, size])
    logits = torch.cartesian_prod(corners, corners).requires_grad_()
    loss = conversion_loss(*logits.unbind(1), torch.full((9,), label))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs() <= 1 + 1e-6).all()


def test_the_naive_product_loses_what_ours_keeps():
    logits = torch.full((1,), -69.0, requires_grad=True)
    naive = (logits.sigmoid() * logits.sigmoid()).log()
    assert naive.item() == -torch.inf
    found = conversion_loss(logits, logits, torch.ones(1))
    assert found.item() == pytest.approx(138)
    found.backward()
    assert logits.grad.item() == pytest.approx(-2)


def test_two_losses_of_pytorch_lose_what_ours_keeps():
    """Why the loss is written with logsigmoid: values at one end, slopes at both."""
    logit = torch.tensor([-20.0])
    assert F.binary_cross_entropy_with_logits(logit, torch.zeros(1)) == 0
    assert -F.logsigmoid(-logit).item() == pytest.approx(2.0611536e-9, rel=1e-6)
    far = torch.tensor([20.5], dtype=torch.float64)
    assert F.softplus(far) == far
    assert -F.logsigmoid(-far) > far


def test_bfloat16_logits_are_read_in_single_precision():
    encoder, batch = encoded()
    model = built(encoder).bfloat16()
    batch = batch.to(dtype=torch.bfloat16)
    logits = model(batch)
    assert logits.dtype == torch.bfloat16
    losses = model.losses(batch, logits)
    assert losses.dtype == torch.float32
    wide_losses = model.losses(batch, logits.float())
    assert torch.equal(losses, wide_losses)
    assert model.predictions(batch, logits).dtype == torch.float32
    model.joint(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_conversion_logit_gets_the_gradient_of_the_product_alone():
    encoder, batch = encoded(count=31)
    model = built(encoder)
    logits = model(batch).detach().requires_grad_()
    model.joint(model.losses(batch, logits)).backward()
    found = logits.grad.clone()
    logits.grad = None
    model.losses(batch, logits)[2].backward()
    assert torch.equal(found[:, 1], logits.grad[:, 1])
    p, q = logits.detach().sigmoid().unbind(1)
    bought = batch.labels.prod(1) == 1
    expected = torch.where(bought, q - 1, p * q * (1 - q) / (1 - p * q)) / 31
    torch.testing.assert_close(found[:, 1], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_the_cvr_entry_cannot_leak_into_the_joint_loss(value):
    encoder, _ = encoded()
    losses = torch.tensor([0.25, value, 0.5], dtype=torch.float64, requires_grad=True)
    joint = built(encoder).joint(losses)
    joint.backward()
    assert joint.item() == 0.75
    assert losses.grad.tolist() == [1, 0, 1]


def test_weights_are_those_of_the_two_tasks():
    tasks = [Task("click", weight=3, weight_ratio=0.5), Task("purchase", weight=5)]
    model = built(encoded(tasks)[0])
    losses = torch.tensor([1.0, 100.0, 10.0])
    assert model.joint(losses).item() == 3 + 50
    assert model.joint(losses, epoch=2).item() == 0.75 + 50
    assert [task.weight for task in model.tasks] == [3, 0, 5]


def test_the_three_labels_of_every_pair():
    click = [0, 0, 0, 1, 1, 1, NAN, NAN, NAN]
    purchase = [0, 1, NAN, 0, 1, NAN, 0, 1, NAN]
    model = built(encoded()[0])
    found = model.labels(labeled(click, purchase)).T
    expected = torch.tensor(
        [
            click,
            [NAN, NAN, NAN, 0, 1, NAN, NAN, NAN, NAN],
            [0, 0, 0, 0, 1, NAN, NAN, NAN, NAN],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_given_or_not_labels_and_losses_are_the_same():
    table = rows(53, seed=4)
    table.loc[::7, "click"] = NAN
    table.loc[::5, "purchase"] = NAN
    free, batch = encoded(table=table)
    bound, other = encoded([Task("click"), Task("purchase", given="click")], 0, table)
    one, two = built(free), built(bound)
    assert torch.equal(
        one.labels(batch).nan_to_num(-1), two.labels(other).nan_to_num(-1)
    )
    assert torch.equal(one.losses(batch), two.losses(other))


def test_a_missing_purchase_takes_its_row_from_cvr_and_ctcvr_only():
    click, purchase = [1, 1, 0, 1], [1, 0, 0, 1]
    model = built(encoded()[0])
    whole = labeled(click, purchase)
    cut = replace(whole, labels=whole.labels.clone())
    cut.labels[3, 1] = NAN
    logits = torch.randn(4, 2, dtype=torch.float64)
    before, after = model.losses(whole, logits), model.losses(cut, logits)
    assert before[0] == after[0]
    assert torch.equal(after[1:], model.losses(whole[:3], logits[:3])[1:])


def test_without_labels_the_losses_are_zero_and_so_are_the_gradients():
    model = built(encoded()[0])
    batch = labeled([NAN] * 3, [NAN] * 3)
    assert model.losses(batch).tolist() == [0, 0, 0]
    model.loss(batch).backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_a_row_of_weight_two_counts_as_two_rows():
    model = built(encoded()[0])
    batch = labeled([1, 0, 1], [1, 0, 0], weights=[2, 1, 0])
    logits = torch.randn(3, 2, dtype=torch.float64)
    by_row = [
        model.losses(labeled(*pair), logits[i : i + 1])
        for i, pair in enumerate([([1], [1]), ([0], [0])])
    ]
    found = model.losses(batch, logits)
    expected = torch.stack([2 * by_row[0] + by_row[1]])[0]
    # Means divide by the rows that count: two for ctr and ctcvr, one for cvr.
    torch.testing.assert_close(found, expected / torch.tensor([2.0, 1.0, 2.0]).double())


def test_a_conversion_without_a_click_is_refused_with_count_and_shares():
    model = built(encoded()[0])
    batch = labeled([1, 0, 0, 0, 1], [1, 1, 1, 0, 0])
    message = (
        "2 rows have 'purchase' = 1 and 'click' = 0: 40.0% of 5 rows, 66.7% of 3"
        " conversions."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.check(batch)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, batch, epochs=1, progress=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, batch)


def test_the_refusal_counts_no_row_of_weight_zero():
    batch = labeled([1, 0, 0, 0, 1], [1, 1, 1, 0, 0], weights=[1, 0.5, 0, 0, 2])
    message = (
        "1 rows have 'purchase' = 1 and 'click' = 0: 33.3% of 3 rows, 50.0% of 2"
        " conversions."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        built(encoded()[0]).check(batch)


def test_the_refusal_names_the_columns_and_fit_the_set_of_rows():
    tasks = [Task("click", label="clicked"), Task("purchase", label="bought")]
    table = rows(101).rename(columns={"click": "clicked", "purchase": "bought"})
    encoder = Encoder([Sparse("item", width=3)], tasks).fit(table)
    good = encoder.transform(table[:7])
    bad = encoder.transform(table[:7].assign(clicked=0, bought=1))
    with pytest.raises(ValueError, match="7 rows have 'bought' = 1 and 'clicked' = 0"):
        fit(ESMM(encoder), good, bad, epochs=1, progress=False)


@pytest.mark.parametrize(
    ("click", "purchase", "weights"),
    [
        ([1, 0, 1, NAN], [1, 0, NAN, 1], None),
        ([0, 1], [1, 1], [0, 1]),
        ([0, 0], [0, NAN], None),
    ],
)
def test_labels_that_nest_or_do_not_count_pass(click, purchase, weights):
    built(encoded()[0]).check(labeled(click, purchase, weights))


class Whole(SharedBottom):
    whole_batches = True


def test_a_ranker_that_wants_whole_batches_gets_them():
    assert built(encoded()[0], ranker=Whole).whole_batches
    assert not built(encoded()[0]).whole_batches


class OwnForward(SharedBottom):
    def forward(self, batch):
        return super().forward(batch) + 1


MIXED = [*FUNNEL, Task("stars", "multiclass", classes=3), Task("seconds", "regression")]
REFUSALS = [
    (
        {"click": "klick"},
        ValueError,
        "click: expected the name of a binary task, found 'klick'; choose from click,"
        " purchase",
    ),
    (
        {"conversion": "stars"},
        ValueError,
        "conversion: expected the name of a binary task, found 'stars', a multiclass"
        " task; choose from click, purchase",
    ),
    (
        {"click": "seconds"},
        ValueError,
        "click: expected the name of a binary task, found 'seconds', a regression task",
    ),
    (
        {"conversion": "click"},
        ValueError,
        "conversion: expected another task than click='click'",
    ),
    (
        {"ranker": lambda encoder, **options: torch.nn.Linear(2, 2)},
        TypeError,
        "ranker: expected one that builds a Ranker, found Linear",
    ),
    ({"experts": 3}, TypeError, "'experts'"),
    (
        {"click": ["click"]},
        TypeError,
        "click: expected the name of one task, found ['click']",
    ),
    (
        {"conversion": None},
        TypeError,
        "conversion: expected the name of one task, found None",
    ),
    (
        {"ranker": "MMoE"},
        TypeError,
        "ranker: expected a class such as MMoE, or a function that builds one, found"
        " 'MMoE'",
    ),
    (
        {"ranker": MMoE(encoded(MIXED)[0])},
        TypeError,
        "ranker: expected a class such as MMoE, or a function that builds one, found"
        " a finished MMoE",
    ),
    (
        {"ranker": lambda encoder, tasks: SharedBottom(encoder, tasks=tasks[::-1])},
        ValueError,
        "ranker: expected the tasks click, purchase in this order, found purchase,"
        " click in the SharedBottom that it builds",
    ),
    (
        {"ranker": lambda encoder, tasks: SharedBottom(encoder)},
        ValueError,
        "in this order, found click, purchase, stars, seconds in the SharedBottom",
    ),
    (
        {"ranker": lambda encoder, tasks: ESMM(encoder)},
        ValueError,
        "in this order, found ctr, cvr, ctcvr in the ESMM that it builds",
    ),
    (
        {"ranker": OwnForward},
        TypeError,
        "ranker: OwnForward has a forward of its own, which ESMM would not call",
    ),
]


@pytest.fixture
def unchecked():
    """Annotations are not asserted: what a caller without them would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_what_cannot_be_built_is_refused(unchecked, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ESMM(encoded(MIXED)[0], **options)


@pytest.mark.parametrize("encoder", [None, rows(3), "encoder"])
def test_what_is_no_encoder_is_refused_as_by_other_models(unchecked, encoder):
    errors = []
    for build in (SharedBottom, ESMM):
        with pytest.raises(TypeError, match="encoder: expected an Encoder") as caught:
            build(encoder)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_without_a_binary_task_the_refusal_says_so():
    encoder, _ = encoded([Task("seconds", "regression")])
    with pytest.raises(ValueError, match="none: the encoder has no binary task"):
        ESMM(encoder)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(-(2.0**127), 2.0**127, width=32)] * 2),
        min_size=1,
        max_size=8,
    )
)
def test_ctcvr_never_exceeds_ctr_or_cvr(pairs):
    model, batch = MODEL
    ctr, cvr, ctcvr = model.predictions(batch, torch.tensor(pairs)).unbind(1)
    assert (ctcvr <= ctr).all()
    assert (ctcvr <= cvr).all()
    assert (ctcvr >= 0).all()


MODEL = (built(encoded()[0]), encoded()[1])


def test_predict_gives_three_named_columns():
    model, batch = MODEL
    found = predict(model, batch, index=pd.RangeIndex(100, 111))
    assert list(found) == ["ctr", "cvr", "ctcvr"]
    assert list(found.index) == list(range(100, 111))
    logits = model(batch).detach().numpy()
    ctr, cvr = (1 / (1 + np.exp(-logits))).T
    np.testing.assert_allclose(found["cvr"], cvr, atol=1e-12)
    np.testing.assert_allclose(found["ctcvr"], ctr * cvr, atol=1e-12)


def test_evaluate_measures_each_task_on_its_own_rows():
    table = rows(211, seed=2)
    encoder, batch = encoded(table=table)
    model = built(encoder)
    found = evaluate(model, batch, metrics=["predicted_over_observed"])
    clicks, bought = int(table["click"].sum()), int(table["purchase"].sum())
    assert found["rows"].to_dict() == {"ctr": 211, "cvr": clicks, "ctcvr": 211}
    assert found["mean_label"].to_dict() == pytest.approx(
        {"ctr": clicks / 211, "cvr": bought / clicks, "ctcvr": bought / 211}
    )
    cvr = predict(model, batch)["cvr"][table["click"] == 1].mean()
    ratio = found.loc["cvr", "predicted_over_observed"]
    assert ratio == pytest.approx(cvr / (bought / clicks))


def test_it_takes_its_two_tasks_wherever_they_stand_among_others():
    tasks = [MIXED[3], Task("purchase"), MIXED[2], Task("click")]
    encoder, batch = encoded(tasks)
    model = built(encoder)
    assert torch.equal(model.labels(batch)[:, 0], batch.labels[:, 3])
    assert list(model.towers) == ["5x1"]
    assert model.towers.members == {"5x1": [0, 1]}
    swapped = built(encoder, click="purchase", conversion="click")
    assert torch.equal(swapped.labels(batch)[:, 0], batch.labels[:, 1])


def test_the_default_is_two_networks_on_one_embedding():
    encoder, batch = encoded()
    model = built(encoder, tower_units=(5, 3))
    assert not list(model.trunk.parameters())
    shapes = [list(p.shape) for p in model.towers.parameters() if p.ndim == 3]
    width = model.embedding.width
    assert shapes == [[2, 5, width], [2, 3, 5], [2, 1, 3]]
    model.losses(batch)[0].backward()
    assert all(p.grad.any() for p in model.embedding.parameters())
    slopes = slopes_by_task(model)
    for task in ("click", "purchase"):
        for place in ("hidden.0", "hidden.2", "output"):
            for kind in ("weight", "bias"):
                slope = slopes[f"towers.{task}.{place}.{kind}"]
                assert slope.any() == (task == "click")


def test_it_reads_the_logits_of_the_ranker_it_stands_on():
    encoder, batch = encoded()
    options = {"bottom_units": (7,), "tower_units": (5,), "activation": "tanh"}
    model = built(encoder, ranker=SharedBottom, **options)
    plain = SharedBottom(encoder, **options).double()
    with pytest.raises(ValueError, match="laid out as .tasks: ctr, cvr, ctcvr; "):
        plain.load_state_dict(model.state_dict())
    layout = {"_extra_state": plain.state_dict()["_extra_state"]}
    plain.load_state_dict(model.state_dict() | layout)
    assert torch.equal(model(batch), plain(batch))
    model.loss(batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def without_bottom(encoder, **options):
    return SharedBottom(encoder, bottom_units=(), **options)


@pytest.mark.parametrize(
    ("given", "alone"),
    [
        ({}, without_bottom),
        ({"ranker": SharedBottom, "bottom_units": (7,)}, SharedBottom),
        ({"ranker": MMoE}, MMoE),
    ],
)
def test_from_one_seed_the_weights_are_those_of_the_ranker_alone(given, alone):
    encoder, batch = encoded(MIXED)
    torch.manual_seed(3)
    found = ESMM(encoder, **given)
    torch.manual_seed(3)
    options = {key: value for key, value in given.items() if key != "ranker"}
    expected = alone(encoder, tasks=["click", "purchase"], **options)
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    for (name, one), (same, two) in pairs:
        assert name == same
        assert torch.equal(one, two)
    batch = batch.to(dtype=torch.float32)
    assert torch.equal(found(batch), expected(batch))


@pytest.mark.parametrize("ranker", [SharedBottom, MMoE])
def test_the_embedding_is_made_once(monkeypatch, ranker):
    made = []

    class Counted(FeatureEmbedding):
        def __init__(self, encoder):
            made.append(self)
            super().__init__(encoder)

    monkeypatch.setattr(mtl_annotated.training, "FeatureEmbedding", Counted)
    model = ESMM(encoded()[0], ranker=ranker)
    assert made == [model.embedding]


def test_two_models_share_no_storage():
    encoder, _ = encoded()
    first, second = ESMM(encoder), ESMM(encoder)
    owned = {p.data_ptr() for p in first.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in second.parameters())


def test_saving_and_loading_gives_equal_bits(tmp_path):
    encoder, batch = encoded()
    model, other = ESMM(encoder).double(), ESMM(encoder).double()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))


@pytest.mark.parametrize(
    "other",
    [{"click": "purchase", "conversion": "click"}, {"click": "seen"}],
)
@pytest.mark.parametrize("ranker", [SharedBottom, MMoE])
def test_weights_of_another_funnel_are_refused(ranker, other):
    encoder, _ = encoded([*FUNNEL, Task("seen", label="click")])
    first, second = ESMM(encoder, ranker=ranker), ESMM(encoder, ranker=ranker, **other)
    before = [parameter.clone() for parameter in second.parameters()]
    with pytest.raises(ValueError, match="these weights are of a model laid out as"):
        second.load_state_dict(first.state_dict())
    for old, parameter in zip(before, second.parameters(), strict=True):
        assert torch.equal(old, parameter)


def test_fit_lowers_the_joint_loss_and_reports_the_cvr():
    encoder, batch = encoded(table=rows(401, seed=3))
    model = built(encoder)
    before = model.loss(batch).item()
    history = fit(model, batch, epochs=3, learning_rate=0.02, progress=False)
    assert model.loss(batch).item() < before
    assert {"ctr", "cvr", "ctcvr"} <= set(history["task"])


def test_rows_without_a_click_are_trained_on():
    """No cvr label at all is no reason to stop: cvr has no loss to miss it."""
    table = rows(101).assign(click=0, purchase=0)
    encoder, batch = encoded(table=table)
    model = built(encoder)
    before = model.loss(batch).item()
    options = {"learning_rate": 0.01, "train_metrics": False, "progress": False}
    history = fit(model, batch, encoded()[1], epochs=2, **options)
    after = model.loss(batch).item()
    assert 0 < after < before
    assert {"ctr", "cvr", "ctcvr"} <= set(history["task"])
    assert predict(model, batch)["ctcvr"].between(0, 1).all()


def test_constants_learn_purchases_over_clicks():
    """No loss asks for it, and yet it is where the joint loss is least."""
    table = rows(997, seed=5)
    _, batch = encoded(table=table)
    model, logit = MODEL[0], torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logit],
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = model.joint(model.losses(batch, logit.expand(997, 2)))
        loss.backward()
        return loss

    optimizer.step(closure)
    clicks, bought = table["click"].sum(), table["purchase"].sum()
    ctr, cvr = logit.sigmoid().tolist()
    assert ctr == pytest.approx(Fraction(int(clicks), 997), abs=1e-5)
    assert cvr == pytest.approx(Fraction(int(bought), int(clicks)), abs=1e-5)


TRACED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_esmm import ESMM, encoded
encoder, batch = encoded()
model = ESMM(encoder, tower_units=(3,)).double()
"""
COMPILED = """
compiled = torch.compile(model, backend="eager", fullgraph=True)
assert torch.equal(compiled(batch), model(batch))
loss = torch.compile(model.loss, backend="eager", fullgraph=True)
assert torch.equal(loss(batch), model.loss(batch))
"""
EXPORTED = """
by_row = {0: torch.export.Dim("rows")}
rows = encoded(count=211)[1]
shapes = ([by_row] * 3 + [None],)
program = torch.export.export(model, (rows[:5],), dynamic_shapes=shapes)
for count in (1, 211):
    found = program.module()(rows[:count])
    assert torch.allclose(found, model(rows[:count]), rtol=0, atol=1e-12)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMPILED, EXPORTED], ids=["compile", "export"])
def test_can_be_traced(code):
    # In its own process: the shape checks of this one are not traceable.
    command = [sys.executable, "-c", TRACED + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def stored():
    return results("esmm")


def gain(stored, measure, runner, bias, click_rate, hidden=0.0, base="BASE"):
    """Mean gain over another runner on the same logs, and half a 95 % interval."""
    world = (stored["bias"] == bias) & (stored["click_rate"] == click_rate)
    rows = stored[world & (stored["hidden"] == hidden)]
    table = rows.pivot(index="seed", columns="runner", values=measure)
    difference = table[runner] - table[base]
    return difference.mean(), 2.26 * difference.std() / len(table) ** 0.5


WORLDS = [(bias, rate) for bias in (1, 2) for rate in (0.02, 0.05, 0.2)]


@pytest.mark.parametrize(("bias", "rate"), WORLDS)
def test_with_selection_bias_esmm_ranks_better_and_more_so_on_all_rows(
    stored, bias, rate
):
    clicked, half = gain(stored, "auc_clicked", "ESMM", bias, rate)
    assert clicked > half
    everywhere, half = gain(stored, "auc_all", "ESMM", bias, rate)
    assert everywhere > max(half, clicked)
    for part in ("ESMM-NS", "SHARED"):
        assert gain(stored, "auc_all", part, bias, rate)[0] < everywhere
    ceiling, _ = gain(stored, "auc_all", "TRUTH", bias, rate)
    if bias == 2:
        assert 0.3 < everywhere / ceiling < 0.55


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("measure", ["auc_clicked", "auc_all"])
@pytest.mark.parametrize("runner", ["ESMM", "AMAN"])
def test_without_selection_bias_there_is_no_gain(stored, rate, measure, runner):
    mean, half = gain(stored, measure, runner, 0, rate)
    assert mean - half <= 0
    if runner == "ESMM":
        assert abs(mean) <= half


def test_it_takes_both_parts(stored):
    found = [
        gain(stored, "auc_all", runner, 1, 0.05) for runner in ("ESMM-NS", "SHARED")
    ]
    assert round(found[0][0], 3) == 0.011
    assert abs(found[1][0]) < found[1][1]
    assert round(gain(stored, "auc_all", "ESMM", 1, 0.05)[0], 3) == 0.035
    mean, half = gain(stored, "auc_ctr", "SHARED", 1, 0.05)
    assert mean < -half
    for bias in (1, 2):
        for rate in (0.02, 0.05, 0.2):
            mean, half = gain(stored, "auc_all", "SHARED", bias, rate)
            assert (mean > half) == (rate == 0.2)


def test_aman_gains_under_bias_and_is_level_with_esmm_where_it_is_strongest(stored):
    for bias, rate in WORLDS:
        mean, half = gain(stored, "auc_all", "AMAN", bias, rate)
        assert mean > half
    mean, half = gain(stored, "auc_all", "ESMM", 2, 0.02, base="AMAN")
    assert abs(mean) < half


def test_the_order_of_the_runners_is_as_told(stored):
    means = stored[(stored["hidden"] == 0) & (stored["click_rate"] == 0.05)]
    means = means[means["bias"] == 1].groupby("runner")["auc_clicked"].mean()
    assert means["ESMM"] > means["ESMM-NS"] > means["BASE"]
    assert means["AMAN"] > means["BASE"]
    assert means["BASE"] > means[["OVERSAMPLING", "DIVISION"]].max()


def test_rates_stay_biased_as_told(stored):
    level = stored.groupby(["hidden", "bias", "click_rate", "runner"])[
        "ratio_all"
    ].mean()
    esmm = level.xs("ESMM", level="runner")[0.0]
    assert (esmm[0] < 1).all()
    found = pd.concat([esmm[1], esmm[2]])
    assert found.min() == pytest.approx(1.11, abs=0.005)
    assert found.max() == pytest.approx(1.29, abs=0.006)
    for bias, twice in ((1, 1.46), (2, 2.10)):
        base = level[0.0, bias, 0.05, "BASE"]
        assert base == pytest.approx(twice, abs=0.01)
        assert level[0.0, bias, 0.05, "ESMM"] - 1 < (base - 1) * 0.34
        assert level[0.0, bias, 0.05, "AMAN"] < 0.53
    assert level[0.5, 1, 0.05, "ESMM"] == pytest.approx(1.5, abs=0.01)
    mean, half = gain(stored, "auc_all", "ESMM", 1, 0.05, hidden=0.5)
    assert half < mean == pytest.approx(0.02, abs=0.005)
