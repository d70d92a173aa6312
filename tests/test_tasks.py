"""Tasks, losses and metrics: against scikit-learn, numbers done by hand, and laws."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.exceptions import UndefinedMetricWarning
from torch.nn import functional as F

from mtl_annotated.tasks import (
    METRICS,
    Task,
    accuracy,
    auc,
    calibration_error,
    check_tasks,
    checked_classes,
    checked_name,
    checked_ratio,
    checked_weight,
    grouped_auc,
    joint_loss,
    log_loss,
    mae,
    masked_mean,
    measure,
    normalized_entropy,
    output_slices,
    predicted_over_observed,
    predictions,
    rmse,
    row_loss,
    task_losses,
    weighted_sum,
)

NAN = math.nan
TASKS = (
    Task("click"),
    Task("purchase", given="click", weight=2),
    Task("dwell", "regression", weight=0.5),
    Task("rating", "multiclass", classes=(1, 2, 3)),
)
SLICES = (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 6))
# No deadline: the machine may be busy, and the annotations are checked as well.
laws = settings(deadline=None, max_examples=30)


def batch(rows=13, seed=0):
    """Logits [rows, 6], labels [rows, 4] without a missing one, weights [rows]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    labels = torch.stack(
        [
            torch.randint(0, 2, (rows,), generator=generator),
            torch.randint(0, 2, (rows,), generator=generator),
            torch.randn(rows, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (rows,), generator=generator),
        ],
        1,
    ).double()
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return logits, labels, weights


def holes(labels, seed=1):
    """The labels with about half of them missing."""
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(labels.shape, generator=generator) < 0.5
    return labels.masked_fill(gone, NAN)


# --- Task ---------------------------------------------------------------------------


def test_task_defaults():
    task = Task("click")
    assert (task.kind, task.weight, task.column) == ("binary", 1.0, "click")
    assert (task.weight_ratio, task.width, task.outputs) == (1.0, 1, ("click",))
    assert Task("like", label="liked").column == "liked"


@pytest.mark.parametrize(
    ("classes", "stored", "outputs"),
    [
        (3, 3, ("rating=0", "rating=1", "rating=2")),
        ([5, 1], (5, 1), ("rating=5", "rating=1")),
        (np.array([1.5, 2.0]), (1.5, 2.0), ("rating=1.5", "rating=2.0")),
        (pd.Series(["low", "high"]), ("low", "high"), ("rating=low", "rating=high")),
    ],
)
def test_task_classes(classes, stored, outputs):
    task = Task("rating", "multiclass", classes=classes)
    assert task.classes == stored
    assert (task.width, task.outputs) == (len(outputs), outputs)


OTHERS = (Task("n", "multiclass", classes=4), Task("n", weight_ratio=0.5))


@pytest.mark.parametrize("task", [*TASKS, *OTHERS])
def test_task_is_frozen_hashable_and_survives_json(task):
    again = Task(**json.loads(json.dumps(asdict(task))))
    assert again == task
    assert hash(again) == hash(task)
    with pytest.raises(FrozenInstanceError):
        task.weight = 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(""), "task name '': expected a string that is not empty"),
        (lambda: Task("a.b"), "task name 'a.b': .*no '.'"),
        (lambda: Task("mean"), "task name 'mean': reserved, because training calls"),
        (lambda: checked_name(3), "task name 3: expected a string"),
        (
            lambda: Task("click", "ranking"),
            "task 'click': unknown kind 'ranking', choose from binary, regression,",
        ),
        (lambda: Task("click", weight=-1), "task 'click': weight .* found -1"),
        (lambda: Task("click", weight=NAN), "task 'click': weight .* found nan"),
        (lambda: Task("click", weight=math.inf), "finite .* found inf"),
        (lambda: checked_weight("click", "2"), "'click': weight .* found '2'"),
        (lambda: Task("click", weight_ratio=0), "'click': weight_ratio .* found 0"),
        (lambda: Task("click", weight_ratio=-1.0), "above 0, found -1.0"),
        (lambda: Task("click", weight_ratio=NAN), "weight_ratio .* found nan"),
        (lambda: Task("click", weight_ratio=math.inf), "weight_ratio .* found inf"),
        (lambda: checked_ratio("click", "2"), "'click': weight_ratio .* found '2'"),
        (lambda: Task("r", "multiclass"), "task 'r': .* needs classes.* found None"),
        (lambda: Task("r", "multiclass", classes=1), "at least two .* found 1"),
        (lambda: Task("r", "multiclass", classes="abc"), "found 'abc'"),
        (lambda: Task("r", "multiclass", classes=(1, 1)), "different .*found \\(1, 1"),
        (lambda: Task("r", "multiclass", classes=(1, "1")), "two different values"),
        (lambda: Task("r", "multiclass", classes={1, 2}), "'r': .*found {1, 2}"),
        (lambda: Task("r", "multiclass", classes={1: "a", 2: "b"}), "'r': .*found {1:"),
        (lambda: checked_classes("r", "multiclass", 3.0), "task 'r': .*found 3.0"),
        (lambda: Task("r", "multiclass", classes=[1, None]), "'r': .*JSON; found nan"),
        (lambda: Task("r", "multiclass", classes=["a", None]), "'r': .*; found nan"),
        (lambda: Task("r", "multiclass", classes=[0.5, math.inf]), "'r': .*found inf"),
        (
            lambda: Task("r", "multiclass", classes=pd.date_range("2026", periods=2)),
            "task 'r': a class must be a text.* found Timestamp",
        ),
        (lambda: Task("click", classes=2), "belong to kind 'multiclass', not to 'bin"),
        (lambda: Task("click", given="click"), "given='click' refers to the task its"),
        (lambda: Task("buy", label="z", given="z"), "task 'buy': given='z' refers to"),
    ],
)
def test_task_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kind_and_weight_survive_replace():
    assert replace(TASKS[1], weight=3).weight == 3.0
    with pytest.raises(ValueError, match="weight"):
        replace(TASKS[1], weight=-3)


