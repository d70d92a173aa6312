"""Worker processes that take turns, and what the rest of the machine does meanwhile."""

from __future__ import annotations

import json
import math
import os
import queue
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WORKERS = Path(__file__).parent / "workers"
BUSY = 20.0
SHORTEST_READING = 0.3
# A run lasts about this long at least, in seconds: as many passes as that takes.
RUN = 1.0
# A competitor is steady where the middle half of its rates is closer than this share of
# their median. Who is not gets up to so many times the rounds that were asked for.
STEADY, MOST = 0.15, 3


class WorkerError(RuntimeError):
    """A library that could not do what it was asked; the message says what it said."""


class Worker:
    """One library in a process of its own, which answers one request at a time.

    It is started in `folder`, where the library may leave files, and never uses more
    than `threads` threads in its matrix products.
    """

    def __init__(
        self,
        script: Path,
        python: str,
        arrays: Path,
        threads: int,
        folder: Path,
        environment: dict[str, str] | None = None,
        timeout: float = 1800.0,
    ) -> None:
        self.name, self.timeout = script.stem, timeout
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        reading, writing = os.pipe()
        self.process = subprocess.Popen[str](
            [python, str(script), str(arrays), str(threads), str(writing)],
            stdin=subprocess.PIPE,
            stdout=self.said,
            stderr=self.said,
            pass_fds=[writing],
            text=True,
            cwd=folder,
            env={**os.environ, **dict.fromkeys(limits, str(threads))}
            | (environment or {}),
        )
        os.close(writing)
        assert self.process.stdin is not None
        self.requests = self.process.stdin
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, args=[reading], daemon=True).start()

    def listen(self, descriptor: int) -> None:
        """Pass the worker's lines on; an empty one means that it has ended."""
        with os.fdopen(descriptor, encoding="utf-8") as lines:
            for line in lines:
                self.answers.put(line)
        self.answers.put("")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """What the worker answers. Raises: WorkerError."""
        try:
            with suppress(BrokenPipeError):
                self.requests.write(json.dumps({"do": do, **request}) + "\n")
                self.requests.flush()
            line = self.answers.get(timeout=self.timeout)
            if not line:
                # For whoever asks next: it has ended for good.
                self.answers.put("")
            found = json.loads(line) if line else {"error": "the process ended"}
        except queue.Empty:
            found = {"error": f"no answer within {self.timeout:.0f} s"}
        if "error" in found:
            raise WorkerError(f"{self.name}, {do}: {found['error']}{self.last_words()}")
        return found

    def last_words(self, lines: int = 8) -> str:
        """The end of what it printed."""
        self.said.seek(0)
        said = self.said.read().splitlines()[-lines:]
        return "".join(f"\n    {line}" for line in said)

    def close(self) -> None:
        """Tell it to stop, wait, and end it if it does not."""
        with suppress(BrokenPipeError, OSError):
            self.requests.write('{"do": "stop"}\n')
            self.requests.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def processor_seconds(process: psutil.Process) -> float:
    """What a process and its descendants have used, those that ended included."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0)
            total += getattr(times, "children_system", 0.0)
    return total


def machine_seconds() -> float:
    """What all processes on the machine have used."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts a guest's time once more under user.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - idle - guests


class Load:
    """How much of the machine's processors others use, in percent."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start()

    def start(self) -> None:
        """Begin a reading."""
        self.at = time.perf_counter()
        self.own = processor_seconds(self.process)
        self.all = machine_seconds()

    def read(self) -> float | None:
        """Of others since `start`; None where too little time has gone by to tell."""
        seconds = time.perf_counter() - self.at
        if seconds < SHORTEST_READING:
            return None
        others = machine_seconds() - self.all
        others -= processor_seconds(self.process) - self.own
        return max(0.0, 100 * others / (seconds * (os.cpu_count() or 1)))

    def idle(self, seconds: float = 1.0) -> float:
        """A reading while this command does nothing."""
        self.start()
        time.sleep(seconds)
        return self.read() or 0.0


@dataclass
class Turn:
    """One competitor of a case: its name, and what it does when its turn comes.

    `run` is told how many passes it should make. One that raises has its `error` kept
    and gets no further turn.
    """

    name: str
    run: Callable[[int], dict[str, float]]
    passes: int = 1
    peak_mib: float = 0.0
    answers: list[dict[str, float]] = field(default_factory=list)
    error: Exception | None = None

    def take(self) -> None:
        """One run."""
        if self.error is not None:
            return
        try:
            self.answers.append(self.run(self.passes))
        # Whatever a library raises: the others go on, and the line says what it was.
        except Exception as error:
            self.error = error

    def warm_up(self, seconds: float = RUN) -> None:
        """A whole pass that is not timed, and one by which a run's passes are chosen.

        The first has all shapes of batches in it, the last batch's too: what a library
        compiles is compiled then. The peak of memory is taken here, before anything
        else has run in the process.
        """
        self.take()
        self.take()
        if self.error is None:
            self.passes = max(1, math.ceil(seconds / self.answers[-1]["seconds"]))
            self.peak_mib = self.answers[-1]["peak_mib"]
        self.answers.clear()

    def rates(self) -> list[float]:
        """Rows a second, run by run."""
        return [answer["rows"] / answer["seconds"] for answer in self.answers]

    def middle_half(self) -> float:
        """The distance of the quartiles of the rates, as a share of their median."""
        rates = self.rates()
        if len(rates) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
        return (high - low) / middle

    def steady(self) -> bool:
        """Whether its runs agree well enough to conclude from them."""
        return self.error is None and self.middle_half() <= STEADY

    def measures(self) -> dict[str, Any]:
        """Medians over the runs, and how far these are from each other."""
        rates = self.rates()
        middle = statistics.median(rates)
        processor = [answer["cpu_seconds"] for answer in self.answers]
        return {
            "rows_per_second": round(middle),
            "spread": round((max(rates) - min(rates)) / middle, 3),
            "middle_half": round(self.middle_half(), 3),
            "rates": ";".join(f"{rate:.0f}" for rate in rates),
            "runs": len(rates),
            "passes": self.passes,
            "cpu_seconds": round(statistics.median(processor) / self.passes, 3),
            "peak_mib": round(self.peak_mib, 1),
        }


def interleave(turns: Sequence[Turn], repeats: int, load: Load) -> list[float]:
    """Let all run `repeats` times, in turn; the load of others, round by round.

    The first round is in the order given. Then the order is turned round and shifted,
    so that nobody always runs after the same one. Those that are not steady then go on,
    up to `MOST` times as many rounds.
    """
    readings = []
    for number in range(MOST * repeats):
        going = [
            turn
            for turn in turns
            if turn.error is None and (number < repeats or not turn.steady())
        ]
        if not going:
            break
        shift = number % len(going)
        order = [*going[shift:], *going[:shift]]
        load.start()
        for turn in reversed(order) if number % 2 else order:
            turn.take()
        if (reading := load.read()) is not None:
            readings.append(reading)
    return readings
