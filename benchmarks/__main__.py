"""SharedBottom through `fit` against a hand-written loop over raw tensors.

    python -m benchmarks [--repeats 9] [--threads 2]

prints one JSON line a case. Both variants train the same network on the same rows with
the same optimizer, and are first checked to give the same gradients in double
precision. They take turns, so that a disturbance meets both. `ratio` is the median time
of `fit` over the median time of the loop.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time

import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch import nn

import mtl_annotated as mtl

ROWS = 32_561
# The shape of the Adult data: 8 columns of ids and 5 of numbers.
VOCABULARIES = {
    "workclass": 9,
    "education": 16,
    "education_num": 16,
    "occupation": 15,
    "relationship": 6,
    "race": 5,
    "sex": 2,
    "native_country": 42,
}
DENSE = ("age", "fnlwgt", "capital_gain", "capital_loss", "hours_per_week")
TASKS = ("income", "never_married")
WIDTH, BOTTOM, TOWER = 16, (128, 128), (64, 32)
BUSY = 20.0


class HandWritten(nn.Module):
    """The same network with nothing around it: one table, layers, logits."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tables, WIDTH)
        inputs = len(VOCABULARIES) * WIDTH + len(DENSE)
        self.bottom = self.stack(inputs, *BOTTOM)
        self.towers = nn.ModuleList(
            nn.Sequential(*self.stack(BOTTOM[-1], *TOWER), nn.Linear(TOWER[-1], 1))
            for _ in TASKS
        )

    @staticmethod
    def stack(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers)

    def loss(self, ids, dense, labels):
        features = torch.cat([self.table(ids).flatten(1), dense], dim=1)
        hidden = self.bottom(features)
        logits = torch.cat([tower(hidden) for tower in self.towers], dim=1)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return loss.mean(0).sum()


def train_by_hand(model, ids, dense, labels, batch_size):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    order = torch.randperm(len(ids))
    model.train()
    for start in range(0, len(ids), batch_size):
        batch = order[start : start + batch_size]
        optimizer.zero_grad()
        model.loss(ids[batch], dense[batch], labels[batch]).backward()
        optimizer.step()


def synthetic_rows() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    columns = {
        # Every id occurs, so that the vocabularies have the sizes asked for.
        name: generator.permutation(np.arange(ROWS) % size)
        for name, size in VOCABULARIES.items()
    }
    columns |= {name: generator.normal(size=ROWS) for name in DENSE}
    columns |= {name: generator.integers(0, 2, ROWS) for name in TASKS}
    return pd.DataFrame(columns)


def offset_ids(encoder, batch):
    sizes = [encoder.tables[name].rows for name in VOCABULARIES]
    starts = np.cumsum([0, *sizes[:-1]])
    return batch.ids + torch.as_tensor(starts), sum(sizes)


def check_equal(encoder, batch) -> None:
    """Copy the weights over; loss and gradients must agree."""
    batch = batch[torch.arange(101)].to(dtype=torch.float64)
    ours = mtl.SharedBottom(encoder, bottom_units=BOTTOM, tower_units=TOWER).double()
    ids, tables = offset_ids(encoder, batch)
    hand = HandWritten(tables).double()
    with torch.no_grad():
        for target, source in zip(hand.parameters(), ours.parameters(), strict=True):
            target.copy_(source)
    ours.loss(batch).backward()
    hand.loss(ids, batch.dense, batch.labels).backward()
    for target, source in zip(hand.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(target.grad, source.grad, rtol=0, atol=1e-10)


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def case(encoder, batch, batch_size: int, repeats: int) -> dict:
    ids, tables = offset_ids(encoder, batch)
    ours = mtl.SharedBottom(encoder, bottom_units=BOTTOM, tower_units=TOWER)
    hand = HandWritten(tables)

    def through_fit():
        mtl.fit(
            ours,
            batch,
            epochs=1,
            batch_size=batch_size,
            train_metrics=False,
            progress=False,
        )

    def through_loop():
        train_by_hand(hand, ids, batch.dense, batch.labels, batch_size)

    through_fit(), through_loop()
    seconds: dict[str, list[float]] = {"fit": [], "loop": []}
    for repeat in range(repeats):
        turns = [("fit", through_fit), ("loop", through_loop)]
        for name, run in turns if repeat % 2 else reversed(turns):
            seconds[name].append(timed(run))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {
        name: round((max(times) - min(times)) / median[name], 3)
        for name, times in seconds.items()
    }
    return {
        "case": "SharedBottom",
        "batch_size": batch_size,
        "fit_rows_per_second": round(ROWS / median["fit"]),
        "loop_rows_per_second": round(ROWS / median["loop"]),
        "ratio": round(median["fit"] / median["loop"], 3),
        "spread": spread,
        "repeats": repeats,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = psutil.cpu_percent(interval=2)
    machine = {
        "threads": arguments.threads,
        "cores": os.cpu_count(),
        "load_of_others_percent": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    rows = synthetic_rows()
    columns = [mtl.Sparse(name, width=WIDTH) for name in VOCABULARIES]
    columns += [mtl.Dense(name) for name in DENSE]
    encoder = mtl.Encoder(columns, [mtl.Task(name) for name in TASKS]).fit(rows)
    batch = encoder.transform(rows)
    check_equal(encoder, batch)
    for batch_size in (256, 4096):
        result = case(encoder, batch, batch_size, arguments.repeats)
        print(json.dumps(result | machine), flush=True)
    if load > BUSY:
        print(
            f"other work used {load} % of the machine: no conclusion", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