def test_check_tasks_gives_a_tuple():
    assert check_tasks(list(TASKS)) == TASKS


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ([], ValueError, "found none"),
        (["click"], TypeError, "click"),
        ([Task("a"), Task("b"), Task("a", label="c")], ValueError, "called 'a'"),
        ([Task("a"), Task("a", "multiclass", classes=2)], ValueError, "called 'a'"),
        ([Task("a=0"), Task("a", "multiclass", classes=2)], ValueError, "'a=0'"),
    ],
)
def test_check_tasks_refusals(tasks, error, message):
    with pytest.raises(error, match=message):
        check_tasks(tasks)


def test_output_slices():
    assert output_slices(TASKS) == SLICES


# --- Losses -------------------------------------------------------------------------


def slow_losses(logits, labels, weights):
    """Loops over rows and tasks, each loss as written in a textbook."""
    means = []
    for k, (task, part) in enumerate(zip(TASKS, SLICES, strict=True)):
        total, count = 0.0, 0
        for z, y, w in zip(logits[:, part], labels[:, k], weights, strict=True):
            if math.isnan(y) or w == 0:
                continue
            if task.kind == "binary":
                p = 1 / (1 + math.exp(-z[0]))
                loss = -math.log(p if y else 1 - p)
            elif task.kind == "regression":
                loss = (z[0] - y) ** 2
            else:
                loss = math.log(sum(math.exp(v) for v in z)) - z[int(y)]
            total += w * loss
            count += 1
        means.append(total / count if count else 0.0)
    return means


@pytest.mark.parametrize("weighted", [False, True])
def test_task_losses_equal_a_loop(weighted):
    logits, labels, weights = batch()
    labels = holes(labels)
    weights = weights if weighted else None
    one = torch.ones(len(labels)) if weights is None else weights
    expected = slow_losses(logits.numpy(), labels.numpy(), one.numpy())
    found = task_losses(logits, labels, TASKS, weights)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [7, 1, 0])
def test_complete_labels_need_no_mask(weighted, rows):
    logits, labels, weights = (part[:rows] for part in batch())
    weights = weights if weighted else None
    found, slopes = [], []
    for complete in (True, False):
        given = logits.clone().requires_grad_()
        losses = task_losses(given, labels, TASKS, weights, complete=complete)
        found.append(losses.detach())
        slopes.append(torch.autograd.grad(losses.sum(), given)[0])
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)
    torch.testing.assert_close(*slopes, rtol=1e-14, atol=0)


def test_labels_that_are_said_to_be_complete_are_believed():
    logits, labels, _ = batch()
    labels[0, 1] = torch.nan
    assert task_losses(logits, labels, TASKS, complete=True).isnan().tolist() == [
        *[False, True],
        *[False, False],
    ]


def test_joint_loss_is_the_weighted_sum():
    logits, labels, weights = batch()
    losses = task_losses(logits, labels, TASKS, weights).tolist()
    expected = losses[0] + 2 * losses[1] + 0.5 * losses[2] + losses[3]
    assert joint_loss(logits, labels, TASKS, weights).item() == pytest.approx(expected)


@laws
@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 2)), min_size=1, max_size=4),
    st.integers(0, 20),
)
def test_a_weight_is_multiplied_by_its_ratio_each_epoch(pairs, epoch):
    tasks = [
        Task(f"t{k}", weight=weight, weight_ratio=ratio)
        for k, (weight, ratio) in enumerate(pairs)
    ]
    losses = torch.arange(1.0, 1 + len(tasks), dtype=torch.float64)
    expected = 0.0
    for loss, (weight, ratio) in zip(losses.tolist(), pairs, strict=True):
        for _ in range(epoch):
            weight *= ratio
        expected += weight * loss
    assert weighted_sum(losses, tasks, epoch).item() == pytest.approx(expected)


def test_the_joint_loss_knows_the_epoch():
    logits, labels, weights = batch()
    tasks = [replace(TASKS[0], weight_ratio=0.5), *TASKS[1:]]
    losses = task_losses(logits, labels, tasks, weights).tolist()
    expected = losses[0] / 8 + 2 * losses[1] + 0.5 * losses[2] + losses[3]
    found = joint_loss(logits, labels, tasks, weights, 3).item()
    assert found == pytest.approx(expected)


