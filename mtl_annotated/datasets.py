"""Datasets

Chapter: book/datasets.md
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path

import pandas as pd

ADULT_COLUMNS = tuple(
    "age workclass fnlwgt education education_num marital_status occupation "
    "relationship race sex capital_gain capital_loss hours_per_week "
    "native_country".split()
)


MARITAL_STATUS = (
    "Never-married Married-civ-spouse Married-AF-spouse "
    "Married-spouse-absent Separated Divorced Widowed"
)


EDUCATION = (
    "Preschool 1st-4th 5th-6th 7th-8th 9th 10th 11th 12th HS-grad "
    "Some-college Assoc-voc Assoc-acdm Bachelors Masters Prof-school Doctorate"
)


OCCUPATION = (
    "? Adm-clerical Armed-Forces Craft-repair Exec-managerial Farming-fishing "
    "Handlers-cleaners Machine-op-inspct Other-service Priv-house-serv "
    "Prof-specialty Protective-serv Sales Tech-support Transport-moving"
)
NATIVE_COUNTRY = (
    "? Cambodia Canada China Columbia Cuba Dominican-Republic Ecuador "
    "El-Salvador England France Germany Greece Guatemala Haiti "
    "Holand-Netherlands Honduras Hong Hungary India Iran Ireland Italy "
    "Jamaica Japan Laos Mexico Nicaragua Outlying-US(Guam-USVI-etc) Peru "
    "Philippines Poland Portugal Puerto-Rico Scotland South Taiwan Thailand "
    "Trinadad&Tobago United-States Vietnam Yugoslavia"
)


ADULT_VALUES = {
    "workclass": "? Private Self-emp-inc Self-emp-not-inc Federal-gov "
    "State-gov Local-gov Without-pay Never-worked",
    "education": EDUCATION,
    "marital_status": MARITAL_STATUS,
    "occupation": OCCUPATION,
    "relationship": "Husband Wife Own-child Unmarried Other-relative Not-in-family",
    "race": "White Black Asian-Pac-Islander Amer-Indian-Eskimo Other",
    "sex": "Female Male",
    "native_country": NATIVE_COUNTRY,
}


# Chapter 'Datasets', section 'From lines to typed columns'
def refuse_values(column: pd.Series, wrong: pd.Series, expected: str) -> None:
    """Raise ValueError that names the first value of `column` where `wrong`."""
    if wrong.any():
        raise ValueError(
            f"{column.name}: {column[wrong].iloc[0]!r} in {wrong.sum()} of "
            f"{len(column)} rows; expected {expected}"
        )


# Chapter 'Datasets', section 'From lines to typed columns'
def adult_types(rows: pd.DataFrame) -> pd.DataFrame:
    """Text columns to integers and categories; a new DataFrame.

    Raises ValueError for a value that the data's description does not list.
    """
    typed = rows.copy()
    for name in ADULT_COLUMNS:
        text = rows[name]
        if name in ADULT_VALUES:
            values = ADULT_VALUES[name].split()
            choices = "one of " + ", ".join(values)
            refuse_values(text, ~text.isin(values), choices)
            typed[name] = text.astype(pd.CategoricalDtype(values))
        else:
            refuse_values(text, ~text.str.fullmatch("[0-9]+"), "a whole number")
            typed[name] = text.astype("int64")
    return typed


# Chapter 'Datasets', section 'Two labels under their own names'
def adult_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `income` and `never_married` (int64, 0 or 1); a new DataFrame."""
    label = rows["income"].str.removesuffix(".")
    refuse_values(label, ~label.isin(["<=50K", ">50K"]), "<=50K or >50K")
    married = rows["marital_status"]
    return rows.assign(
        income=(label == ">50K").astype("int64"),
        never_married=(married == "Never-married").astype("int64"),
    )


# Chapter 'Datasets', section 'Two labels under their own names'
def read_adult(lines: str | Path | TextIOBase) -> pd.DataFrame:
    """Read one half of Adult: a path or an open text, in the published format.

    Returns 14 input columns (int64 or category) and the labels `income` and
    `never_married` (int64, 0 or 1). Raises ValueError for an unknown value.
    """
    rows = pd.read_csv(
        lines,
        names=[*ADULT_COLUMNS, "income"],
        dtype=str,
        comment="|",
        skipinitialspace=True,
        na_filter=False,
        index_col=False,
    )
    return adult_labels(adult_types(rows))


# Chapter 'Datasets', section 'Is it the published file?'
@dataclass(frozen=True)
class DataFile:
    """A published file: name, size in bytes, SHA-256 sum in hexadecimal."""

    name: str
    size: int
    sha256: str


# Chapter 'Datasets', section 'Is it the published file?'
@dataclass(frozen=True)
class Source:
    """Where a data set is published and how its files are recognized.

    `address` ends with a slash; a file's name follows it.
    """

    name: str
    address: str
    files: tuple[DataFile, ...]
    license: str
    citation: str

    def listing(self) -> str:
        """A line for each file: its name, its size and its address."""
        return "\n".join(
            f"  {file.name} ({file.size:,} bytes) from {self.address}{file.name}"
            for file in self.files
        )


