"""`Encoder.transform` against the recipe of one `LabelEncoder` for each column.

A line a case, each for a tenth of a million rows and for all of them. Both sides have
learned from the same training rows and encode rows whose values all occur there,
since a LabelEncoder refuses any other. They are first checked to give the same ids up to
renumbering, the same scaled numbers and the same labels, and then take turns.

What an encoder computes once and keeps, its fingerprint and its indexes, is there before
the clock starts, as is the fitting on both sides. Memory is measured in processes of
their own, beyond what the process held before: `peak_over_output` by tracemalloc, to
which NumPy and pandas report every allocation, and `rss_over_output` from outside, as the
growth of the resident memory, sampled every 2 ms.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from sklearn.preprocessing import LabelEncoder, MinMaxScaler

import mtl_annotated as mtl
from benchmarks.store import Line
from benchmarks.suites import Command, here
from benchmarks.turns import Turn

INTEGERS = (2, 7, 24, 100, 1_000, 5_000, 20_000, 100_000, 300_000, 1_000_000)
STRINGS: tuple[tuple[int, Any], ...] = (
    (5, object),
    (5, "str"),
    (5, "category"),
    (50, "str"),
    (500, object),
    (2_000, "category"),
    (10_000, "str"),
    (50_000, object),
    (100_000, "str"),
    (100_000, object),
)
IDS = [
    *(f"integer_{place}" for place in range(len(INTEGERS))),
    *(f"string_{place}" for place in range(len(STRINGS))),
]
DENSE = [f"number_{place}" for place in range(8)]
LABELS = ["click", "purchase"]
LENGTH = 20
ITEMS = 50_000
ROWS = 1_000_000


def skewed(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Numbers below `size`, the small ones far more often than the large."""
    return (rng.random(rows) ** 3 * size).astype(np.int64)


def table(rows: int) -> pd.DataFrame:
    """20 columns of ids, 8 of numbers and 2 of labels.

    Equal in every call, but with string objects of its own, as rows have that are read
    on another day. Equal strings within a table are one object, as readers of files
    make them.
    """
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for place, size in enumerate(INTEGERS):
        values = 17 + 3 * rng.permutation(size)
        columns[f"integer_{place}"] = values[skewed(rng, rows, size)]
    for place, (size, dtype) in enumerate(STRINGS):
        texts = np.array([f"{place}-{n}" for n in rng.permutation(size)], dtype=object)
        cells = texts[skewed(rng, rows, size)]
        columns[f"string_{place}"] = pd.Series(cells, dtype=dtype)
    columns |= {name: rng.normal(size=rows) for name in DENSE}
    columns |= {name: rng.integers(0, 2, rows) for name in LABELS}
    return pd.DataFrame(columns)


def lists(rows: int) -> pd.DataFrame:
    """One column of lists of up to 20 integers, 10 on average."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, LENGTH + 1, rows)
    flat = skewed(rng, int(counts.sum()), ITEMS)
    cells = [part.tolist() for part in np.split(flat, np.cumsum(counts)[:-1])]
    return pd.DataFrame({"history": pd.Series(cells, dtype=object)})


def our_encoder(rows: pd.DataFrame) -> mtl.Encoder:
    columns: list[Any] = [mtl.Sparse(name) for name in IDS if name in rows]
    columns += [mtl.Dense(name, scale="minmax") for name in DENSE if name in rows]
    if "history" in rows:
        columns.append(mtl.Sequence("history", length=LENGTH))
    return mtl.Encoder(columns, [mtl.Task(name) for name in LABELS]).fit(rows)


class Recipe:
    """A LabelEncoder for each column of ids, one MinMaxScaler, a dict of arrays."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.encoders = {name: LabelEncoder().fit(rows[name]) for name in IDS}
        self.scaler = MinMaxScaler().fit(rows[DENSE])

    def transform(self, rows: pd.DataFrame) -> dict[str, np.ndarray]:
        arrays = {
            name: enc.transform(rows[name]) for name, enc in self.encoders.items()
        }
        numbers = self.scaler.transform(rows[DENSE])
        arrays |= {name: numbers[:, place] for place, name in enumerate(DENSE)}
        return arrays | {name: rows[name].to_numpy() for name in LABELS}


def size_of(output: Any) -> int:
    """The bytes of the tensors of a batch, or of a dict of arrays."""
    if isinstance(output, dict):
        return sum(array.nbytes for array in output.values())
    return sum(t.nbytes for t in (output.ids, output.dense, output.labels))


def check_equal(batch: mtl.Batch, arrays: dict[str, np.ndarray]) -> None:
    """Refuse to time two sides that disagree."""
    for place, name in enumerate(IDS):
        ours, theirs = batch.ids[:, place].numpy(), arrays[name].astype(np.int64)
        pairs = len(pd.unique(ours * (theirs.max() + 1) + theirs))
        if not (ours > 0).all() or {pairs} != {
            len(pd.unique(ours)),
            len(pd.unique(theirs)),
        }:
            raise AssertionError(f"column {name!r}: the ids are not a renumbering")
    dense = np.stack([arrays[name] for name in DENSE], 1)
    np.testing.assert_array_equal(batch.dense.numpy(), dense.astype(np.float32))
    labels = np.stack([arrays[name] for name in LABELS], 1)
    np.testing.assert_array_equal(batch.labels.numpy(), labels)


