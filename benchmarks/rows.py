"""The rows that every library trains on, encoded once.

Adult in its published split where its files are at hand, else random rows of the same
shape. Nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pooch import os_cache

import mtl_annotated as mtl
from mtl_annotated.datasets import ADULT, DATA_FOLDER

TRAIN_ROWS, TEST_ROWS = 32_561, 16_281
# Eight columns of ids, and how many different ones random rows have.
SPARSE = {
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
WIDTH = 16
INPUTS = len(SPARSE) * WIDTH + len(DENSE)
INCOME, MARRIAGE, FUNNEL = "income", "never_married", "income_and_never_married"


@dataclass(frozen=True)
class Rows:
    """Encoded rows and their encoder. `real` says whether an AUC means anything."""

    encoder: mtl.Encoder
    train: mtl.Batch
    test: mtl.Batch
    real: bool

    def save(self, path: Path) -> Path:
        """Write what a worker reads: arrays, and names as JSON-ready text."""
        sizes = [self.encoder.tables[name].rows for name in SPARSE]
        halves = {
            f"{half}_{part}": getattr(getattr(self, half), part).numpy()
            for half in ("train", "test")
            for part in ("ids", "dense", "labels")
        }
        np.savez(
            path,
            table_rows=np.array(sizes),
            sparse=np.array(list(SPARSE)),
            dense=np.array(DENSE),
            tasks=np.array([task.name for task in self.encoder.tasks]),
            width=np.array(WIDTH),
            encoder=np.array(self.encoder.to_json()),
            **halves,
        )
        return path


def adult_folder() -> Path | None:
    """The folder with both files of Adult; None where one is missing."""
    named = os.environ.get(DATA_FOLDER)
    folder = Path(named).expanduser() if named else os_cache("mtl_annotated") / "adult"
    there = all((folder / file.name).is_file() for file in ADULT.files)
    return folder if there else None


def random_table(rows: int, tasks: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Random rows of Adult's shape."""
    generator = np.random.default_rng(seed)
    columns = {
        # Every id occurs, so that the tables have the sizes asked for.
        name: generator.permutation(np.arange(rows) % size)
        for name, size in SPARSE.items()
    }
    columns |= {name: generator.normal(size=rows) for name in DENSE}
    columns |= {name: generator.integers(0, 2, rows) for name in tasks}
    return pd.DataFrame(columns)


def encoded(
    train: pd.DataFrame, test: pd.DataFrame, tasks: tuple[str, ...], *, real: bool
) -> Rows:
    """Both halves, by an encoder that has seen the training half alone."""
    columns: list[mtl.Sparse | mtl.Dense] = [
        mtl.Sparse(name, width=WIDTH) for name in SPARSE
    ]
    columns += [mtl.Dense(name) for name in DENSE]
    encoder = mtl.Encoder(columns, [mtl.Task(name) for name in tasks]).fit(train)
    return Rows(encoder, encoder.transform(train), encoder.transform(test), real)


def random_halves(train: int, test: int, tasks: tuple[str, ...]) -> list[pd.DataFrame]:
    """Random rows for training and for scoring."""
    return [random_table(rows, tasks, seed) for seed, rows in enumerate((train, test))]


def random_rows(
    train: int = TRAIN_ROWS,
    test: int = TEST_ROWS,
    tasks: tuple[str, ...] = (INCOME, MARRIAGE),
    *,
    funnel: bool = False,
) -> Rows:
    """Random rows with random labels; with `funnel` as `adult_rows` says."""
    halves = random_halves(train, test, tasks)
    if funnel:
        halves, tasks = [with_funnel(half) for half in halves], (INCOME, FUNNEL)
    return encoded(halves[0], halves[1], tasks, real=False)


def adult_rows(*, funnel: bool = False, limit: int | None = None) -> Rows:
    """Adult, or random rows where it is not at hand, at most `limit` of each half.

    With `funnel` the second label is 1 where both are: ESMM needs a conversion that
    happens only after a click.
    """
    folder, tasks = adult_folder(), (INCOME, MARRIAGE)
    if folder is None:
        halves = random_halves(TRAIN_ROWS, TEST_ROWS, tasks)
    else:
        halves = list(mtl.load_adult(folder))
    train, test = (with_funnel(half[:limit]) for half in halves)
    names = (INCOME, FUNNEL) if funnel else tasks
    return encoded(train, test, names, real=folder is not None)


def with_funnel(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a label that is 1 where both labels are."""
    return rows.assign(**{FUNNEL: rows[INCOME] * rows[MARRIAGE]})