def test_numbers_by_hand():
    logits = torch.tensor([[0.0], [0.0], [math.log(3)], [7.0]])
    labels = torch.tensor([[1.0], [0.0], [0.0], [NAN]])
    tasks = (Task("click"),)
    # sigmoid(log 3) is 3/4, so the losses are log 2, log 2, log 4.
    mean = task_losses(logits, labels, tasks).item()
    assert mean == pytest.approx(4 * math.log(2) / 3)
    # Weighted log 2 + 3 log 4, over two labels: the second row weighs nothing.
    weights = torch.tensor([1.0, 0.0, 3.0, 5.0])
    mean = task_losses(logits, labels, tasks, weights).item()
    assert mean == pytest.approx(7 * math.log(2) / 2)


def test_gradient_is_prediction_minus_label():
    logits, labels, _ = batch()
    z = logits[:, :1].clone().requires_grad_()
    task_losses(z, labels[:, :1], TASKS[:1]).sum().backward()
    expected = (z.sigmoid() - labels[:, :1]) / len(labels)
    torch.testing.assert_close(z.grad, expected.detach())


def test_gradcheck_with_missing_labels_and_weights():
    logits, labels, weights = batch()
    labels = holes(labels)
    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: joint_loss(z, labels, TASKS, weights), z)