def measured(who: Any, rows: pd.DataFrame) -> dict[str, float]:
    """The peak memory of `who.transform(rows)` beyond what was there before."""
    state = who.to_json() if isinstance(who, mtl.Encoder) else who
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.pickle"
        with path.open("wb") as file:
            pickle.dump((state, rows), file, pickle.HIGHEST_PROTOCOL)
        command = [sys.executable, "-m", "benchmarks.encoding", "--child", str(path)]
        traced = subprocess.run(
            [*command, "--traced"], check=True, capture_output=True, text=True
        )
        peak, output = json.loads(traced.stdout)
        grown = growth(command)
    return {"output": output, "peak": peak, "rss": grown}


def growth(command: list[str]) -> int:
    """How far the resident memory of a child grows while it works, in bytes."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError("the measuring process has failed")
        memory = psutil.Process(child.pid).memory_info
        before = peak = memory().rss
        waiting = threading.Thread(target=child.stdout.readline)
        waiting.start()
        print(file=child.stdin, flush=True)
        while waiting.is_alive():
            peak = max(peak, memory().rss)
            waiting.join(0.002)
        child.communicate("\n")
    return peak - before


def be_measured(path: Path, traced: bool) -> None:
    """The child's side of `measured`."""
    with path.open("rb") as file:
        who, rows = pickle.load(file)
    if isinstance(who, str):
        who = mtl.Encoder.from_json(who)
    who.transform(rows[:1000])
    if traced:
        tracemalloc.start()
        output = who.transform(rows)
        print(json.dumps([tracemalloc.get_traced_memory()[1], size_of(output)]))
        return
    print("ready", flush=True)
    sys.stdin.readline()
    output = who.transform(rows)
    print("done", len(output), flush=True)
    sys.stdin.readline()


def columns_case(command: Command, line: Line) -> None:
    """30 columns: time and memory of both sides."""
    rows = line["size"]
    training, served = table(rows), table(rows)
    encoder, recipe = our_encoder(training), Recipe(training)
    check_equal(encoder.transform(served), recipe.transform(served))
    ours = here("ours", lambda: len(encoder.transform(served)))
    theirs = here("recipe", lambda: len(recipe.transform(served)[LABELS[0]]))
    found = compete(command, line, [ours, theirs])
    if found is None:
        return
    seconds = seconds_of(theirs)
    command.put(
        {
            **found,
            "columns": served.shape[1],
            "recipe_seconds": round(seconds, 4),
            "ratio": round(seconds / seconds_of(ours), 2),
            "recipe_spread": theirs.measures()["spread"],
            **memory(measured(encoder, served)),
            **{
                f"recipe_{name}": value
                for name, value in memory(measured(recipe, served)).items()
            },
        }
    )


def lists_case(command: Command, line: Line) -> None:
    """One column of lists: our time and memory."""
    training, served = lists(line["size"]), lists(line["size"])
    encoder = our_encoder(training)
    ours = here("ours", lambda: len(encoder.transform(served)))
    found = compete(command, line, [ours])
    if found is not None:
        memory_of_ours = memory(measured(encoder, served))
        command.put({**found, "positions": LENGTH, **memory_of_ours})


def compete(command: Command, line: Line, turns: list[Turn]) -> Line | None:
    """Our line, after all took turns; None where a side failed, which is put."""
    for turn in turns:
        turn.warm_up()
    readings = command.compete(turns)
    for turn in turns:
        if turn.error is not None:
            command.failed(line, turn.error)
            return None
    return {
        **line,
        "rows": line["size"],
        "seconds": round(seconds_of(turns[0]), 4),
        **turns[0].measures(),
        # Both sides run in this process.
        "peak_mib": None,
        **command.verdict(readings, *turns),
    }


def seconds_of(turn: Turn) -> float:
    """The median of a pass."""
    return statistics.median(a["seconds"] for a in turn.answers) / turn.passes


def memory(found: dict[str, float]) -> dict[str, float]:
    """Peaks in MiB of the output, and as multiples of it."""
    return {
        "output_mib": round(found["output"] / 2**20, 1),
        "peak_over_output": round(found["peak"] / found["output"], 2),
        "rss_over_output": round(found["rss"] / found["output"], 2),
    }


CASES = {"Encoder.transform": columns_case, "Encoder.transform, lists": lists_case}


def run(command: Command, rows: int = ROWS) -> None:
    """The suite `encoding`: for a tenth of the rows and all, 30 columns, then lists."""
    for case, work in CASES.items():
        for size in (rows // 10, rows):
            line = {"suite": "encoding", "case": case, "size": size}
            line |= command.made_with()
            if command.wanted(line):
                work(command, line)


def main() -> None:
    """The child's process of `measured`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=Path, required=True)
    parser.add_argument("--traced", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    be_measured(arguments.child, arguments.traced)


if __name__ == "__main__":
    main()
