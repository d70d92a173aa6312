"""Time this project's models, the libraries that are installed, and the floor.

    python -m benchmarks                                  train and predict
    python -m benchmarks auc --python OTHER/bin/python    with peers from elsewhere

prints one line of JSON a case; `benchmarks/README.md` says what is measured, how the
peers get into their own environments and where their work differs. Nothing is installed
or downloaded. The models of `train`, `predict` and `growth` are compared with a plain
loop in double precision before they are timed. All competitors of a case take turns in
the same minutes. The exit status is 3 where other work kept the machine too busy to
conclude, or where the runs of a competitor did not agree, and 1 where a library failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    details,
    encoding,
    growth,
    peers,
    profile,
    replicas,
    suites,
    tricks,
    vocabulary,
)
from benchmarks.networks import SIZES
from benchmarks.store import Store
from benchmarks.suites import Command, own_competitors
from benchmarks.turns import BUSY

SUITES: dict[str, tuple[str, Callable[[Command], None]]] = {
    "train": (
        "rows a second of whole epochs, beside the floor",
        lambda command: suites.speed(command, "train"),
    ),
    "predict": (
        "rows a second of scoring all rows",
        lambda command: suites.speed(command, "predict"),
    ),
    "auc": ("test AUC after five epochs, three seeds", suites.auc),
    "tricks": ("MMoE from loader and loops to the package, step by step", tricks.run),
    "profile": ("what a training step spends its time on", profile.run),
    "growth": ("experts, tasks and batch, ours beside the floor", growth.run),
    "replicas": ("50 small models at once and one after another", replicas.run),
    "details": ("rows of tables, and how many rows of a batch at once", details.run),
    "encoding": ("Encoder.transform", encoding.run),
    "vocabulary": ("one large embedding table", vocabulary.run),
}
DEFAULT = ("train", "predict")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text!r}")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:11} {what}" for name, (what, _) in SUITES.items())
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\nsuites:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"default: {' '.join(DEFAULT)}")
    add(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="an interpreter in which peers are installed, beside the one that runs"
        " this; may be given several times",
    )
    add("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    add(
        "--batch-sizes",
        nargs="+",
        type=positive,
        metavar="N",
        default=list(Command.batch_sizes),
        help="default 256 4096",
    )
    add(
        "--repeats",
        type=positive,
        default=5,
        help="runs of each, default 5; up to three times as many if they do not agree",
    )
    add("--threads", type=positive, default=2, help="at most, default 2")
    add("--seeds", type=positive, default=3, help="of the suite auc, default 3")
    add(
        "--libraries",
        nargs="+",
        metavar="NAME",
        choices=[*(each.name for each in own_competitors()), *peers.SCRIPTS],
        help="only these, as far as they are found; default: all",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help=".csv or .jsonl; cases that are in it are not run again, unless they were"
        " not conclusive, or were measured with other versions, code or options",
    )
    add("--again", action="store_true", help="run cases that are in the file too")
    add(
        "--busy",
        type=float,
        default=BUSY,
        metavar="PERCENT",
        help=f"share of the machine that others may use, default {BUSY:.0f}",
    )
    add("--limit", type=positive, metavar="ROWS", help="fewer rows, to try things out")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; the exit status."""
    parse = parser()
    given = parse.parse_args(arguments)
    wanted = given.suites or DEFAULT
    for suite in wanted:
        if suite not in SUITES:
            parse.error(f"unknown suite {suite!r}, choose from {', '.join(SUITES)}")
    try:
        interpreters = [sys.executable, *given.python]
        found = [*own_competitors(), *peers.find(interpreters, given.threads)]
        store = Store(given.out)
    except ValueError as error:
        parse.error(str(error))
    if given.libraries:
        found = [each for each in found if each.name in given.libraries]
        if not found:
            parse.error(
                f"--libraries: none of {', '.join(given.libraries)} is installed here;"
                " --python names an interpreter that has it"
            )
    print("found: " + ", ".join(each.name for each in found), file=sys.stderr)
    if others := peers.other_torch(found):
        print(
            f"not the same PyTorch as here, {peers.OURS.versions['torch']}:"
            f" {', '.join(others)}",
            file=sys.stderr,
        )
    torch.set_num_threads(given.threads)
    command = Command(
        competitors=found,
        models=given.models,
        batch_sizes=given.batch_sizes,
        repeats=given.repeats,
        threads=given.threads,
        seeds=given.seeds,
        limit=given.limit,
        busy=given.busy,
        again=given.again,
        store=store,
        show=lambda line: print(line, flush=True),
    )
    for suite in wanted:
        SUITES[suite][1](command)
    return exit_status(command)


def exit_status(command: Command) -> int:
    """3 where a line is not conclusive, 1 where a library failed, else 0."""
    if command.inconclusive:
        print(
            f"{command.inconclusive} lines are not conclusive: why_not says whether"
            f" others used more than {command.busy:.0f} % of the machine, or the runs"
            " did not agree; run the same command again when it is quiet",
            file=sys.stderr,
        )
        return 3
    return 1 if command.failures else 0


if __name__ == "__main__":
    sys.exit(main())
