"""What a training step spends its time on, by kind of work, as PyTorch's profiler sees it.

A line a model, batch size and kind: microseconds and calls of a step of `mtl.fit`, each
operator's own time. The profiler costs time at every call, so many small calls look
worse here than they are. What is left of the same step's time without the profiler, the
median over the rounds, is time outside of operators: Python, autograd's engine, and the
way from one call to the next. It is at least what the line says, because the operators'
times are a little too long. A product that adds a bias counts as a product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mtl_annotated as mtl
from benchmarks.networks import build
from benchmarks.store import Line
from benchmarks.suites import Command, compare, here

STEPS = {256: 60, 4096: 7}
# Times the profiler looks; the time of the fastest counts.
LOOKS = 3
COPIES, TABLES = "copies", "rows of the tables"
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "activations": ("relu", "clamp_min", "threshold_backward", "clamp"),
    "softmax of the gates": ("_softmax", "_softmax_backward_data"),
    # Those of experts, which are selected too, are moved to the copies.
    TABLES: ("index_select", "index_add_", "embedding", "embedding_dense_backward"),
    "sums for the biases": ("sum",),
    COPIES: ("copy_", "cat", "clone", "index", "stack", "contiguous"),
    "Adam": ("_fused_adam_", "_foreach_add_"),
}
OTHER, OUTSIDE = "other operators", "outside of operators"
NAMES = (*KINDS, OTHER, OUTSIDE)


def kind_of(name: str) -> str:
    """The kind of work that an operator of PyTorch does."""
    bare = name.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if bare in names), OTHER)


def spent(events: Iterable[Any], steps: int) -> dict[str, tuple[float, float]]:
    """For each kind of operator, microseconds and calls of a step."""
    found = dict.fromkeys([*KINDS, OTHER], (0.0, 0.0))
    for event in events:
        if event.key.startswith("aten::"):
            kind = kind_of(event.key)
            time, calls = found[kind]
            time += event.self_cpu_time_total / steps
            found[kind] = time, calls + event.count / steps
    return found


def without_experts(
    found: dict[str, tuple[float, float]],
    events: Iterable[Any],
    tables: Collection[torch.Size],
    steps: int,
) -> dict[str, tuple[float, float]]:
    """Rows of tables alone, told by the shape of the first input; the rest are copies."""
    selected = [event for event in events if kind_of(event.key) == TABLES]
    of_tables = [
        event
        for event in selected
        if event.input_shapes and torch.Size(event.input_shapes[0]) in tables
    ]
    times = [
        sum(event.self_cpu_time_total for event in part)
        for part in (of_tables, selected)
    ]
    time, calls = found[TABLES]
    own = time * times[0] / times[1], sum(e.count for e in of_tables) / steps
    copies = found[COPIES][0] + time - own[0], found[COPIES][1] + calls - own[1]
    return {**found, TABLES: own, COPIES: copies}


def events_of(work: Callable[[], object], *, shapes: bool = False) -> Iterable[Any]:
    """What the profiler saw, by operator; with shapes it costs more."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as seen:
        work()
    return seen.key_averages(group_by_input_shape=shapes)


def time_of(found: dict[str, tuple[float, float]]) -> float:
    """Microseconds inside of operators."""
    return sum(time for time, _ in found.values())


def train(model: mtl.Ranker, rows: mtl.Batch, batch_size: int) -> int:
    """An epoch; the rows done."""
    size = {"epochs": 1, "batch_size": batch_size}
    mtl.fit(model, rows, **size, train_metrics=False, progress=False)
    return len(rows)


def run(command: Command) -> None:
    """The suite `profile`."""
    for model in command.models:
        for batch_size in command.batch_sizes:
            case = {"suite": "profile", "model": model, "batch_size": batch_size}
            if command.any_wanted(case | {"case": kind} for kind in NAMES):
                measure(command, case)


def measure(command: Command, case: Line) -> None:
    """Time the steps of a model without the profiler, then look at them with it."""
    name, batch_size = case["model"], case["batch_size"]
    rows = command.rows[name == "ESMM"]
    steps = max(1, min(STEPS.get(batch_size, 7), len(rows.train) // batch_size))
    model, few = build(name, rows.encoder), rows.train[: steps * batch_size]
    work = partial(train, model, few, batch_size)
    turn = here(name, work)
    turn.warm_up()
    timed = compare(command, {name: case}, [turn])
    if name not in timed:
        return
    line = timed[name]
    line["step_microseconds"] = round(
        1e6 * len(few) / steps / line["rows_per_second"], 1
    )
    looks = [spent(events_of(work), steps) for _ in range(LOOKS)]
    tables = [weight.shape for weight in model.embedding.weights.values()]
    shaped = events_of(work, shapes=True)
    found = without_experts(min(looks, key=time_of), shaped, tables, steps)
    found[OUTSIDE] = max(0.0, line["step_microseconds"] - time_of(found)), 0.0
    for kind, (time, calls) in found.items():
        spent_on = {"microseconds": round(time, 1), "calls": round(calls, 1)}
        command.put({**line, "case": kind, **spent_on})
