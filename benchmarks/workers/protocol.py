"""What every worker does: read requests from stdin, answer each with a line of JSON.

Needs the standard library and NumPy alone, because a worker runs in the environment of
the library that it times. A worker is a script that ends in

    protocol.serve(MyLibrary)

and is started as `python my_worker.py ARRAYS THREADS ANSWERS`; the last is the number
of an open file descriptor, to which the answers are written. A worker that waits for a
request uses no processor time.

    {"do": "hello", "suite"}                         settings to choose from
    {"do": "build", "model", "sizes", "setting", "batch_size", "seed"}
    {"do": "train", "epochs", "rows"}                rows null: all of them
    {"do": "predict", "passes", "rows"}              training rows, then test rows
    {"do": "scores", "file"}                         probabilities of the test rows, .npy
    {"do": "stop"}

A request may name a `slot`: a model is built into one, and stays there beside those of
other slots. `train` and `predict` answer with `rows`, `seconds`, `cpu_seconds` and `peak_mib`. A
request that failed is answered with `error`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Arrays:
    """The encoded rows, as the command saved them."""

    def __init__(self, path: str) -> None:
        with np.load(path) as saved:
            self.saved = {name: saved[name] for name in saved.files}
        self.sparse = [str(name) for name in self.saved["sparse"]]
        self.dense = [str(name) for name in self.saved["dense"]]
        self.tasks = [str(name) for name in self.saved["tasks"]]
        self.table_rows = [int(rows) for rows in self.saved["table_rows"]]
        self.width = int(self.saved["width"])

    def columns(self, *halves: str, ids: Any = np.int64) -> dict[str, np.ndarray]:
        """A contiguous array a column, of `train`, `test`, or both below each other.

        `ids` is the type of the whole numbers.
        """
        found = {}
        for kind, names in (("ids", self.sparse), ("dense", self.dense)):
            block = np.concatenate([self.saved[f"{half}_{kind}"] for half in halves])
            block = block.astype(ids) if kind == "ids" else block
            for place, name in enumerate(names):
                found[name] = np.ascontiguousarray(block[:, place])
        return found

    def labels(self, rows: int | None = None) -> np.ndarray:
        """The training rows' labels, `[rows, tasks]`."""
        return np.ascontiguousarray(self.saved["train_labels"][:rows])


class Library:
    """One library, and one model of it. A subclass fills in the methods that raise."""

    def __init__(self, arrays: Arrays, threads: int) -> None:
        self.arrays, self.threads = arrays, threads
        self.batch_size = 0

    def settings(self, suite: str) -> list[list[dict[str, Any]]]:
        """What a user would try out to make it fast, the usual setting first.

        A list a stage. The fastest of a stage stays while the next one is tried.
        """
        return []

    def build(self, model: str, sizes: dict[str, Any], setting: dict[str, Any]) -> None:
        """Make an untrained model; `self.batch_size` and `self.seed` are set."""
        raise NotImplementedError

    def ready(self) -> None:
        """Set what holds for the whole process; called before every run."""

    def train(self, epochs: int, rows: int | None) -> int:
        """Train on the first rows through the library's own loop; the rows done."""
        raise NotImplementedError

    def predict(self, halves: tuple[str, ...], rows: int | None) -> np.ndarray:
        """The two tasks' probabilities, `[rows, 2]`, by the library's own `predict`."""
        raise NotImplementedError


def cpu_seconds() -> float:
    """Of this process, all threads, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_mib() -> float:
    """The most memory that this process has held at a time."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a new process inherits that of the one it came from.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def measured(work: Callable[[], int]) -> dict[str, float]:
    """Run it, and say how many rows it did, in what time, with what memory."""
    cpu, start = cpu_seconds(), time.perf_counter()
    rows = work()
    seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_mib": peak_mib(),
    }


def answer(library: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request."""
    wanted = request["do"]
    if wanted == "hello":
        return {"settings": library.settings(request["suite"])}
    if wanted == "build":
        library.batch_size, library.seed = request["batch_size"], request["seed"]
        library.build(request["model"], request["sizes"], request["setting"])
        return {}
    library.ready()
    if wanted == "train":
        return measured(lambda: library.train(request["epochs"], request["rows"]))
    if wanted == "predict":
        both, rows = ("train", "test"), request["rows"]
        return measured(
            lambda: sum(
                len(library.predict(both, rows)) for _ in range(request["passes"])
            )
        )
    if wanted == "scores":
        np.save(request["file"], library.predict(("test",), None))
        return {}
    extra = getattr(library, f"do_{wanted}", None)
    if extra is None:
        raise ValueError(f"unknown request {wanted!r}")
    return extra(request)


def serve(library: Callable[[Arrays, int], Any]) -> None:
    """Answer until told to stop, or until stdin ends."""
    path, threads, descriptor = sys.argv[1:4]
    # Not stdout: what the library prints must not come between the answers.
    answers = os.fdopen(int(descriptor), "w")
    arrays: Arrays | None = None
    slots: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        try:
            arrays = arrays or Arrays(path)
            slot = request.get("slot", "")
            if slot not in slots:
                slots[slot] = library(arrays, int(threads))
            found = answer(slots[slot], request)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)
