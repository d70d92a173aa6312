"""The training loop: what it promises, asserted; killed and resumed for real."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import UndefinedMetricWarning
from torch import nn

from mtl_annotated import training
from mtl_annotated.features import Dense, Encoder, FeatureEmbedding, Sparse
from mtl_annotated.tasks import METRICS, Task, joint_loss, measure, weighted_sum
from mtl_annotated.training import (
    History,
    Monitor,
    Ranker,
    Replicas,
    batches,
    check_batch,
    check_ranker,
    epoch_means,
    epoch_seeds,
    evaluate,
    fit,
    label_mask,
    load_checkpoint,
    monitors,
    predict,
    save_checkpoint,
    seeded,
    shuffled_order,
    slices,
)

TASKS = (
    Task("click"),
    Task("dwell", "regression", weight=0.5),
    Task("rating", "multiclass", classes=3),
)
QUIET = {"progress": False, "batch_size": 32}


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"user": rng.integers(0, 11, rows), "age": rng.normal(size=rows)}
    )
    frame["click"] = (rng.random(rows) < 1 / (1 + np.exp(-frame["age"]))).astype(int)
    noise = rng.normal(size=rows)
    frame["dwell"] = np.where(frame["click"] == 1, 2 * frame["age"] + noise, np.nan)
    frame["rating"] = np.where(rng.random(rows) < 0.5, rng.integers(0, 3, rows), np.nan)
    frame["mass"] = rng.integers(0, 3, rows)
    return frame


class Linear(Ranker):
    def __init__(self, encoder: Encoder, *, tasks=None, dropout: float = 0.0) -> None:
        super().__init__(encoder, tasks=tasks)
        self.trunk = nn.Dropout(dropout)
        self.towers = nn.Linear(self.embedding.width, len(self.outputs))


COLUMNS = (Sparse("user", width=3), Dense("age"))
ENCODER = Encoder(COLUMNS, TASKS).fit(table(200))
TRAIN = ENCODER.transform(table(200))
VALID = ENCODER.transform(table(150, seed=1))
USERS = table(150, seed=1)["user"].to_numpy()


def model(seed: int = 0, **options) -> Linear:
    torch.manual_seed(seed)
    return Linear(ENCODER, **options)


FADING = (TASKS[0], replace(TASKS[1], weight_ratio=0.25), TASKS[2])
FADING_ENCODER = Encoder(COLUMNS, FADING).fit(table(200))


def fading_model() -> Linear:
    torch.manual_seed(0)
    return Linear(FADING_ENCODER)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    found = copy.deepcopy(module.state_dict())
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


def changed(rows, **values):
    return replace(rows, **values)


# The model's side


def test_ranker_names_tasks_outputs_and_labels():
    whole = model()
    assert whole.outputs == ("click", "dwell", "rating=0", "rating=1", "rating=2")
    assert whole(TRAIN).shape == (200, 5)
    part = model(tasks=["rating", "click"])
    assert part.outputs == ("rating=0", "rating=1", "rating=2", "click")
    assert part.label_index == (2, 0)
    torch.testing.assert_close(
        part.labels(TRAIN), TRAIN.labels[:, [2, 0]], equal_nan=True
    )
    assert model(tasks="dwell").outputs == ("dwell",)


@pytest.mark.parametrize("names", [["buy"], [], ["click", "click"]])
def test_ranker_refuses_tasks_that_are_none(names):
    with pytest.raises(
        ValueError, match="expected different names out of click, dwell"
    ):
        model(tasks=names)


def test_ranker_refuses_what_is_no_encoder(unchecked):
    with pytest.raises(TypeError, match="encoder: expected an Encoder, found DataF"):
        Linear(table(3))


def test_joint_is_the_weighted_sum_in_both_branches():
    whole = model().double()
    rows = TRAIN.to(dtype=torch.float64)
    logits = whole(rows)
    expected = joint_loss(logits, rows.labels, TASKS)
    torch.testing.assert_close(whole.loss(rows), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.losses(rows), whole.losses(rows, logits))
    equal = model(tasks=["click", "rating"]).double()
    losses = equal.losses(rows)
    stacked = torch.stack([1.0 * losses[0], 1.0 * losses[1]]).sum()
    assert torch.equal(equal.joint(losses), stacked)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_joint_knows_the_epoch(epoch):
    whole = fading_model()
    losses = torch.tensor([1.0, 2.0, 4.0])
    expected = 1 + 2 * 0.5 * 0.25**epoch + 4
    assert whole.joint(losses, epoch).item() == pytest.approx(expected)
    assert whole.joint(losses).item() == 6


class Counting(nn.Linear):
    """A layer that notes how many rows each call has."""

    def forward(self, features):
        self.seen = [*getattr(self, "seen", []), len(features)]
        return super().forward(features)


def counting(trunk: nn.Module) -> Ranker:
    torch.manual_seed(0)
    asked = Linear(ENCODER).double()
    asked.trunk, asked.towers = trunk, Counting(asked.embedding.width, 5).double()
    return asked


class Wide(nn.Identity):
    """A layer of this many units, on the device that has no memory."""

    def __init__(self, units):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(units, 3, device="meta"))


MANY = ENCODER.transform(table(2049)).to(dtype=torch.float64)


def test_a_large_batch_goes_through_in_pieces_and_nothing_else_changes(monkeypatch):
    asked, found = counting(nn.Identity()), {}
    for most in (1024, 2049):
        monkeypatch.setattr(training, "ROWS_AT_ONCE", (most, most))
        asked.zero_grad()
        asked.towers.seen = []
        logits = asked(MANY)
        asked.loss(MANY).backward()
        slopes = [parameter.grad.clone() for parameter in asked.parameters()]
        found[most] = [logits.detach(), *slopes]
        pieces = [683, 683, 683] if most == 1024 else [2049]
        assert asked.towers.seen == pieces * 2
    for cut, whole in zip(*found.values(), strict=True):
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-14)
    asked.towers.seen = []
    monkeypatch.undo()
    # Layers of 2,048 numbers a row: 1,024 rows of them are two million.
    asked.trunk = Wide(2048)
    asked(MANY[:512]), asked(MANY[:1024]), asked(MANY[:1025]), asked(MANY[:0])
    assert asked.towers.seen == [512, 1024, 513, 512, 0]


def test_a_layer_that_waits_for_its_first_rows_gets_them():
    asked = counting(nn.LazyLinear(4, dtype=torch.float64))
    asked(MANY)
    assert asked.towers.seen == [2049]


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(1, [2049]), (1100, [1025, 1024]), (2048, [683] * 3), (10**6, [410] * 4 + [409])],
)
def test_a_wider_layer_gets_fewer_rows_at_once(width, pieces):
    asked = counting(Wide(width))
    asked(MANY)
    assert asked.towers.seen == pieces


def rows_with(gap):
    """Training rows without gaps, but for the one that is named."""
    whole = TRAIN.to(dtype=torch.float64)
    whole = replace(whole, labels=whole.labels.nan_to_num(1.0), weights=None)
    ids, labels, weights = whole.ids.clone(), whole.labels.clone(), None
    if gap == "label":
        labels[3, 1] = torch.nan
    elif gap == "weights":
        weights = torch.arange(200, dtype=torch.float64) % 3
    elif gap is not None:
        ids[3, 0] = gap
    return replace(whole, ids=ids, labels=labels, weights=weights)


@pytest.mark.parametrize("gap", [None, "label", "weights", 10_000, -1])
def test_fit_looks_once_and_trains_the_same(monkeypatch, gap):
    looks, seen, kept = [], set(), {}
    inspected = FeatureEmbedding.inspected

    def counted(self, batch):
        looks.append(len(batch))
        return inspected(self, batch)

    for look in (counted, lambda _, batch: batch):
        monkeypatch.setattr(FeatureEmbedding, "inspected", look)
        asked = model()
        losses = asked.losses

        def watched(batch, *rest, losses=losses):
            seen.add(batch.clean)
            return losses(batch, *rest)

        asked.losses = watched
        fit(asked, rows_with(gap), VALID, **QUIET, epochs=2)
        kept[look] = [v for k, v in asked.state_dict().items() if "extra" not in k]
    assert looks == [200, 150]
    assert (True in seen) == (gap in (None, "weights"))
    for one, other in zip(*kept.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class OwnLabels(Linear):
    """Of each click it knows every second one."""

    def labels(self, batch):
        labels = super().labels(batch).clone()
        labels[::2, 0] = torch.nan
        return labels


class Masking(Linear):
    """The same, by a batch of its own."""

    def losses(self, batch, logits=None):
        labels = batch.labels.clone()
        labels[::2, 0] = torch.nan
        return super().losses(replace(batch, labels=labels), logits)


@pytest.mark.parametrize("kind", [OwnLabels, Masking])
def test_labels_that_a_model_makes_may_have_gaps(kind):
    asked = kind(ENCODER)
    found = fit(asked, rows_with(None), **QUIET, epochs=1)
    assert found["loss"].notna().all()


def by_mode(layer, training, model_training):
    asked = counting(nn.Sequential(layer.double(), Wide(2048)))
    asked.train(model_training)
    asked.trunk.train(training)
    asked(MANY)
    return len(asked.towers.seen)


def test_batch_normalization_sees_a_batch_as_a_whole_where_it_reads_it():
    norm, untracked = nn.BatchNorm1d, partial(nn.BatchNorm1d, track_running_stats=False)
    assert by_mode(norm(4), training=True, model_training=True) == 1
    assert by_mode(norm(4), training=True, model_training=False) == 1
    assert by_mode(norm(4), training=False, model_training=False) == 3
    assert by_mode(norm(4), training=False, model_training=True) == 3
    assert by_mode(untracked(4), training=False, model_training=False) == 1


def test_who_asks_for_whole_batches_and_who_computes_otherwise_gets_them():
    asked = counting(Wide(2048))
    asked.whole_batches = True
    asked(MANY)
    asked.whole_batches = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asked(MANY)
    asked.to("meta")(MANY.to("meta"))
    assert asked.towers.seen == [2049] * 3


KEPT = """
import ctypes, resource, sys
import numpy as np
from mtl_annotated.training import keep_memory
class Facts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
library = ctypes.CDLL(None)
if not hasattr(library, "mallinfo2"):
    sys.exit("no mallinfo2")
