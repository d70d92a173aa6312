"""Training cost and memory against the size of the vocabulary.

One column of N ids stands beside seven small ones, all of width 16, in a shared bottom
with two tasks that is trained through `fit`. Ids are drawn evenly ("uniform", the worst
case: no id is at hand in a cache) or by Zipf's law. Variants: `fit` is `fit` as it is,
`by_row` updates tables of any size by row, `dense` none (fused Adam), and `sparse_adam`
is torch's `SparseAdam` for the tables beside fused Adam for the rest. They take turns.

Memory is the peak of a fresh process for each case, less what it held before the model
was made; `held_mb` is what tables and the state of their rows need. It is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

import mtl_annotated as mtl
from benchmarks.store import Line
from benchmarks.suites import Command, compare
from benchmarks.turns import Turn
from benchmarks.workers.protocol import cpu_seconds, peak_mib
from mtl_annotated.big_tables import BIG_TABLE, by_row

WIDTH, SMALL = 16, 7
VOCABULARIES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCH_SIZES = (256, 4096)
TASKS = ("click", "purchase")
BOTTOM, TOWER = (128, 128), (64, 32)
DRAWS = ("uniform", "zipf")
VARIANTS = ("fit", "by_row", "dense", "sparse_adam")
# Numbers of state for each weight.
STATE = {"fit": 2, "dense": 2, "sparse_adam": 2, "row_adagrad": 1 / WIDTH}
# Dense steps of a table this large take so long that fewer of them must do.
SLOW = 1_000_000


def encoder(vocabulary: int) -> mtl.Encoder:
    """A hashed column keeps no vocabulary, so it is made in no time at any size."""
    columns = [mtl.Sparse("big", width=WIDTH, buckets=vocabulary)]
    columns += [mtl.Sparse(f"small{k}", width=WIDTH, buckets=50) for k in range(SMALL)]
    names = [column.name for column in columns]
    rows = pd.DataFrame({name: [0, 1] for name in (*names, *TASKS)})
    return mtl.Encoder(columns, [mtl.Task(name) for name in TASKS]).fit(rows)


def log_of(vocabulary: int, rows: int, draw: str = "uniform") -> mtl.Batch:
    """Rows for the encoder of that vocabulary; the labels are coins."""
    generator = np.random.default_rng(0)
    part = generator.random((rows, 1))
    big = part * vocabulary if draw == "uniform" else vocabulary**part - 1
    small = generator.integers(1, 51, (rows, SMALL))
    ids = np.hstack([big.astype(np.int64) + 1, small])
    # Ids by rank would lie side by side; in a real table the popular ones do not.
    ids[:, 0] = ids[:, 0] * 7_368_787 % vocabulary + 1
    labels = generator.integers(0, 2, (rows, len(TASKS)))
    return mtl.Batch(
        ids=torch.from_numpy(ids),
        dense=torch.zeros(rows, 0),
        labels=torch.from_numpy(labels).float(),
        encoder=encoder(vocabulary).fingerprint,
    )


class Both(torch.optim.Optimizer):
    """SparseAdam for tables and fused Adam for the rest, as one optimizer."""

    def __init__(self, parameters: list, tables: list) -> None:
        known = {id(table) for table in tables}
        rest = [each for each in parameters if id(each) not in known]
        super().__init__(parameters, {})
        self.parts = (
            torch.optim.SparseAdam(tables, lr=1e-3),
            torch.optim.Adam(rest, lr=1e-3, fused=True),
        )
        self.param_groups[0]["lr"] = 1e-3

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def model_of(vocabulary: int) -> mtl.SharedBottom:
    torch.manual_seed(0)
    return mtl.SharedBottom(encoder(vocabulary), bottom_units=BOTTOM, tower_units=TOWER)


def train(model: mtl.SharedBottom, rows: mtl.Batch, variant: str, size: int) -> None:
    """One epoch through `fit`."""
    embedding = model.embedding
    tables = list(embedding.parameters())
    options: dict[str, Any] = {"epochs": 1, "batch_size": size, "progress": False}
    options |= {"train_metrics": False}
    if variant == "fit":
        mtl.fit(model, rows, **options)
    elif variant == "by_row":
        mtl.fit(model, rows, **options, big_table=0)
    elif variant == "row_adagrad":
        mtl.fit(model, rows, **options, optimizer="adagrad", big_table=0)
    elif variant == "dense":
        mtl.fit(model, rows, **options, big_table=None)
    else:
        with by_row(embedding, [WIDTH]):
            mtl.fit(model, rows, **options, optimizer=lambda p: Both(p, tables))


def seconds_of(
    model: mtl.SharedBottom, rows: mtl.Batch, variant: str, size: int
) -> float:
    start = time.perf_counter()
    train(model, rows, variant, size)
    return time.perf_counter() - start


def steps_of(variant: str, vocabulary: int, size: int) -> int:
    """Enough steps for about a second; a slow one has ten after the first."""
    if variant == "dense" and vocabulary >= SLOW:
        return 1 + max(10, 20 * SLOW // vocabulary)
    return 800 if size <= 256 else 100


def after_the_first(
    model: mtl.SharedBottom, rows: mtl.Batch, variant: str, size: int, _: int
) -> dict[str, float]:
    """A run, less a first step.

    That one makes the state of the optimizer, which is as large as the tables; what it
    takes is `start_seconds`, and is paid once for a training, however long.
    """
    first = seconds_of(model, rows[torch.arange(size)], variant, size)
    cpu = cpu_seconds()
    seconds = seconds_of(model, rows, variant, size)
    return {
        "rows": len(rows) - size,
        "seconds": seconds - first,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_mib": peak_mib(),
        "start_seconds": first,
    }


def variants_at(vocabulary: int) -> Sequence[str]:
    """Above a size `fit` updates by row by itself."""
    return [v for v in VARIANTS if v != "by_row" or vocabulary <= BIG_TABLE]


def speeds(command: Command, case: Line) -> None:
    """Rows a second of the variants, which take turns."""
    vocabulary, size, draw = case["vocabulary"], case["batch_size"], case["ids"]
    lines = {v: {**case, "variant": v} for v in variants_at(vocabulary)}
    if not command.any_wanted(lines.values()):
        return
    turns = []
    for variant in lines:
        rows = log_of(vocabulary, size * steps_of(variant, vocabulary, size), draw)
        model = model_of(vocabulary)
        turn = Turn(variant, partial(after_the_first, model, rows, variant, size))
        # Once is enough to be warm: nothing is compiled, and the steps were chosen.
        turn.take()
        turn.answers.clear()
        turns.append(turn)
    found = compare(command, lines, turns)
    for turn in turns:
        if turn.name in found:
            starts = [answer["start_seconds"] for answer in turn.answers]
            first = {"start_seconds": round(statistics.median(starts), 3)}
            command.put({**found[turn.name], **first})


def peak_of(variant: str, vocabulary: int, size: int) -> dict[str, Any]:
    """The peak of this process while a model is made and trained, in megabytes."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    small = model_of(1_000)
    train(small, log_of(1_000, 2 * size), variant, size)
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = model_of(vocabulary)
    train(model, log_of(vocabulary, 5 * size), variant, size)
    done.set()
    watcher.join()
    weights = sum(table.numel() for table in model.embedding.parameters())
    held = weights * 4 * (1 + STATE[variant])
    return {
        "peak_mb": round((peak - before) / 1e6, 1),
        "held_mb": round(held / 1e6, 1),
        "ratio": round((peak - before) / held, 3),
    }