ADULT = Source(
    name="adult",
    address="https://archive.ics.uci.edu/ml/machine-learning-databases/adult/",
    files=(
        DataFile(
            "adult.data",
            3_974_305,
            "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        ),
        DataFile(
            "adult.test",
            2_003_153,
            "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        ),
    ),
    license="CC BY 4.0",
    citation="Becker, B. and Kohavi, R. (1996). Adult. UCI Machine Learning "
    "Repository. https://doi.org/10.24432/C5XW20",
)


# Chapter 'Datasets', section 'Is it the published file?'
def verify(path: Path, source: Source, file: DataFile) -> None:
    """Raise ValueError unless the bytes at `path` are the published `file`."""
    advice = f"Replace it with the file at {source.address}{file.name}"
    size = path.stat().st_size
    if size < file.size:
        raise ValueError(
            f"{source.name}: {path} is truncated: it has {size:,} bytes, "
            f"expected {file.size:,}. {advice}"
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"{source.name}: {path} is altered: its SHA-256 sum is {digest}, "
            f"expected {file.sha256}. {advice}"
        )


DATA_FOLDER = "MTL_ANNOTATED_DATA"


# Chapter 'Datasets', section 'Where do the files live?'
def locate(source: Source, folder: Path, named_by: str) -> dict[str, Path]:
    """Paths of the files in `folder`, each checked; nothing is written.

    Raises FileNotFoundError or NotADirectoryError that says which files to put
    where, and ValueError for a file that is not the published one.
    """
    paths = {file.name: folder / file.name for file in source.files}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise absence(source, folder, named_by, absent)
    for file in source.files:
        verify(paths[file.name], source, file)
    return paths


# Chapter 'Datasets', section 'Where do the files live?'
def absence(source: Source, folder: Path, named_by: str, absent: list[str]) -> OSError:
    """The error that says which files to put where."""
    place = f"{source.name}: {folder} ({named_by})"
    advice = f"Put these files there:\n{source.listing()}"
    if not folder.exists():
        return FileNotFoundError(f"{place} does not exist. {advice}")
    if not folder.is_dir():
        return NotADirectoryError(f"{place} is not a folder. {advice}")
    return FileNotFoundError(f"{place} lacks {', '.join(absent)}. {advice}")


# Chapter 'Datasets', section 'Where do the files live?'
def failure(source: Source, file: DataFile, error: Exception) -> OSError | ValueError:
    """The error that says what to do when the download of `file` failed."""
    if isinstance(error, OSError):
        return FileNotFoundError(
            f"{source.name}: {file.name} could not be downloaded "
            f"({type(error).__name__}). Put these files into a folder and name "
            f"that folder in {DATA_FOLDER}:\n{source.listing()}"
        )
    return ValueError(
        f"{source.name}: what came from {source.address}{file.name} is not the "
        f"published file and was not kept; expected SHA-256 sum {file.sha256}"
    )


# Chapter 'Datasets', section 'Where do the files live?'
def download(
    source: Source,
    folder: str | Path,
    *,
    progress: bool = False,
    downloader: Callable | None = None,
) -> dict[str, Path]:
    """Paths of the files in `folder`; what is not there is downloaded.

    `progress` shows a bar. `downloader` replaces pooch's own and has its
    signature: (url, output file, pooch). Raises FileNotFoundError when nothing
    arrives, ValueError when what arrives is not the published file.
    """
    import pooch

    sums = {file.name: f"sha256:{file.sha256}" for file in source.files}
    keeper = pooch.create(folder, source.address, registry=sums, retry_if_failed=2)
    options = {"downloader": downloader, "progressbar": progress}
    paths = {}
    for file in source.files:
        try:
            paths[file.name] = Path(keeper.fetch(file.name, **options))
        except (OSError, ValueError) as error:
            raise failure(source, file, error) from error
    return paths


# Chapter 'Datasets', section 'Where do the files live?'
def fetch(source: Source, folder: str | Path | None = None) -> dict[str, Path]:
    """Paths of a source's files, by name, each with the published SHA-256 sum.

    Looked for in `folder`, else in the folder that the environment variable
    MTL_ANNOTATED_DATA names; neither is ever written to. Without both, in the
    user's cache, where missing files are downloaded. Raises as `locate` and
    `download` do.
    """
    named = os.environ.get(DATA_FOLDER)
    if folder is not None:
        return locate(source, Path(folder).expanduser(), "argument folder")
    if named:
        return locate(source, Path(named).expanduser(), DATA_FOLDER)
    from pooch import os_cache

    return download(source, os_cache("mtl_annotated") / source.name)


ADULT_FACTS = {
    "adult.data": {"rows": 32_561, "income": 7_841, "never_married": 10_683},
    "adult.test": {"rows": 16_281, "income": 3_846, "never_married": 5_434},
}


# Chapter 'Datasets', section 'The loader'
def check_counts(rows: pd.DataFrame, name: str, facts: dict[str, int]) -> None:
    """Raise ValueError unless rows and positives of `name` match `facts`."""
    labels = [column for column in facts if column != "rows"]
    found = {"rows": len(rows)}
    found |= {label: int(rows[label].sum()) for label in labels}
    if found != facts:
        raise ValueError(
            f"{name} was not read as published: found {found}, expected {facts}"
        )


# Chapter 'Datasets', section 'The loader'
def load_adult(
    folder: str | Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The UCI Adult data in its published split: train and test rows.

    32,561 and 16,281 rows; 14 columns (int64 or category, `?` is a category of
    its own) and the labels `income` (1: above 50K) and `never_married`.
    `marital_status` is the second label in another form: not an input.
    Files: see `fetch`. Raises FileNotFoundError when they cannot be had and
    ValueError when they are not the published ones.

    Source: Becker and Kohavi (1996), doi 10.24432/C5XW20, CC BY 4.0.
    """
    paths = fetch(ADULT, folder)
    halves = {name: read_adult(path) for name, path in paths.items()}
    for name, rows in halves.items():
        check_counts(rows, name, ADULT_FACTS[name])
    return halves["adult.data"], halves["adult.test"]