@pytest.mark.parametrize("logit", [20.0, 100.0, 1e4, -100.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_large_logits_keep_loss_and_gradient(logit, label):
    z = torch.tensor([[logit]], requires_grad=True)
    loss = task_losses(z, torch.tensor([[label]]), TASKS[:1])
    loss.sum().backward()
    wrong = (logit > 0) != bool(label)
    assert loss.item() == pytest.approx(abs(logit) if wrong else 0, abs=1e-6)
    assert z.grad.item() == pytest.approx(math.copysign(1, logit) * wrong, abs=1e-6)


def test_masking_after_the_loss_is_a_trap_that_ours_avoids():
    label = torch.tensor([[1.0], [NAN]])
    z = torch.zeros(2, 1, requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(z, label, reduction="none")
    torch.where(label.isnan(), 0.0, loss).sum().backward()
    assert z.grad.isnan().tolist() == [[False], [True]]
    z.grad = None
    task_losses(z, label, TASKS[:1]).sum().backward()
    assert z.grad.tolist() == [[-0.5], [0.0]]


def test_no_label_at_all_is_zero_with_zero_gradient():
    logits, labels, weights = batch()
    labels[:, 1:] = NAN
    z = logits.requires_grad_()
    losses = task_losses(z, labels, TASKS, weights)
    losses.sum().backward()
    assert losses[1:].tolist() == [0.0, 0.0, 0.0]
    assert losses[0] > 0
    assert z.grad.isfinite().all()
    assert (z.grad[:, 1:] == 0).all()
    assert (z.grad[:, 0] != 0).all()


def test_rows_of_weight_zero_are_as_if_absent():
    logits, labels, weights = batch()
    weights[3:] = 0
    found = task_losses(logits, labels, TASKS, weights)
    expected = task_losses(logits[:3], labels[:3], TASKS, weights[:3])
    torch.testing.assert_close(found, expected)
    assert task_losses(logits, labels, TASKS, 0 * weights).tolist() == [0, 0, 0, 0]


def test_one_row_and_no_row():
    logits, labels, _ = batch(1)
    assert task_losses(logits, labels, TASKS).isfinite().all()
    assert task_losses(logits[:0], labels[:0], TASKS).tolist() == [0, 0, 0, 0]


def test_nothing_of_the_callers_is_changed():
    logits, labels, weights = batch()
    labels = holes(labels)
    copies = [t.clone() for t in (logits, labels, weights)]
    joint_loss(logits, labels, TASKS, weights)
    for before, after in zip(copies, (logits, labels, weights), strict=True):
        torch.testing.assert_close(before, after, equal_nan=True, rtol=0, atol=0)


def test_half_precision_is_widened():
    logits, labels, _ = batch(1000)
    half = logits.to(torch.bfloat16)
    losses = task_losses(half, labels.float(), TASKS)
    assert losses.dtype == torch.float32
    assert predictions(half, TASKS).dtype == torch.float32
    expected = task_losses(half.double(), labels, TASKS)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    assert masked_mean(values, valid).tolist() == [2, 20]
    weights = torch.tensor([2.0, 1, 1])
    assert masked_mean(values, valid, weights).tolist() == pytest.approx([7 / 3, 25])
    weights = torch.tensor([2.0, 1, 0])
    assert masked_mean(values, valid, weights).tolist() == [2, 20]


@pytest.mark.parametrize("weighted", [False, True])
def test_what_does_not_count_may_be_infinite(weighted):
    values = torch.tensor([[1.0], [math.inf], [5.0]], requires_grad=True)
    valid = torch.tensor([[True], [weighted], [True]])
    weights = torch.tensor([1.0, 0.0, 1.0]) if weighted else None
    mean = masked_mean(values, valid, weights)
    mean.sum().backward()
    assert mean.tolist() == [3]
    assert values.grad.tolist() == [[0.5], [0], [0.5]]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_weighted_optimum_does_not_depend_on_the_batch_size(size):
    labels = torch.tensor([1.0, 0, 2, 5, 3, 4]).unsqueeze(1)
    weights = torch.tensor([3.0, 1, 0.5, 0.5, 0.5, 0.5])
    best = (weights @ labels / weights.sum()).item()
    z = torch.full((6, 1), best, requires_grad=True)
    for part in torch.arange(6).split(size):
        rows = z[part], labels[part], (Task("a", "regression"),), weights[part]
        task_losses(*rows).sum().backward()
    assert z.grad.sum().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (5, 4, r"outputs: expected shape \(13, 6\) .* click, purchase, .*\(13, 5\)"),
        (6, 3, r"labels: expected shape \(13, 4\) .*; found \(13, 3\)"),
    ],
)
def test_shapes_are_checked(outputs, labels, message):
    z, y, _ = batch()
    z = torch.zeros(13, outputs)
    with pytest.raises(ValueError, match=message):
        task_losses(z, y[:, :labels], TASKS)


def test_a_single_row_is_not_stretched_over_the_batch():
    logits, labels, weights = batch()
    # The annotation says it first here (TypeError); without the hook, the check does.
    for y, w in ((labels[:1], None), (labels, weights[:1])):
        with pytest.raises((ValueError, TypeError)):
            task_losses(logits, y, TASKS, w)


@laws
@given(st.integers(0, 10**6), st.integers(0, 3), st.data())
def test_hiding_labels_of_one_task_changes_no_other(seed, task, data):
    logits, labels, weights = batch(7, seed)
    gone = data.draw(arrays(bool, 7))
    hidden = labels.clone()
    hidden[torch.from_numpy(gone), task] = NAN
    z = logits.requires_grad_()
    before = task_losses(z, labels, TASKS, weights)
    after = task_losses(z, hidden, TASKS, weights)
    others = [k for k in range(4) if k != task]
    assert torch.equal(before[others], after[others])
    (slope,) = torch.autograd.grad(after[task], z)
    assert (slope[torch.from_numpy(gone)] == 0).all()
    assert slope.isfinite().all()


@laws
@given(st.integers(0, 10**6), arrays(np.int64, 7, elements=st.integers(0, 3)))
def test_a_weight_of_two_is_a_row_twice(seed, times):
    logits, labels, _ = batch(7, seed)
    labels = holes(labels, seed)
    times = torch.from_numpy(times)
    weighted = task_losses(logits, labels, TASKS, times.double())
    more = labels.repeat_interleave(times, 0)
    repeated = task_losses(logits.repeat_interleave(times, 0), more, TASKS)
    # The denominators differ, because each counts rows; the sums do not.
    count = (~labels[times > 0].isnan()).sum(0)
    torch.testing.assert_close(weighted * count, repeated * (~more.isnan()).sum(0))


def test_predictions_by_kind():
    logits, _, _ = batch()
    found = predictions(logits, TASKS)
    assert torch.equal(found[:, :2], logits[:, :2].sigmoid())
    assert torch.equal(found[:, 2], logits[:, 2])
    torch.testing.assert_close(found[:, 3:], logits[:, 3:].softmax(1))
    torch.testing.assert_close(found[:, 3:].sum(1), torch.ones(13).double())


def test_predictions_keep_64_bits_and_saturate_at_17_in_32():
    logits = torch.tensor([[17.0], [40.0]])
    assert predictions(logits, TASKS[:1]).tolist() == [[1.0], [1.0]]
    wide = predictions(logits.double(), TASKS[:1])
    assert wide.dtype == torch.float64
    assert 1 - wide[0].item() == pytest.approx(math.exp(-17), rel=1e-4)
    assert predictions(logits.half(), TASKS[:1]).dtype == torch.float32


def test_row_loss_of_a_class_is_minus_its_log_probability():
    logits, labels, _ = batch()
    p = predictions(logits, TASKS)[:, 3:]
    expected = -p[torch.arange(13), labels[:, 3].long()].log()
    found = row_loss(TASKS[3], logits[:, 3:], labels[:, 3])
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_loss_compiles_without_a_graph_break():
    code = """
import torch
from mtl_annotated.tasks import Task, joint_loss
tasks = (Task("a"), Task("b", "regression"), Task("c", "multiclass", classes=3))
f = torch.compile(lambda z, y: joint_loss(z, y, tasks), fullgraph=True, backend="eager")
z, y = torch.randn(5, 5), torch.ones(5, 3)
assert torch.equal(f(z, y), joint_loss(z, y, tasks))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Metrics ------------------------------------------------------------------------


def binary_rows(rows=400, seed=0, digits=2):
    """Labels drawn from probabilities, predictions rounded so that some tie, weights."""
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 4, rows)
    labels = (rng.random(rows) < p).astype(float)
    said = np.clip(p + rng.normal(0, 0.1, rows), 0.01, 0.99).round(digits)
    return labels, said, rng.integers(1, 4, rows).astype(float)


def test_auc_is_the_chance_of_a_right_pair():
    labels = np.array([1, 0, 0, 1, 0, 0])
    scores = np.array([0.9, 0.7, 0.4, 0.4, 0.2, 0.1])
    assert auc(labels, scores) == 6.5 / 8
    labels, said, weights = binary_rows(60)
    gap = said[labels == 1][:, None] - said[labels == 0]
    mass = weights[labels == 1][:, None] * weights[labels == 0]
    won = (gap > 0) + 0.5 * (gap == 0)
    assert auc(labels, said) == pytest.approx(won.mean())
    assert auc(labels, said, weights) == pytest.approx((won * mass).sum() / mass.sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_equal_scikit_learn(weighted):
    labels, said, weights = binary_rows()
    w = weights if weighted else None
    sk = sklearn.metrics
    assert auc(labels, said, w) == sk.roc_auc_score(labels, said, sample_weight=w)
    assert log_loss(labels, said, w) == sk.log_loss(labels, said, sample_weight=w)
    seconds = said * 100
    error = sk.mean_squared_error(labels, seconds, sample_weight=w)
    assert rmse(labels, seconds, w) == pytest.approx(math.sqrt(error))
    assert mae(labels, seconds, w) == sk.mean_absolute_error(
        labels, seconds, sample_weight=w
    )


def test_multiclass_metrics_equal_scikit_learn():
    logits, labels, weights = batch(50)
    y, w = labels[:, 3].numpy(), weights.numpy()
    p = predictions(logits, TASKS)[:, 3:].numpy()
    assert log_loss(y, p, w) == pytest.approx(
        sklearn.metrics.log_loss(y, p, sample_weight=w)
    )
    assert accuracy(y, p, w) == sklearn.metrics.accuracy_score(
        y, p.argmax(1), sample_weight=w
    )
    # A class that no row has still has a column.
    some = y < 2
    assert log_loss(y[some], p[some]) == pytest.approx(
        -np.log(p[some][np.arange(some.sum()), y[some].astype(int)]).mean()
    )


def test_normalized_entropy_by_hand():
    labels = np.array([1.0, 0, 0, 0])
    assert normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    found = normalized_entropy(labels, np.full(4, 0.5))
    assert found == pytest.approx(math.log(2) / entropy)
    assert normalized_entropy(labels, np.full(4, 0.5)) > 1
    assert normalized_entropy(labels, np.array([0.9, 0.1, 0.1, 0.1])) < 1


def test_predicted_over_observed_by_hand():
    labels = np.array([1.0, 0, 1, 0])
    said = np.array([0.5, 0.5, 1.0, 1.0])
    assert predicted_over_observed(labels, said) == 1.5
    assert predicted_over_observed(labels, said, np.array([3.0, 1, 1, 1])) == 1.0
    assert math.isnan(predicted_over_observed(np.zeros(4), said))


def test_calibration_error_by_hand():
    labels = np.array([0.0, 1, 0, 1])
    said = np.array([0.1, 0.2, 0.6, 0.8])
    # Two bins: |0.15 - 0.5| and |0.7 - 0.5|, each half of the mass.
    assert calibration_error(labels, said, bins=2) == pytest.approx(0.275)
    assert calibration_error(labels, said, bins=1) == pytest.approx(0.075)
    assert calibration_error(labels, said, bins=99) == pytest.approx(0.425)
    with pytest.raises(ValueError, match="bins: expected at least 1, found 0"):
        calibration_error(labels, said, bins=0)


def test_calibration_error_equals_scikit_learns_bins_without_ties():
    rng = np.random.default_rng(5)
    said = rng.random(1000)
    labels = (rng.random(1000) < said**2).astype(float)
    seen, told = calibration_curve(labels, said, n_bins=10, strategy="quantile")
    expected = np.abs(seen - told).mean()
    assert calibration_error(labels, said) == pytest.approx(expected)


def test_calibration_error_keeps_ties_together():
    rng = np.random.default_rng(6)
    labels = (rng.random(1000) < 0.3).astype(float)
    constant = np.full(1000, labels.mean())
    assert calibration_error(labels, constant) == pytest.approx(0, abs=1e-12)
    labels, said, weights = binary_rows(digits=1)
    order = rng.permutation(len(labels))
    assert calibration_error(labels[order], said[order]) == pytest.approx(
        calibration_error(labels, said)
    )


def test_a_tie_across_a_cut_goes_where_its_middle_lies():
    said = np.repeat([0.1, 0.5, 0.9], [2, 6, 2])
    labels = np.repeat([0.0, 1.0, 0.0], [2, 6, 2])
    # The middle of 0.5 is at half of the mass: it opens the second of two bins.
    expected = (abs(2 * 0.1) + abs(6 * (0.5 - 1) + 2 * 0.9)) / 10
    assert calibration_error(labels, said, bins=2) == pytest.approx(expected)


def slow_grouped_auc(labels, scores, groups, weights):
    aucs, mass = [], []
    for group in np.unique(groups):
        inside = groups == group
        if 0 < labels[inside].mean() < 1:
            y, s, w = labels[inside], scores[inside], weights[inside]
            aucs.append(sklearn.metrics.roc_auc_score(y, s, sample_weight=w))
            mass.append(w.sum())
    return np.average(aucs, weights=mass)


@laws
@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans())
def test_grouped_auc_equals_the_loop(seed, groups, weighted):
    labels, said, weights = binary_rows(120, seed)
    weights = weights if weighted else np.ones(120)
    names = np.random.default_rng(seed).integers(groups, size=120)
    mixed = pd.Series(labels).groupby(names).nunique()
    assume((mixed == 2).any())
    found = grouped_auc(labels, said, names, weights if weighted else None)
    assert found == pytest.approx(slow_grouped_auc(labels, said, names, weights))


def test_grouped_auc_by_hand():
    labels = np.array([1, 0, 1, 0, 0, 1, 1])
    scores = np.array([0.9, 0.1, 0.2, 0.4, 0.4, 0.4, 0.3])
    groups = pd.Series(["a", "a", "b", "b", "b", "b", "c"], index=range(7, 14))
    # a: 1 of 1 pairs. b: 0 + 1/2 + 0 + 1/2 of 4 pairs. c has no pair.
    expected = (2 * 1 + 4 * 0.25) / 6
    assert grouped_auc(labels, scores, groups) == pytest.approx(expected)
    assert math.isnan(grouped_auc(labels, scores, np.arange(7)))


def test_grouped_auc_of_a_score_per_group_is_one_half():
    labels, _, _ = binary_rows()
    groups = np.arange(400) // 20
    assert grouped_auc(labels, groups / 20, groups) == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "groups", "message"),
    [
        ([1, 0], [0.1, 0.2], ["a", None], "groups: 1 of 2 values are missing"),
        ([1, 0], [0.1, 0.2], ["a"], "groups: expected 2 values, found 1"),
        ([1, NAN], [0.1, 0.2], ["a", "a"], "expected labels of 0 or 1"),
        ([1, 0], [0.1, NAN], ["a", "a"], "scores not NaN"),
    ],
)
def test_grouped_auc_refusals(labels, scores, groups, message):
    with pytest.raises(ValueError, match=message):
        grouped_auc(np.array(labels), np.array(scores), groups)


@laws
@given(st.integers(0, 10**6), st.floats(0.1, 3), st.floats(-2, 2))
def test_auc_ignores_increasing_maps(seed, stretch, shift):
    labels, said, weights = binary_rows(80, seed)
    assume(0 < labels.mean() < 1)
    groups = np.arange(80) // 8
    assume((pd.Series(labels).groupby(groups).nunique() == 2).any())
    logit = np.log(said / (1 - said))
    mapped = 1 / (1 + np.exp(-(stretch * logit + shift)))
    assert len(np.unique(mapped)) == len(np.unique(said))
    assert auc(labels, mapped, weights) == pytest.approx(auc(labels, said, weights))
    assert grouped_auc(labels, mapped, groups) == pytest.approx(
        grouped_auc(labels, said, groups)
    )


@pytest.mark.parametrize("name", METRICS)
@laws
@given(seed=st.integers(0, 10**6))
def test_weights_count_rows_in_every_metric(name, seed):
    metric = METRICS[name]
    logits, labels, _ = batch(60, seed)
    labels[:2, 0] = torch.tensor([0.0, 1.0])
    k = ["binary", "", "regression", "multiclass"].index(metric.kinds[-1])
    y = labels[:, k].numpy()
    p = predictions(logits, TASKS)[:, SLICES[k]].numpy()
    p = p if k == 3 else p[:, 0]
    times = np.random.default_rng(seed).integers(1, 4, 60)
    twice = np.repeat(np.arange(60), times)
    groups = np.zeros(60, int)
    more = {"groups": groups} if metric.needs_groups else {}
    again = {"groups": groups[twice]} if metric.needs_groups else {}
    weighted = metric.function(y, p, weights=times.astype(float), **more)
    repeated = metric.function(y[twice], p[twice], weights=None, **again)
    assert weighted == pytest.approx(repeated)


# --- measure ------------------------------------------------------------------------


def measured(**options):
    logits, labels, weights = batch(40)
    labels = holes(labels).numpy()
    predicted = predictions(logits, TASKS).numpy()
    return (
        labels,
        predicted,
        weights.numpy(),
        measure(labels, predicted, TASKS, **options),
    )


def test_measure_judges_each_task_on_its_own_rows():
    labels, predicted, _, table = measured(groups=np.arange(40) % 4)
    assert table.index.tolist() == [task.name for task in TASKS]
    assert table.index.name == "task"
    assert table.columns.tolist() == ["rows", "mean_label", *METRICS]
    for k, (task, part) in enumerate(zip(TASKS, SLICES, strict=True)):
        inside = ~np.isnan(labels[:, k])
        y, p = labels[inside, k], predicted[inside, part]
        assert table.loc[task.name, "rows"] == inside.sum()
        if task.kind == "binary":
            expected = sklearn.metrics.roc_auc_score(y, p[:, 0])
            assert table.loc[task.name, "auc"] == pytest.approx(expected)
            assert table.loc[task.name, "mean_label"] == pytest.approx(y.mean())
        for name, metric in METRICS.items():
            fits = task.kind in metric.kinds
            assert np.isfinite(table.loc[task.name, name]) == fits
    assert np.isnan(table.loc["rating", "mean_label"])
    assert table["rows"].dtype.kind == "i"


def test_the_order_of_the_tasks_changes_nothing():
    logits, labels, weights = batch(40)
    labels = holes(labels)
    order = [3, 0, 2, 1]
    tasks = tuple(TASKS[k] for k in order)
    columns = [3, 4, 5, 0, 2, 1]
    z, y = logits[:, columns], labels[:, order]
    expected = task_losses(logits, labels, TASKS, weights)[order]
    torch.testing.assert_close(task_losses(z, y, tasks, weights), expected)
    p = predictions(logits, TASKS)
    torch.testing.assert_close(predictions(z, tasks), p[:, columns])
    table = measure(labels.numpy(), p.numpy(), TASKS)
    found = measure(y.numpy(), p[:, columns].numpy(), tasks)
    pd.testing.assert_frame_equal(found, table.iloc[order])


def test_measure_leaves_out_rows_of_weight_zero():
    labels, predicted, weights, _ = measured()
    weights[20:] = 0
    found = measure(labels, predicted, TASKS, weights=weights)
    expected = measure(labels[:20], predicted[:20], TASKS, weights=weights[:20])
    pd.testing.assert_frame_equal(found, expected)


def test_measure_takes_float32_probabilities_without_a_warning():
    labels, predicted, _, table = measured()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(labels.astype("f4"), predicted.astype("f4"), TASKS)
    pd.testing.assert_frame_equal(found, table, rtol=1e-4)


def test_measure_changes_nothing_of_the_callers():
    labels, predicted, weights, _ = measured()
    before = [a.copy() for a in (labels, predicted, weights)]
    measure(labels, predicted, TASKS, weights=weights)
    for a, b in zip(before, (labels, predicted, weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_chosen_metrics_in_their_order():
    *_, table = measured(metrics=["mae", "auc"])
    assert table.columns.tolist() == ["rows", "mean_label", "mae", "auc"]
    *_, table = measured(metrics="auc")
    assert table.columns.tolist() == ["rows", "mean_label", "auc"]


def test_grouped_auc_is_left_out_without_groups():
    *_, table = measured()
    assert "grouped_auc" not in table
    with pytest.raises(ValueError, match="metric 'grouped_auc' needs groups"):
        measured(metrics=["grouped_auc"])


def test_unknown_metric_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown metric 'AUC', choose from auc, grou"):
        measured(metrics=["AUC"])


def test_one_class_only_says_why_and_reports_the_rest():
    tasks = (Task("purchase"),)
    labels, said = np.zeros((120, 1)), np.full((120, 1), 0.25)
    with pytest.warns(UndefinedMetricWarning) as caught:
        table = measure(labels, said, tasks)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "task 'purchase': auc, normalized_entropy, predicted_over_observed"
        " are undefined: all 120 labels are 0"
    ]
    row = table.loc["purchase"]
    assert row[["auc", "normalized_entropy", "predicted_over_observed"]].isna().all()
    assert row["log_loss"] == pytest.approx(-math.log(0.75))
    assert row["calibration_error"] == pytest.approx(0.25)
    assert (row["rows"], row["mean_label"]) == (120, 0)


def test_no_group_with_both_labels_says_so():
    labels, said = np.array([[0.0], [1.0]]), np.array([[0.2], [0.3]])
    with pytest.warns(UndefinedMetricWarning, match="no group holds both a 0 and a 1"):
        table = measure(labels, said, (Task("a"),), groups=[1, 2])
    assert table.loc["a", "auc"] == 1
    assert np.isnan(table.loc["a", "grouped_auc"])


def test_each_reason_gets_one_warning():
    labels, said = np.array([[0.0], [1.0]]), np.array([[0.2], [0.3]])
    both, kinds = np.hstack([labels, labels * 0]), ["grouped_auc", "auc", "auc"]
    with pytest.warns(UndefinedMetricWarning) as caught:
        table = measure(
            both,
            np.hstack([said, said]),
            (Task("a"), Task("b")),
            groups=[1, 2],
            metrics=kinds,
        )
    assert [str(warning.message) for warning in caught] == [
        "task 'a': grouped_auc is undefined: no group holds both a 0 and a 1",
        "task 'b': grouped_auc, auc are undefined: all 2 labels are 0",
    ]
    assert list(table) == ["rows", "mean_label", "grouped_auc", "auc"]


def test_measure_takes_lists():
    table = measure([[0.0], [1.0]], [[0.1], [0.2]], [Task("a")], weights=[1, 3])
    assert table.loc["a", ["rows", "mean_label", "auc"]].tolist() == [2, 0.75, 1]


def test_groups_may_be_missing_on_rows_that_do_not_count():
    labels, said = [[0.0], [1.0], [NAN], [1.0]], [[0.1], [0.2], [0.3], [0.0]]
    groups, weights = ["u", "u", None, None], [1.0, 1.0, 1.0, 0.0]
    options = {"groups": groups, "metrics": "grouped_auc"}
    table = measure(labels, said, [Task("a")], weights=weights, **options)
    assert table.loc["a", "grouped_auc"] == 1
    assert grouped_auc([0, 1, 1], [0.1, 0.2, 0.0], ["u", "u", None], [1, 1, 0]) == 1
    with pytest.raises(ValueError, match="groups: 1 of 4 values are missing"):
        measure(labels, said, [Task("a")], **options)


def test_a_metric_that_fits_no_task_is_refused():
    message = "metric 'auc' is for binary tasks, found only regression"
    with pytest.raises(ValueError, match=message):
        measure([[0.0]], [[1.0]], [Task("a", "regression")], metrics="auc")
    message = "'log_loss' is for binary and multiclass tasks, found only regression"
    with pytest.raises(ValueError, match=message):
        measure([[0.0]], [[1.0]], [Task("a", "regression")], metrics=["log_loss"])


def test_no_label_at_all_says_so():
    labels = np.array([[1.0, NAN], [0.0, NAN]])
    said = np.array([[0.7, 0.1], [0.2, 0.1]])
    with pytest.warns(UndefinedMetricWarning) as caught:
        table = measure(labels, said, (Task("a"), Task("b", "regression")))
    assert [str(warning.message) for warning in caught] == [
        "task 'b': every metric is undefined: no row has a label"
    ]
    assert table.loc["a", "auc"] == 1
    assert table.loc["b", "rows"] == 0
    assert table.loc["b"].drop("rows").isna().all()


@pytest.mark.parametrize(
    ("task", "labels", "said", "message"),
    [
        (
            Task("a"),
            [[0.5], [1]],
            [[0.5], [0.5]],
            r"task 'a': a binary label cannot be 0.5 \(1 of 2 rows\)",
        ),
        (Task("a"), [[0], [1]], [[-3.0], [0.5]], "'a': predictions must be probabil"),
        (Task("a"), [[0], [1]], [[NAN], [0.5]], r"found nan \(1 of 2 values\)"),
        (Task("a", "regression"), [[0], [1]], [[NAN], [5]], "must be finite numbers"),
        (Task("a", "regression"), [[np.inf], [1]], [[0], [5]], "label cannot be inf"),
        (
            Task("a", "multiclass", classes=2),
            [[2.0], [1]],
            [[0.5, 0.5], [0.1, 0.9]],
            "a multiclass label cannot be 2",
        ),
        (
            Task("a", "multiclass", classes=2),
            [[0.0], [1]],
            [[0.5, 0.4], [0.1, 0.9]],
            r"must be probabilities.* found 0.5 \(2 of 4 values\)",
        ),
    ],
)
def test_measure_refuses_values(task, labels, said, message):
    with pytest.raises(ValueError, match=message):
        measure(np.array(labels, float), np.array(said, float), (task,))


@pytest.mark.parametrize("weight", [-1.0, NAN, np.inf])
def test_measure_refuses_weights(weight):
    weights = np.ones(40)
    weights[7] = weight
    with pytest.raises(ValueError, match=rf"found {weight:g} \(1 of 40 rows\)"):
        measured(weights=weights)


def test_measure_refuses_groups_and_shapes():
    with pytest.raises(ValueError, match="groups: expected 40 values, found 3"):
        measured(groups=[1, 2, 3])
    labels, predicted, _, _ = measured()
    with pytest.raises(ValueError, match=r"outputs: expected shape \(40, 6\)"):
        measure(labels, predicted[:, :5], TASKS)


def test_directions():
    higher = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert higher == {"auc", "grouped_auc", "accuracy"}
    neither = [n for n, metric in METRICS.items() if metric.higher_is_better is None]
    assert neither == ["predicted_over_observed"]


# --- What the chapter says ----------------------------------------------------------


def test_pooling_tasks_turns_two_constants_into_an_auc_of_082():
    rates = np.array([0.5, 0.01])
    rng = np.random.default_rng(0)
    labels = (rng.random((20_000, 2)) < rates).astype(float)
    guesses = np.tile(rates, (20_000, 1))
    positive, negative = rates / rates.sum(), (1 - rates) / (1 - rates).sum()
    exact = positive[0] * negative[1] + (positive * negative).sum() / 2
    assert exact == pytest.approx(0.8224, abs=1e-4)
    assert auc(labels.ravel(), guesses.ravel()) == pytest.approx(exact, abs=0.005)
    table = measure(labels, guesses, (Task("often"), Task("seldom")))
    assert table["auc"].tolist() == [0.5, 0.5]
    assert table["normalized_entropy"].tolist() == pytest.approx([1, 1], abs=1e-3)


def test_the_wrong_rows_make_a_perfect_predictor_look_ten_times_too_high():
    from mtl_annotated.simulation import shop_log

    log = shop_log(100_000, seed=1)
    clicked = log["click"] == 1
    filled = log["purchase"].where(clicked, 0)
    right = auc(log["purchase"][clicked], log["true_cvr"][clicked])
    assert right - auc(log["purchase"][clicked], log["true_ctr"][clicked]) > 0.03
    wrong = auc(filled, log["true_cvr"])
    assert wrong - auc(filled, log["true_ctr"]) < 0.01
    assert auc(filled, log["true_cvr"] * log["true_ctr"]) - wrong > 0.005
    inside = predicted_over_observed(log["purchase"][clicked], log["true_cvr"][clicked])
    assert inside == pytest.approx(1, abs=0.1)
    assert predicted_over_observed(filled, log["true_cvr"]) == pytest.approx(
        10, rel=0.2
    )