def memory(variant: str, vocabulary: int, size: int) -> dict[str, Any]:
    """`peak_of` in a fresh process."""
    arguments = ["--peak", variant, str(vocabulary), str(size)]
    command = [sys.executable, "-m", "benchmarks.vocabulary", *arguments]
    threads = ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command + threads, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run(
    command: Command,
    vocabularies: Sequence[int] = VOCABULARIES,
    measured: Sequence[int] = (SLOW, 10 * SLOW),
) -> None:
    """The suite `vocabulary`: speeds, then peaks of memory.

    Of these only large ones are `measured`: below them other memory hides the tables.
    """
    sizes = command.batch_sizes
    for size in sizes:
        for draw in DRAWS:
            for vocabulary in vocabularies:
                case = {"suite": "vocabulary", "case": "vocabulary", "ids": draw}
                case |= {"vocabulary": vocabulary, "batch_size": size}
                speeds(command, case)
    for variant in STATE:
        for vocabulary in measured:
            line = {"suite": "vocabulary", "case": "vocabulary memory"}
            line |= {"variant": variant, "vocabulary": vocabulary}
            line |= {"batch_size": sizes[0], **command.made_with(), "repeats": None}
            if command.wanted(line):
                command.put(line | memory(variant, vocabulary, sizes[0]))


def main() -> None:
    """The fresh process of `memory`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=3, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    variant, vocabulary, size = arguments.peak
    print(json.dumps(peak_of(variant, int(vocabulary), int(size))))


if __name__ == "__main__":
    main()