library.mallinfo2.restype = Facts
def mapped():
    before = library.mallinfo2().hblks
    block = np.empty(8 * 2**20, np.uint8)
    return library.mallinfo2().hblks - before
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(16 * 2**20, np.uint8) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
np.empty(2**10, np.uint8)
first = mapped()
keep_memory()
faults()
print(first, mapped(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back so")
@pytest.mark.parametrize("asked", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_is_kept_unless_the_environment_says_how_much(asked):
    done = subprocess.run(
        [sys.executable, "-c", KEPT],
        capture_output=True,
        text=True,
        env={**os.environ, **asked},
    )
    if "no mallinfo2" in done.stderr:
        pytest.skip("this C library has no mallinfo2")
    first, mapped, faults = map(int, done.stdout.split())
    # 256 MiB are 65,536 pages, of which none is made ready a second time.
    assert first == 1
    assert (mapped, faults < 1_000) == ((1, False) if asked else (0, True))


def test_predictions_are_probabilities_and_values():
    whole = model()
    found, logits = predict(whole, TRAIN), whole(TRAIN).detach().double()
    assert set(found.dtypes) == {np.dtype("float64")}
    assert list(found) == list(whole.outputs)
    np.testing.assert_allclose(found["click"], logits[:, 0].sigmoid(), rtol=1e-15)
    np.testing.assert_array_equal(found["dwell"], logits[:, 1])
    np.testing.assert_allclose(found.iloc[:, 2:].sum(axis=1), 1, rtol=1e-15)


def test_predictions_of_a_sure_model_do_not_saturate():
    sure = model(tasks=["click"])
    nn.init.zeros_(sure.towers.weight)
    nn.init.constant_(sure.towers.bias, 30.0)
    assert 1 - predict(sure, VALID)["click"][0] == pytest.approx(9.4e-14, rel=0.01)
    found = evaluate(sure, VALID, metrics=["log_loss"])["log_loss"]["click"]
    labels = VALID.labels[:, 0].double().mean().item()
    assert found == pytest.approx(30 * (1 - labels), rel=1e-3)


def test_predict_keeps_the_order_and_takes_an_index():
    scored, ids = model(), [f"row {place}" for place in range(150)]
    plain, named = predict(scored, VALID), predict(scored, VALID, index=ids)
    assert plain.index.equals(pd.RangeIndex(150))
    assert list(named.index) == ids
    np.testing.assert_array_equal(plain, named)
    with pytest.raises(ValueError, match="index: expected 150 values, one .* found 2"):
        predict(scored, VALID, index=ids[:2])


# Batches, seeds, modes


@pytest.mark.parametrize("size", [1, 3, 7, 199, 200, 1000])
def test_batches_hold_every_row_once(size):
    order = shuffled_order(200, 3)
    parts = list(batches(TRAIN, order, size))
    assert sum(map(len, parts)) == 200
    assert torch.equal(torch.cat([part.dense for part in parts]), TRAIN.dense[order])
    straight = torch.cat([part.ids for part in slices(TRAIN, size)])
    assert torch.equal(straight, TRAIN.ids)


def test_epochs_and_seeds_shuffle_differently():
    seeds = {epoch_seeds(seed, epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400
    assert len({value for pair in seeds for value in pair}) == 800


def test_seeded_repeats_and_gives_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(torch.device("cpu"), 1):
        first = torch.rand(3)
    with seeded(torch.device("cpu"), 1):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("found", [True, False])
def test_every_training_step_is_in_train_mode_and_no_other(found):
    watched, seen = model(dropout=0.5).train(found), []
    watched.trunk.register_forward_hook(
        lambda module, *_: seen.append((torch.is_grad_enabled(), module.training))
    )
    fit(watched, TRAIN, VALID, epochs=3, also={"test": VALID}, **QUIET)
    assert seen.count((True, True)) == 3 * 7
    assert set(seen) == {(True, True), (False, False)}


@pytest.mark.parametrize("found", [True, False])
def test_fit_restores_the_mode_it_found(found):
    trained = model().train(found)
    fit(trained, TRAIN, VALID, epochs=1, **QUIET)
    assert {module.training for module in trained.modules()} == {found}


def test_a_frozen_normalization_stays_frozen():
    frozen = model()
    frozen.trunk = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    frozen.trunk[0].eval()
    start = state(frozen.trunk)
    fit(frozen, TRAIN, VALID, epochs=2, **QUIET)
    evaluate(frozen, VALID)
    assert [part.training for part in frozen.trunk] == [False, True]
    assert torch.equal(frozen.trunk[0].running_mean, start["0.running_mean"])
    assert not torch.equal(frozen.trunk[1].running_mean, start["1.running_mean"])


def test_scoring_changes_nothing():
    scored = model(dropout=0.5)
    scored.trunk = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    start, rng = state(scored), torch.get_rng_state()
    assert predict(scored, VALID).equals(predict(scored, VALID))
    evaluate(scored, VALID)
    assert same(start, state(scored))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in scored.modules())


def test_modes_are_restored_after_an_error():
    broken = model()
    broken.trunk.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(broken, VALID)
    with pytest.raises(ZeroDivisionError):
        fit(broken, TRAIN, epochs=1, **QUIET)
    assert all(module.training for module in broken.modules())


# The numbers


def test_fit_is_the_bare_loop():
    by_fit, by_hand = model().double(), model().double()
    rows = TRAIN.to(dtype=torch.float64)
    fit(by_fit, TRAIN, epochs=2, learning_rate=0.01, seed=4, **QUIET)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    for epoch in range(2):
        order = shuffled_order(200, epoch_seeds(4, epoch)[0])
        for chosen in order.split(32):
            optimizer.zero_grad()
            by_hand.loss(rows[chosen]).backward()
            optimizer.step()
    for one, other in zip(by_fit.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_seed_one_run():
    def run(seed):
        trained = model(dropout=0.3)
        history = fit(trained, TRAIN, VALID, epochs=3, seed=seed, **QUIET)
        return state(trained), history

    torch.manual_seed(1)
    before = torch.get_rng_state()
    (one, first), (two, second), (three, _) = run(7), run(7), run(8)
    assert same(one, two)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert not same(one, three)
    torch.manual_seed(1)
    fit(model(), TRAIN, epochs=1, **QUIET)
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_generator_does_not_move():
    trained = model(dropout=0.3)
    before = torch.get_rng_state()
    fit(trained, TRAIN, VALID, epochs=2, **QUIET)
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_rows_are_not_changed():
    before = [
        copy.deepcopy(getattr(TRAIN, name)) for name in ("ids", "dense", "labels")
    ]
    fit(model().double(), TRAIN, epochs=1, **QUIET)
    for name, values in zip(("ids", "dense", "labels"), before, strict=True):
        torch.testing.assert_close(getattr(TRAIN, name), values, equal_nan=True)
    assert TRAIN.dense.dtype == torch.float32


@pytest.mark.parametrize("size", [7, 32, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_epoch_means_are_means_over_labels(size, weighted):
    still, rows = model().double(), TRAIN.to(dtype=torch.float64)
    if weighted:
        weights = torch.arange(200, dtype=torch.float64) % 3
        rows = changed(rows, weights=weights)
    with torch.no_grad():
        losses = torch.stack([still.losses(part) for part in slices(rows, size)])
        found = epoch_means(losses, label_mask(still, rows), size)
        torch.testing.assert_close(found, still.losses(rows), rtol=0, atol=1e-12)


class Constant(Ranker):
    """One learned number for all rows."""

    def __init__(self, encoder: Encoder, **options) -> None:
        super().__init__(encoder, **options)
        self.trunk = nn.Identity()
        self.towers = nn.Linear(self.embedding.width, len(self.outputs))
        nn.init.zeros_(self.towers.weight).requires_grad_(False)
        self.embedding.requires_grad_(False)


@pytest.mark.parametrize("size", [1, 32, 192])
def test_row_weights_move_the_optimum_to_the_weighted_mean(size):
    frame = table(192).assign(dwell=lambda rows: rows["age"])
    encoder = Encoder(COLUMNS, TASKS, weight="mass").fit(frame)
    rows = encoder.transform(frame).to(dtype=torch.float64)
    rows = changed(rows, weights=torch.exp(rows.labels[:, 1]))
    values, weights = rows.labels[:, 1], rows.weights
    best = (values * weights).sum() / weights.sum()
    assert best - values.mean() > 0.5
    trained = Constant(encoder, tasks=["dwell"]).double()
    with torch.no_grad():
        trained.towers.bias.fill_(best)
    for part in slices(rows, size):
        trained.loss(part).backward()
    assert trained.towers.bias.grad.abs() < 1e-12
    nn.init.zeros_(trained.towers.bias)
    rates = {"optimizer": "sgd", "learning_rate": 0.0005 * size}
    fit(trained, rows, epochs=40, batch_size=size, progress=False, **rates)
    assert trained.towers.bias.item() == pytest.approx(best.item(), abs=0.03)


def test_weighted_epoch_means_are_the_objective():
    weights = torch.arange(200) % 4 / 1.5
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    history = fit(
        model().double(), changed(TRAIN, weights=weights), epochs=1, **still, **QUIET
    )
    losses = history.pivot(index="task", columns="split", values="loss")
    np.testing.assert_allclose(losses["batches"], losses["train"], rtol=1e-12)


def test_batches_without_a_label_of_some_task_are_fine():
    labels = TRAIN.labels.clone()
    labels[(~labels[:, 1].isnan()).nonzero()[1:, 0], 1] = torch.nan
    history = fit(
        model(), changed(TRAIN, labels=labels), epochs=2, progress=False, batch_size=3
    )
    assert history["loss"].notna().all()


def test_a_last_batch_of_one_row():
    history = fit(model(), TRAIN[:33], epochs=1, **QUIET)
    assert history["loss"].notna().all()


def test_clip_norm_bounds_a_step():
    clipped = model()
    start = state(clipped)
    sgd = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": 200}
    fit(clipped, TRAIN, epochs=1, clip_norm=0.01, progress=False, **sgd)
    moved = sum((v - start[k]).square().sum() for k, v in state(clipped).items())
    assert moved.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_stays_near_and_keeps_full_precision_outside():
    full, half = model(), model()
    steps = {"epochs": 3, "optimizer": "sgd", "learning_rate": 0.1}
    seen = []
    half.towers.register_forward_hook(
        lambda module, args, out: seen.append((torch.is_grad_enabled(), out.dtype))
    )
    one = fit(full, TRAIN, VALID, **steps, **QUIET)
    two = fit(half, TRAIN, VALID, precision="bf16", **steps, **QUIET)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    gap = (one["loss"] - two["loss"]).abs().max()
    assert 0 < gap < 0.02


# Optimizers and schedulers


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_every_named_optimizer_learns(name):
    rate = {"sgd": 0.1, "adagrad": 0.1}.get(name, 0.01)
    history = fit(model(), TRAIN, epochs=4, optimizer=name, learning_rate=rate, **QUIET)
    losses = history.query("split == 'train' and task == 'click'")["loss"].to_numpy()
    assert losses[-1] < losses[0]


def test_adam_is_fused_here():
    groups = [{"params": list(model().parameters())}]
    made = training.named_optimizer("adam", groups, lr=0.1)
    assert made.param_groups[0]["fused"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("tables", [0.0, 0.3, 0.7])
def test_matrices_and_tables_decay_and_biases_do_not(optimizer, decay, tables):
    # A second run without decay says how far the loss alone moves them. Both
    # optimizers add -rate * decay * weight to that in their first step.
    options = {"epochs": 1, "optimizer": optimizer, "learning_rate": 0.1}
    options |= {**QUIET, "batch_size": 200}
    start = state(model().double())
    plain, decayed = model().double(), model().double()
    fit(plain, TRAIN, **options)
    fit(decayed, TRAIN, weight_decay=decay, embedding_decay=tables, **options)
    strength = {"embedding.weights.3": tables, "towers.weight": decay}
    strength["towers.bias"] = 0.0
    assert strength.keys() == start.keys()
    for name, values in state(decayed).items():
        pull = 0.1 * strength[name] * start[name]
        expected = state(plain)[name] - pull
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_without_decay_there_is_one_group_in_the_order_of_the_model():
    whole = model()
    (group,) = training.decay_groups(whole, training.Settings(epochs=1))
    assert all(
        one is other
        for one, other in zip(group["params"], whole.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("trunk.bottom.0.weight", (5, 3), True),
        ("trunk.bottom.0.bias", (5,), False),
        ("trunk.bottom.1.weight", (5,), False),
        ("trunk.weights.0", (3, 5, 7), True),
        ("trunk.experts.0.bias", (3, 5), False),
        ("trunk.bias.0.weight", (1, 5), True),
        ("towers.64x32x1.0.weight", (2, 64, 7), True),
        ("towers.64x32x1.0.bias", (2, 64), False),
        ("towers.1.0.bias", (2, 1), False),
    ],
)
def test_what_decays(name, shape, expected):
    assert training.decays(name, torch.zeros(shape)) is expected


def test_a_decay_that_moved_is_another_run(tmp_path):
    options = {"epochs": 1, "checkpoint": tmp_path / "run.pt", **QUIET}
    fit(model(), TRAIN, weight_decay=0.1, embedding_decay=0.1, **options)
    with pytest.raises(ValueError, match="setting weight_decay: 0.1 in the file, 0.0"):
        fit(model(), TRAIN, embedding_decay=0.1, **options)


def test_a_weight_ratio_acts_from_epoch_to_epoch():
    # Plain gradient descent over all rows is easily done by hand.
    found, by_hand = fading_model().double(), fading_model().double()
    rows = FADING_ENCODER.transform(table(200)).to(dtype=torch.float64)
    options = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 200}
    fit(found, rows, epochs=3, progress=False, **options)
    parameters = list(by_hand.parameters())
    for epoch in range(3):
        click, dwell, rating = by_hand.losses(rows)
        joint = click + 0.5 * 0.25**epoch * dwell + rating
        slopes = torch.autograd.grad(joint, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= 0.1 * slope
    for one, other in zip(found.parameters(), parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_monitored_loss_keeps_the_weights_of_the_beginning():
    rows = FADING_ENCODER.transform(table(150, seed=1))
    trained = fading_model()
    history = fit(
        trained, FADING_ENCODER.transform(table(200)), rows, epochs=3, **QUIET
    )
    valid = history[history["split"] == "valid"].pivot(
        index="epoch", columns="task", values="loss"
    )
    joint = valid["click"] + 0.5 * valid["dwell"] + valid["rating"]
    np.testing.assert_allclose(history.attrs["scores"], joint, rtol=1e-6)


def test_the_file_of_another_weight_ratio_is_refused(tmp_path):
    options = {"epochs": 1, "checkpoint": tmp_path / "run.pt", **QUIET}
    fit(fading_model(), FADING_ENCODER.transform(table(200)), **options)
    with pytest.raises(ValueError, match=r"task dwell: .*weight_ratio=0.25"):
        fit(model(), TRAIN, **options)


def test_frozen_parameters_are_left_alone():
    trained = model()
    trained.embedding.requires_grad_(False)
    start = state(trained)
    fit(trained, TRAIN, epochs=1, weight_decay=0.1, **QUIET)
    end = state(trained)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"towers.weight", "towers.bias"}


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RMSprop])
def test_any_torch_optimizer(make):
    assert len(fit(model(), TRAIN, epochs=1, optimizer=make, **QUIET))


SCHEDULERS = torch.optim.lr_scheduler
BY_EPOCH = {
    "step": lambda o: SCHEDULERS.StepLR(o, 1, 0.5),
    "multistep": lambda o: SCHEDULERS.MultiStepLR(o, [1, 2], 0.5),
    "cosine": lambda o: SCHEDULERS.CosineAnnealingLR(o, 4),
    "restarts": lambda o: SCHEDULERS.CosineAnnealingWarmRestarts(o, 2),
    "lambda": lambda o: SCHEDULERS.LambdaLR(o, lambda epoch: 0.5**epoch),
    "plateau": lambda o: SCHEDULERS.ReduceLROnPlateau(o, patience=0, threshold=9),
    "sequential": lambda o: SCHEDULERS.SequentialLR(
        o, [SCHEDULERS.ConstantLR(o, 0.1, 1), SCHEDULERS.ExponentialLR(o, 0.5)], [1]
    ),
}
BY_BATCH = {
    "one cycle": lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=28),
    "cyclic": lambda o: SCHEDULERS.CyclicLR(o, 0.001, 0.1, cycle_momentum=False),
}


@pytest.mark.parametrize("name", [*BY_EPOCH, *BY_BATCH])
def test_schedulers_run_and_resume(name, tmp_path):
    schedule = "epoch" if name in BY_EPOCH else "batch"
    options = {"scheduler": {**BY_EPOCH, **BY_BATCH}[name], "schedule": schedule}
    whole, resumed = model(dropout=0.3), model(dropout=0.3)
    expected = fit(whole, TRAIN, VALID, epochs=4, **options, **QUIET)
    rates = expected["learning_rate"].unique()
    assert len(rates) > 1
    options["checkpoint"] = tmp_path / "run.pt"
    fit(model(dropout=0.3), TRAIN, VALID, epochs=2, **options, **QUIET)
    found = fit(resumed, TRAIN, VALID, epochs=4, **options, **QUIET)
    pd.testing.assert_frame_equal(expected, found, check_exact=True)
    assert same(state(whole), state(resumed))


def test_step_scheduler_by_hand():
    history = fit(
        model(), TRAIN, epochs=3, learning_rate=0.8, scheduler=BY_EPOCH["step"], **QUIET
    )
    assert list(history["learning_rate"].unique()) == [0.8, 0.4, 0.2]


# The best epoch


def scores_of(values):
    """Make the monitored score follow a script, whatever the model does."""

    def score(self, joint, figures):
        return next(values)

    return score


@pytest.mark.parametrize(
    ("monitor", "scores", "best"),
    [
        ("click/auc", [0.442, 0.446, 0.471, 0.465, 0.463, 0.466], 3),
        ("dwell/rmse", [0.9, 0.5, 0.4, 0.45, 0.6, 0.7], 3),
        ("loss", [0.9, float("nan"), 0.8, 0.8, 1.0, 0.9], 3),
    ],
)
@pytest.mark.parametrize("patience", [None, 2, 9])
def test_best_weights_come_back(monkeypatch, monitor, scores, best, patience):
    # The first score is the trial before training.
    monkeypatch.setattr(Monitor, "score", scores_of(iter([0.5, *scores])))
    trained = model()
    history = fit(
        trained, TRAIN, VALID, epochs=6, monitor=monitor, patience=patience, **QUIET
    )
    assert history.best_epoch == history.attrs["best_epoch"] == best
    assert history["epoch"].max() == (best + 2 if patience == 2 else 6)
    until = model()
    fit(until, TRAIN, epochs=best, **QUIET)
    assert same(state(trained), state(until))


def test_without_valid_rows_the_last_weights_stay():
    one, two = model(), model()
    history = fit(one, TRAIN, epochs=3, **QUIET)
    fit(two, TRAIN, VALID, epochs=3, patience=3, **QUIET)
    assert history.best_epoch is None
    assert set(history["split"]) == {"batches", "train"}


def test_the_model_scores_what_its_best_epoch_scored():
    trained = model()
    history = fit(
        trained,
        TRAIN,
        VALID,
        epochs=12,
        learning_rate=0.1,
        monitor="click/auc",
        **QUIET,
    )
    part = history[
        (history["epoch"] == history.best_epoch) & (history["split"] == "valid")
    ]
    part = part.set_index("task")
    found = evaluate(trained, VALID)
    assert history.best_epoch < 12
    for name in set(METRICS) & set(found):
        np.testing.assert_array_equal(part[name], found[name])


def test_mean_monitor_is_a_mean_of_tasks():
    history = fit(model(), TRAIN, VALID, epochs=2, monitor="mean/log_loss", **QUIET)
    valid = history[history["split"] == "valid"]
    means = valid.groupby("epoch")["log_loss"].mean()
    np.testing.assert_allclose(history.attrs["scores"], means)


def test_loss_monitor_is_the_joint_loss():
    history = fit(model(), TRAIN, VALID, epochs=2, **QUIET)
    valid = history[history["split"] == "valid"].pivot(
        index="epoch", columns="task", values="loss"
    )
    joint = valid["click"] + 0.5 * valid["dwell"] + valid["rating"]
    np.testing.assert_allclose(history.attrs["scores"], joint, rtol=1e-6)


def test_monitors_are_listed_with_their_direction():
    found = monitors(TASKS, METRICS)
    assert {"loss", "mean/log_loss", "click/auc", "dwell/rmse"} < set(found)
    assert "click/predicted_over_observed" not in found
    assert "dwell/auc" not in found
    assert found["mean/log_loss"].tasks == ("click", "rating")
    for name, monitor in found.items():
        if name != "loss":
            metric = name.partition("/")[2]
            assert monitor.higher_is_better is METRICS[metric].higher_is_better


def test_a_mean_over_a_missing_number_is_missing():
    figures = pd.DataFrame({"auc": [0.5, np.nan]}, index=["a", "b"])
    assert np.isnan(Monitor("mean/auc", ("a", "b"), "auc", True).score(0.0, figures))


def test_grouped_auc_can_be_monitored():
    history = fit(
        model(),
        TRAIN,
        VALID,
        epochs=2,
        monitor="click/grouped_auc",
        groups={"valid": USERS},
        **QUIET,
    )
    valid = history.query("split == 'valid' and task == 'click'")
    assert list(valid["grouped_auc"]) == history.attrs["scores"]
    assert history.query("split == 'train'")["grouped_auc"].isna().all()


# The record


def test_history_is_a_tidy_frame():
    history = fit(model(), TRAIN, VALID, epochs=2, also={"test": VALID}, **QUIET)
    assert isinstance(history, History)
    assert isinstance(history.query("epoch == 1"), History)
    assert len(history) == 2 * 4 * 3
    assert not history.duplicated(["epoch", "split", "task"]).any()
    assert list(history)[:5] == ["epoch", "split", "task", "loss", "learning_rate"]
    assert set(history["split"]) == {"batches", "train", "valid", "test"}
    test, valid = (history[history["split"] == name] for name in ("test", "valid"))
    np.testing.assert_array_equal(test["loss"], valid["loss"])


def test_train_metrics_can_be_left_out():
    history = fit(model(), TRAIN, VALID, epochs=1, train_metrics=False, **QUIET)
    assert set(history["split"]) == {"batches", "valid"}


def test_chosen_metrics_only():
    history = fit(model(), TRAIN, VALID, epochs=1, metrics="auc", **QUIET)
    assert list(history)[5:] == ["auc"]
    history = fit(model(), TRAIN, VALID, epochs=1, metrics=(), **QUIET)
    assert list(history)[5:] == []


def test_a_task_without_valid_labels_has_no_loss_there():
    labels = VALID.labels.clone()
    labels[:, 1] = torch.nan
    nothing = changed(VALID, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        history = fit(model(), TRAIN, nothing, epochs=1, monitor="click/auc", **QUIET)
        without = model()
        without.tasks = tuple(
            replace(t, weight=0.0 if t.name == "dwell" else 1.0) for t in TASKS
        )
        fit(without, TRAIN, nothing, epochs=1, **QUIET)
    part = history[history["split"] == "valid"].set_index("task")["loss"]
    assert list(part.isna()) == [False, True, False]
    message = r"'loss' is undefined on the valid rows \(no label for task 'dwell'\)"
    with pytest.raises(ValueError, match=message):
        fit(model(), TRAIN, nothing, epochs=1, metrics=(), **QUIET)


def test_curves_draw_a_line_for_each_task_and_rows():
    history = fit(model(), TRAIN, VALID, epochs=2, **QUIET)
    assert len(history.curves().axes[0].lines) == 9
    assert len(history.curves("auc").axes[0].lines) == 2
    with pytest.raises(ValueError, match="metric: unknown 'AUC', choose from 'loss'"):
        history.curves("AUC")


def test_the_bar_shows_every_task(capsys):
    fit(model(), TRAIN, VALID, epochs=2, batch_size=32)
    shown = capsys.readouterr().err
    assert "14/14" in shown
    assert "epoch 2, valid" in shown
    assert all(f"{task.name}=" in shown for task in TASKS)


def test_progress_can_be_off(capsys):
    fit(model(), TRAIN, epochs=1, **QUIET)
    assert capsys.readouterr() == ("", "")


# predict and evaluate


def test_predict_does_not_depend_on_the_batch_size():
    scored = model().double()
    one = predict(scored, VALID, batch_size=7)
    np.testing.assert_allclose(one, predict(scored, VALID), rtol=0, atol=1e-14)


def test_evaluate_is_measure():
    scored = model()
    frame = table(150, seed=1)
    expected = measure(
        VALID.labels.numpy(), predict(scored, VALID).to_numpy(), TASKS, groups=USERS
    )
    found = evaluate(scored, VALID, groups=frame["user"])
    pd.testing.assert_frame_equal(found, expected)
    assert list(evaluate(scored, VALID, metrics=["auc"]))[-1] == "auc"


def test_evaluate_weights_rows():
    scored = model()
    weights = (torch.arange(150) % 2).float()
    odd = torch.arange(1, 150, 2)
    weighted = evaluate(scored, changed(VALID, weights=weights))
    pd.testing.assert_frame_equal(weighted, evaluate(scored, VALID[odd]))


class Choosy(Linear):
    """Refuses rows of which the first has an age below -9."""

    def check(self, batch) -> None:
        self.seen = [*getattr(self, "seen", []), len(batch)]
        if batch.dense[0, 0] < -9:
            raise ValueError("age: expected at least -9")


def choosy() -> Choosy:
    torch.manual_seed(0)
    return Choosy(ENCODER)


def test_check_is_asked_once_for_each_set_of_rows():
    asked = choosy()
    fit(asked, TRAIN, VALID, epochs=2, also={"test": VALID[:70]}, **QUIET)
    assert asked.seen == [200, 150, 70]
    evaluate(asked, VALID[:50], batch_size=7)
    assert asked.seen == [200, 150, 70, 50]
    predict(asked, VALID)
    assert len(asked.seen) == 4


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_set_of_rows_that_the_model_refuses_is_named(name):
    rows = {"train": TRAIN, "valid": VALID, "test": VALID}
    rows[name] = changed(rows[name], dense=rows[name].dense - 100)
    train, valid, test = rows.values()
    options = {"also": {"test": test}, "optimizer": refuse_steps, **QUIET}
    with pytest.raises(ValueError, match=f"^{name}: age: expected at least -9$"):
        fit(choosy(), train, valid, epochs=1, **options)
    with pytest.raises(ValueError, match="^batch: age: expected"):
        evaluate(choosy(), rows[name])


def test_evaluate_part_of_the_tasks():
    assert list(evaluate(model(tasks=["dwell"]), VALID).index) == ["dwell"]


# Bad input

NO_CLICKS = (TRAIN.labels[:, 0] == 0).nonzero()[:, 0]
BAD = {
    "epochs: expected a whole number above 0, found 0": {"epochs": 0},
    "epochs: expected a whole number above 0, found True": {"epochs": True},
    "batch_size: expected a whole number above 0, found -3": {"batch_size": -3},
    "learning_rate: expected a number above 0, found 0": {"learning_rate": 0.0},
    "learning_rate: expected a number above 0, found nan": {"learning_rate": np.nan},
    "weight_decay: expected a number of at least 0, found -0.1": {"weight_decay": -0.1},
    "embedding_decay: expected a number of at least 0, found -1.0": {
        "embedding_decay": -1.0
    },
    "clip_norm: expected a number above 0, found 0": {"clip_norm": 0.0},
    "patience: expected a whole number above 0, found 0": {"patience": 0},
    "seed: expected a whole number of at least 0, found -1": {"seed": -1},
    "device: 'gpu' cannot be used here: ": {"device": "gpu"},
    "unknown metric 'AUC', choose from auc": {"metrics": ["AUC"]},
    "metric 'grouped_auc' needs groups": {"metrics": ["grouped_auc"]},
    "optimizer: unknown 'adm', choose from 'adam'": {"optimizer": "adm"},
    "schedule: unknown 'step', choose from 'epoch', 'batch'": {"schedule": "step"},
    "precision: unknown 'fp16', choose from None, 'bf16'": {"precision": "fp16"},
    "monitor: unknown 'click/rmse', choose from 'loss'": {"monitor": "click/rmse"},
    "monitor: unknown 'val_loss', choose from 'loss'": {"monitor": "val_loss"},
    "monitor: unknown 'click/grouped_auc'": {"monitor": "click/grouped_auc"},
    "unknown 'click/predicted_over_observed'": {
        "monitor": "click/predicted_over_observed"
    },
    "a monitor needs valid rows": {"valid": None, "monitor": "click/auc"},
    "patience needs valid rows": {"valid": None, "patience": 2},
    "ReduceLROnPlateau needs valid rows": {
        "valid": None,
        "scheduler": SCHEDULERS.ReduceLROnPlateau,
    },
    "needs mode='max' and schedule='epoch', found 'min'": {
        "monitor": "click/auc",
        "scheduler": SCHEDULERS.ReduceLROnPlateau,
    },
    "monitor: 'click/auc' is undefined on the valid rows .*all .* labels are 0": {
        "valid": TRAIN[NO_CLICKS],
        "monitor": "click/auc",
    },
    "no label for task 'dwell' in": {"train": TRAIN[NO_CLICKS]},
    "train: expected at least one row, found none": {"train": TRAIN[:0]},
    "test: expected at least one row": {"also": {"test": TRAIN[:0]}},
    "also: 'valid' cannot name rows; expected a text other than batches": {
        "also": {"valid": VALID}
    },
    "also: 'batches' cannot name rows": {"also": {"batches": VALID}},
    "also: '' cannot name rows": {"also": {"": VALID}},
    "groups: unknown 'test', choose from 'train', 'valid'": {"groups": {"test": USERS}},
    "groups\\['valid'\\]: expected 150 values, one for each row, found 149": {
        "groups": {"valid": USERS[:-1]}
    },
    "learning_rate belongs to an optimizer chosen by name": {
        "optimizer": torch.optim.SGD,
        "learning_rate": 0.1,
    },
    "embedding_decay belongs to an optimizer chosen by name": {
        "optimizer": torch.optim.SGD,
        "embedding_decay": 0.1,
    },
    "expected a file in a folder, found": {"checkpoint": "nowhere/at/all.pt"},
}


def refuse_steps(parameters):
    optimizer = torch.optim.SGD(parameters)

    def step(*_):
        raise AssertionError("a step was taken")

    optimizer.step = step
    return optimizer


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_the_first_step(message):
    options = {"train": TRAIN, "valid": VALID, "epochs": 1, "progress": False}
    options |= {"optimizer": refuse_steps} | BAD[message]
    if {"learning_rate", "weight_decay", "embedding_decay"} & BAD[message].keys():
        options |= {"optimizer": BAD[message].get("optimizer", "adam")}
    with pytest.raises(ValueError, match=message):
        fit(model(), **options)


def test_valid_rows_without_any_label_are_refused():
    nothing = changed(VALID, labels=torch.full_like(VALID.labels, torch.nan))
    with pytest.raises(ValueError, match="monitor: 'loss' is undefined on the valid"):
        fit(model(), TRAIN, nothing, epochs=1, **QUIET)


def test_rows_whose_labels_have_no_weight_are_no_labels():
    with pytest.raises(ValueError, match="no label for task 'click'"):
        fit(model(), changed(TRAIN, weights=torch.zeros(200)), epochs=1, **QUIET)


@pytest.fixture
def unchecked():
    """Annotations are not asserted: what a caller without them would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WRONG_TYPES = {
    "scheduler: expected a callable .* found str": {"scheduler": "cosine"},
    "scheduler: expected a callable .* found StepLR": {
        "scheduler": SCHEDULERS.StepLR(torch.optim.SGD([torch.zeros(1)]), 1)
    },
    "returns a torch LRScheduler, it returned NoneType": {"scheduler": lambda o: None},
    "also: expected a mapping such as .* found Batch": {"also": VALID},
    "groups: expected a mapping such as .* found ndarray": {"groups": USERS},
}


@pytest.mark.parametrize("message", WRONG_TYPES)
def test_options_of_a_wrong_type_are_refused(message, monkeypatch, unchecked):
    monkeypatch.setattr(training.Run, "step", lambda *_: 1 / 0)
    with pytest.raises(TypeError, match=message):
        fit(model(), TRAIN, VALID, epochs=1, **WRONG_TYPES[message], **QUIET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a place without CUDA")
def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
        fit(model(), TRAIN, epochs=1, device="cuda", **QUIET)
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
        predict(model(), TRAIN, device="cuda")


def test_a_model_without_a_free_parameter_is_refused():
    with pytest.raises(ValueError, match="parameter that wants a gradient, found all"):
        fit(model().requires_grad_(False), TRAIN, epochs=1, **QUIET)


@pytest.mark.parametrize(("rows", "size"), [(33, 32), (10, 1), (1, 256)])
def test_a_batch_of_one_row_is_refused_for_batch_normalization(rows, size):
    normalized = model()
    normalized.trunk = nn.BatchNorm1d(4)
    options = {"epochs": 1, "progress": False, "batch_size": size}
    train = TRAIN[(TRAIN.labels[:, 2] == 1).nonzero()[:, 0]].labels[:1]
    train = changed(TRAIN[:rows], labels=train.nan_to_num(1.0).repeat(rows, 1))
    message = f"batch_size: {rows} rows in batches of {size} leave a batch of one row"
    with pytest.raises(ValueError, match=message):
        fit(normalized, train, **options)
    normalized.trunk.eval()
    assert len(fit(normalized, train, train_metrics=False, **options)) == 3


def test_precision_needs_float32():
    with pytest.raises(ValueError, match=r"expected weights of torch.float32, found"):
        fit(model().double(), TRAIN, epochs=1, precision="bf16", **QUIET)
    with pytest.raises(ValueError, match=r"float32 or torch.float64, found torch.bf"):
        fit(model().bfloat16(), TRAIN, epochs=1, **QUIET)


def test_an_optimizer_that_is_none_is_refused():
    with pytest.raises(TypeError, match="it returned NoneType|Optimizer"):
        fit(model(), TRAIN, epochs=1, optimizer=lambda parameters: None, **QUIET)


def test_wrong_types_are_named():
    with pytest.raises(
        TypeError, match=r"train: expected a Batch, which encoder.tr.*Data"
    ):
        check_batch("train", table(3))
    with pytest.raises(TypeError, match="expected a Ranker, found Linear"):
        check_ranker(nn.Linear(1, 1))


def test_a_loss_that_is_not_finite_is_named():
    labels = TRAIN.labels.clone()
    row = int((~labels[:, 1].isnan()).nonzero()[5])
    labels[row, 1] = 1e30
    order = shuffled_order(200, epoch_seeds(0, 0)[0])
    batch = int((order == row).nonzero()) // 32 + 1
    message = f"task 'dwell': the loss became inf in epoch 1, batch {batch} of 7"
    with pytest.raises(FloatingPointError, match=message):
        fit(model(), changed(TRAIN, labels=labels), epochs=1, **QUIET)


def test_a_loss_that_is_not_finite_on_valid_rows_is_named():
    labels = VALID.labels.clone()
    labels[:, 1] = 1e30
    message = "task 'dwell': the loss became inf on the rows 'valid' after epoch 0"
    with pytest.raises(FloatingPointError, match=message):
        fit(model(), TRAIN, changed(VALID, labels=labels), epochs=1, **QUIET)


def test_after_a_broken_loss_the_best_weights_are_there():
    class Cliff(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            Cliff.steps += 1
            self.param_groups[0]["lr"] = 0.01 if Cliff.steps <= 14 else 1e30
            return super().step(closure)

    broken, whole = model(), model()
    with pytest.raises(FloatingPointError, match="epoch 3"):
        fit(broken, TRAIN, VALID, epochs=9, optimizer=Cliff, **QUIET)
    Cliff.steps = 0
    fit(whole, TRAIN, VALID, epochs=2, optimizer=Cliff, **QUIET)
    assert same(state(broken), state(whole))


# The file


def long_run(path: Path | None, epochs: int = 6) -> tuple[Linear, History]:
    trained = model(dropout=0.4)
    history = fit(
        trained,
        TRAIN,
        VALID,
        epochs=epochs,
        scheduler=BY_EPOCH["cosine"],
        monitor="click/auc",
        learning_rate=0.02,
        seed=3,
        checkpoint=path,
        **QUIET,
    )
    return trained, history


def die_at(moment: str) -> None:
    """Kill this process for real: in a step of epoch 4, or in the midst of a save."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calls = []

    def count(limit: int) -> None:
        calls.append(1)
        if len(calls) == limit:
            kill()

    if moment == "step":
        step = training.Run.step
        training.Run.step = lambda *given: (count(3 * 7 + 4), step(*given))[1]
    else:
        fsync = os.fsync
        training.os.fsync = lambda number: (count(4), fsync(number))[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["step", "save"])
def test_killed_and_resumed_equals_uninterrupted(moment, tmp_path):
    path = tmp_path / "run.pt"
    command = [sys.executable, __file__, moment, str(path)]
    died = subprocess.run(command, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert torch.load(path, weights_only=True)["epoch"] == 3
    assert path.with_name("run.pt.partial").exists() == (moment == "save")
    resumed, found = long_run(path)
    whole, expected = long_run(None)
    assert same(state(resumed), state(whole))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found.attrs == expected.attrs
    assert not path.with_name("run.pt.partial").exists()


def test_a_run_can_be_continued_for_longer(tmp_path):
    path = tmp_path / "run.pt"
    long_run(path, epochs=2)
    resumed, found = long_run(path, epochs=5)
    whole, expected = long_run(None, epochs=5)
    assert same(state(resumed), state(whole))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    again, same_history = long_run(path, epochs=5)
    assert same(state(again), state(whole))
    pd.testing.assert_frame_equal(same_history, expected, check_exact=True)
    with pytest.raises(
        ValueError, match="holds 5 epochs already; expected at most epo"
    ):
        long_run(path, epochs=3)


def test_a_stopped_run_stays_stopped(tmp_path):
    options = {"patience": 1, "learning_rate": 0.3, "checkpoint": tmp_path / "run.pt"}
    first = fit(model(), TRAIN, VALID, epochs=50, **options, **QUIET)
    assert first["epoch"].max() < 50
    again = model()
    second = fit(again, TRAIN, VALID, epochs=50, **options, **QUIET)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


OTHERS = {
    "setting batch_size: 32 in the file, 16 here": {"batch_size": 16},
    "setting seed: 0 in the file, 1 here": {"seed": 1},
    "Differences: 1, at .*\noptimizer lr, group 0: 0.001 in the file, 0.5 here$": {
        "learning_rate": 0.5
    },
    "\noptimizer: Adam in the file, SGD here": {"optimizer": "sgd"},
    "\nscheduler: none in the file, StepLR here": {"scheduler": BY_EPOCH["step"]},
    "setting monitor: 'loss' in the file, 'click/auc' here": {"monitor": "click/auc"},
    "setting clip_norm": {"clip_norm": 1.0},
    "setting precision": {"precision": "bf16"},
    "rows train: 200 rows, digest .* in the file, 199 rows": {"train": TRAIN[:199]},
    "rows train: 200 rows": {"train": TRAIN[torch.arange(200).flip(0)]},
    "rows valid": {"valid": VALID[:149]},
    "module trunk: Dropout.p=0.0, .* in the file, Dropout.p=0.1": {"dropout": 0.1},
    "layout: tasks: click, dwell, rating in the file, tasks: click, rating here": {
        "tasks": ["click", "rating"]
    },
    r"parameter towers.weight: torch.float32 \[5, 4\] in the file, torch.f": {
        "tasks": ["click", "rating"]
    },
    "parameter towers.weight: torch.float32": {"double": True},
}


@pytest.mark.parametrize("message", OTHERS)
def test_the_file_of_another_run_is_refused(message, tmp_path):
    path = tmp_path / "run.pt"
    options = {"train": TRAIN, "valid": VALID, "epochs": 1, "checkpoint": path, **QUIET}
    fit(model(), **options)
    kept = path.read_bytes()
    other = dict(OTHERS[message])
    made = {name: other.pop(name) for name in ("dropout", "tasks") if name in other}
    twin = model(**made)
    twin = twin.double() if other.pop("double", False) else twin
    with pytest.raises(ValueError, match="is of another run") as refused:
        fit(twin, **(options | other))
    assert re.search(message, str(refused.value))
    assert path.read_bytes() == kept


def test_settings_that_change_no_weight_may_change(tmp_path, unchecked):
    once = {"checkpoint": tmp_path / "run.pt", **QUIET}
    whole = model()
    expected = fit(whole, TRAIN, VALID, epochs=4, **QUIET)
    fit(model(), TRAIN, VALID, epochs=2, learning_rate=np.float64(1e-3), **once)
    looks = {"groups": {"valid": USERS}, "also": {"test": VALID}, "metrics": "auc"}
    found = fit(
        again := model(),
        TRAIN,
        VALID,
        epochs=np.int64(4),
        patience=4,
        train_metrics=False,
        **looks,
        **(once | {"progress": True}),
    )
    assert same(state(again), state(whole))
    assert found.attrs == expected.attrs
    assert set(found.query("epoch == 4")["split"]) == {"batches", "valid", "test"}


def test_rows_watched_beside_are_never_chosen_by():
    turned = VALID.labels.clone()
    turned[:, 0] = 1 - turned[:, 0]
    once = {"epochs": 6, "learning_rate": 0.05, **QUIET}
    alone, watched = model(), model()
    expected = fit(alone, TRAIN, VALID, **once)
    test = {"test": replace(VALID, labels=turned)}
    found = fit(watched, TRAIN, VALID, also=test, **once)
    assert same(state(watched), state(alone))
    assert found.attrs == expected.attrs
    scores = found.query("split == 'test' and task == 'click'")["loss"]
    assert scores.argmin() != np.argmin(found.attrs["scores"])


def test_groups_count_where_the_monitor_reads_them(tmp_path):
    once = {"checkpoint": tmp_path / "run.pt", "monitor": "click/grouped_auc"}
    once |= {"epochs": 1, **QUIET}
    fit(model(), TRAIN, VALID, groups={"valid": USERS}, **once)
    with pytest.raises(ValueError, match="Differences: 1, .*\ngroups valid: "):
        fit(model(), TRAIN, VALID, groups={"valid": USERS % 5}, **once)


def test_a_second_seed_on_the_same_path_is_told(tmp_path):
    path = tmp_path / "run.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long_run(path, epochs=1)
        long_run(path, epochs=2)
    options = {"epochs": 2, "checkpoint": path, **QUIET}
    path.unlink()
    fit(first := model(), TRAIN, **options)
    message = f"resuming {re.escape(str(path))} after epoch 2: this model's starting"
    for epochs in (2, 3):
        with pytest.warns(UserWarning, match=message):
            fit(second := model(seed=1), TRAIN, **(options | {"epochs": epochs}))
        message = message.replace("epoch 3", "epoch 2")
        assert same(state(first), state(second)) == (epochs == 2)


def test_numbers_of_numpy_are_resumed_from(tmp_path):
    options = {"checkpoint": tmp_path / "run.pt", **QUIET}
    options["scheduler"] = lambda o: SCHEDULERS.LambdaLR(o, lambda k: np.exp(-k))
    options["optimizer"] = lambda p: torch.optim.SGD(p, lr=np.float64(0.1))
    fit(model(), TRAIN, epochs=1, **options)
    history = fit(model(), TRAIN, epochs=3, **options)
    rates = history["learning_rate"].unique()
    np.testing.assert_allclose(rates, 0.1 * np.exp([0, -1, -2]))


def test_a_value_changed_in_one_row_is_noticed():
    fact = training.rows_fact
    dense = TRAIN.dense.clone()
    dense[100] += 1
    assert fact(TRAIN) == fact(TRAIN[torch.arange(200)])
    assert fact(TRAIN) != fact(changed(TRAIN, dense=dense))
    assert fact(TRAIN) != fact(changed(TRAIN, weights=torch.ones(200)))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt: not readable as one"):
        long_run(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_checkpoint_that_was_cut_short_is_refused(share, tmp_path):
    path = tmp_path / "run.pt"
    long_run(path, epochs=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"run.pt: not readable as one, or cut short"):
        long_run(path)


def test_a_file_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", torch.device("cpu"))


def test_a_file_of_other_tensors_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(model().state_dict(), path)
    with pytest.raises(ValueError, match=r"weights.pt: expected a file that fit wrote"):
        long_run(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "run.pt"
    torch.save({"format": Trap()}, path)
    with pytest.raises(ValueError, match="not readable as one"):
        load_checkpoint(path, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"epoch": 1})
    kept = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="could not be written: .*is as it was"):
            save_checkpoint(path, {"epoch": 2, "large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(OSError, match=r"run.pt could not be written: .*No space left"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"epoch": 1})
    assert list(tmp_path.iterdir()) == []


# Replicas


def small(seed: int, *, norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(11) if norm else nn.Tanh()
    return nn.Sequential(
        nn.Linear(7, 11, bias=not norm), middle, nn.Linear(11, 1)
    ).double()


def losses_of(trained: nn.Module, x, y, make) -> torch.Tensor:
    optimizer, found = make(trained.parameters()), []
    for _ in range(20):
        each = (trained(x) - y).square().flatten(-2).mean(-1)
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        found.append(each.detach())
    return torch.stack(found)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ],
)
def test_each_replica_trains_as_if_alone(norm, make):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 13, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 13, 1, generator=generator, dtype=torch.float64)
    together = Replicas([small(seed, norm=norm) for seed in range(3)])
    found = losses_of(together, x, y, make)
    for index in range(3):
        alone = small(index, norm=norm)
        expected = losses_of(alone, x[index], y[index], make)
        torch.testing.assert_close(found[:, index], expected, rtol=0, atol=1e-10)
        taken = state(together.replica(index))
        for name, values in alone.state_dict().items():
            torch.testing.assert_close(taken[name], values, rtol=0, atol=1e-10)


def test_replicas_draw_their_own_dropout():
    made = [nn.Sequential(nn.Dropout(0.5)) for _ in range(2)]
    made = [nn.Sequential(*each, nn.Linear(100, 1)) for each in made]
    made[1].load_state_dict(made[0].state_dict())
    together, x = Replicas(made), torch.ones(2, 1, 100)
    one, two = together(x)
    assert not torch.equal(one, two)
    one, two = together.eval()(x)
    assert torch.equal(one, two)


def test_replicas_follow_mode_and_precision():
    together = Replicas([small(seed, norm=True).eval() for seed in range(2)])
    assert not together.training
    together.train().float()
    taken = together.replica(1)
    assert taken.training
    assert {p.dtype for p in taken.parameters()} == {torch.float32}
    assert together(torch.zeros(2, 5, 7)).dtype == torch.float32
    other = Replicas([small(seed, norm=True) for seed in (5, 6)])
    other.load_state_dict(together.state_dict())
    assert same(state(other.float()), state(together))


def test_a_replica_is_a_copy():
    models = [small(seed) for seed in range(2)]
    together = Replicas(models)
    with torch.no_grad():
        models[0][0].weight.zero_()
        together.replica(1)[0].weight.zero_()
    assert together(torch.ones(2, 5, 7, dtype=torch.float64)).abs().min() > 0
    assert len(list(together.parameters())) == 4


def test_replicas_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="expected at least one model, found none"):
        Replicas([])
    with pytest.raises(ValueError, match="model 1 differs from model 0"):
        Replicas([small(0), small(1, norm=True)])
    with pytest.raises(ValueError, match="model 1 differs from model 0"):
        Replicas([small(0), small(1).eval()])
    together = Replicas([small(0), small(1)])
    with pytest.raises(ValueError, match=r"expected inputs \[2, ...\], found \[5, 7\]"):
        together(torch.zeros(5, 7, dtype=torch.float64))
    with pytest.raises(TypeError, match="models that take tensors; a Ranker takes a B"):
        Replicas([model(0), model(1)])(TRAIN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_fit_on_cuda(precision, tmp_path):
    here, there = model(dropout=0.0), model(dropout=0.0)
    before = torch.cuda.get_rng_state()
    options = {"epochs": 2, "precision": precision, **QUIET}
    expected = fit(here, TRAIN, VALID, **options)
    found = fit(
        there, TRAIN, VALID, device="cuda", checkpoint=tmp_path / "run.pt", **options
    )
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    np.testing.assert_allclose(expected["loss"], found["loss"], atol=0.02)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert len(predict(there, VALID)) == 150


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_at(sys.argv[1])
    long_run(Path(sys.argv[2]))


def test_a_task_of_weight_0_neither_trains_nor_ends_a_run():
    tasks = (Task("click"), Task("dwell_time", "regression", weight=0.0))
    losses = torch.tensor([1.0, float("inf")], requires_grad=True)
    joint = weighted_sum(losses, tasks)
    joint.backward()
    assert joint.item() == 1
    assert losses.grad.tolist() == [1, 0]
    training.check_finite(tasks, losses.detach().unsqueeze(0), "")
    with pytest.raises(FloatingPointError, match="'click'"):
        training.check_finite(tasks, losses.detach().flip(0).unsqueeze(0), "{}")
