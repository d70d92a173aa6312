"""The loader of the chapter `datasets`: refusals offline, facts on the real files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pooch
import pytest
import requests

from mtl_annotated import datasets
from mtl_annotated.datasets import (
    ADULT,
    ADULT_COLUMNS,
    ADULT_VALUES,
    DATA_FOLDER,
    DataFile,
    Source,
    check_counts,
    download,
    fetch,
    load_adult,
    read_adult,
)

TRAIN = (
    "38, Private, 187654, HS-grad, 9, Never-married, Sales, Own-child, White, Male, "
    "0, 0, 40, Cuba, <=50K\n"
    "52, ?, 143210, Masters, 14, Divorced, ?, Husband, White, Male, "
    "15024, 0, 55, ?, >50K\n"
)
TEST = (
    "|1x3 Cross validator\n"
    "31, Private, 123456, 11th, 7, Never-married, Sales, Own-child, White, Male, "
    "0, 0, 45, Mexico, >50K.\n"
    "\n"
)
LABELS = ["income", "never_married"]


def publish(name: str, text: str) -> DataFile:
    content = text.encode()
    return DataFile(name, len(content), hashlib.sha256(content).hexdigest())


TINY = Source(
    name="tiny",
    address="https://example.org/tiny/",
    files=(publish("tiny.data", TRAIN), publish("tiny.test", TEST)),
    license="CC0",
    citation="invented",
)
TINY_LISTING = (
    "  tiny.data (186 bytes) from https://example.org/tiny/tiny.data\n"
    "  tiny.test (122 bytes) from https://example.org/tiny/tiny.test"
)
ADULT_LISTING = (
    "  adult.data (3,974,305 bytes) from https://archive.ics.uci.edu/ml/"
    "machine-learning-databases/adult/adult.data\n"
    "  adult.test (2,003,153 bytes) from https://archive.ics.uci.edu/ml/"
    "machine-learning-databases/adult/adult.test"
)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No network, a cache of its own, no data folder; the environment stays."""

    def refuse(*arguments, **options):
        raise AssertionError("a test of datasets opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv(DATA_FOLDER, raising=False)
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    for environment in (before, after):
        environment.pop("PYTEST_CURRENT_TEST", None)
        environment.pop(DATA_FOLDER, None)
    assert after == before


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tiny.data").write_bytes(TRAIN.encode())
    (folder / "tiny.test").write_bytes(TEST.encode())
    return folder


def serve(pages: dict[str, str], calls: list[str] | None = None):
    def downloader(url, output_file, keeper):
        if calls is not None:
            calls.append(url)
        Path(output_file).write_bytes(pages[url].encode())

    return downloader


PAGES = {
    "https://example.org/tiny/tiny.data": TRAIN,
    "https://example.org/tiny/tiny.test": TEST,
}


def raises(kind: type[Exception], message: str):
    """pytest.raises for exactly this message."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# Reading lines


def test_traps_of_the_format():
    train, test = read_adult(io.StringIO(TRAIN)), read_adult(io.StringIO(TEST))
    assert train["income"].to_list() == [0, 1]
    assert train["never_married"].to_list() == [1, 0]
    assert test["income"].to_list() == [1]
    assert train["workclass"].to_list() == ["Private", "?"]
    assert train["native_country"].to_list() == ["Cuba", "?"]
    assert not train.isna().any(axis=None)


def test_types_do_not_depend_on_the_rows():
    train, test = read_adult(io.StringIO(TRAIN)), read_adult(io.StringIO(TEST))
    assert train.dtypes.to_dict() == test.dtypes.to_dict()
    assert train.columns.to_list() == [*ADULT_COLUMNS, *LABELS]
    for name in train.columns:
        if name in ADULT_VALUES:
            assert train[name].cat.categories.to_list() == ADULT_VALUES[name].split()
            assert not train[name].cat.ordered
        else:
            assert train[name].dtype == "int64"


def test_values_are_distinct():
    for text in ADULT_VALUES.values():
        assert len(set(text.split())) == len(text.split())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "Never-married",
            "Never married",
            "marital_status: 'Never married' in 1 of 2 rows; expected one of "
            "Never-married, Married-civ-spouse, Married-AF-spouse, "
            "Married-spouse-absent, Separated, Divorced, Widowed",
        ),
        (">50K", "50000+.", "income: '50000+' in 1 of 2 rows; expected <=50K or >50K"),
        ("38,", "38.5,", "age: '38.5' in 1 of 2 rows; expected a whole number"),
        ("38,", ",", "age: '' in 1 of 2 rows; expected a whole number"),
        (", >50K", "", "income: '' in 1 of 2 rows; expected <=50K or >50K"),
    ],
)
def test_wrong_values_are_named(old: str, new: str, expected: str):
    with raises(ValueError, expected):
        read_adult(io.StringIO(TRAIN.replace(old, new)))


# Files in a folder that somebody names


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_named_folder_is_read_and_not_written(
    tiny: Path, given: str, monkeypatch: pytest.MonkeyPatch
):
    before = {path: path.stat().st_mtime_ns for path in tiny.iterdir()}
    if given == "environment":
        monkeypatch.setenv(DATA_FOLDER, str(tiny))
    paths = fetch(TINY, tiny if given == "argument" else None)
    assert paths == {name: tiny / name for name in ("tiny.data", "tiny.test")}
    assert {path: path.stat().st_mtime_ns for path in tiny.iterdir()} == before
    assert not (tiny.parent / "cache").exists()


def test_the_argument_comes_before_the_environment(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(DATA_FOLDER, str(tiny / "elsewhere"))
    assert fetch(TINY, str(tiny))["tiny.data"] == tiny / "tiny.data"
    assert os.environ[DATA_FOLDER] == str(tiny / "elsewhere")


def test_the_home_folder_is_expanded(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        Path, "expanduser", lambda path: tiny if str(path) == "~/tiny" else path
    )
    assert fetch(TINY, "~/tiny")["tiny.test"] == tiny / "tiny.test"


def test_missing_folder(tmp_path: Path):
    expected = (
        f"adult: {tmp_path / 'absent'} (argument folder) does not exist. "
        f"Put these files there:\n{ADULT_LISTING}"
    )
    with raises(FileNotFoundError, expected):
        load_adult(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_missing_folder_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(DATA_FOLDER, str(tmp_path / "absent"))
    expected = (
        f"adult: {tmp_path / 'absent'} (MTL_ANNOTATED_DATA) does not exist. "
        f"Put these files there:\n{ADULT_LISTING}"
    )
    with raises(FileNotFoundError, expected):
        load_adult()


def test_missing_file(tiny: Path):
    (tiny / "tiny.test").unlink()
    expected = (
        f"tiny: {tiny} (argument folder) lacks tiny.test. "
        f"Put these files there:\n{TINY_LISTING}"
    )
    with raises(FileNotFoundError, expected):
        fetch(TINY, tiny)


def test_both_files_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="lacks adult.data, adult.test. "):
        load_adult(tmp_path)


def test_folder_that_is_a_file(tiny: Path):
    expected = (
        f"tiny: {tiny / 'tiny.data'} (argument folder) is not a folder. "
        f"Put these files there:\n{TINY_LISTING}"
    )
    with raises(NotADirectoryError, expected):
        fetch(TINY, tiny / "tiny.data")


def test_truncated_file(tiny: Path):
    (tiny / "tiny.test").write_bytes(TEST.encode()[:-10])
    expected = (
        f"tiny: {tiny / 'tiny.test'} is truncated: it has 112 bytes, expected 122. "
        "Replace it with the file at https://example.org/tiny/tiny.test"
    )
    with raises(ValueError, expected):
        fetch(TINY, tiny)


@pytest.mark.parametrize("damage", ["same size", "longer"])
def test_altered_file(tiny: Path, damage: str):
    altered = TRAIN.replace("38", "88", 1) if damage == "same size" else TRAIN + " "
    (tiny / "tiny.data").write_bytes(altered.encode())
    digest = hashlib.sha256(altered.encode()).hexdigest()
    expected = (
        f"tiny: {tiny / 'tiny.data'} is altered: its SHA-256 sum is {digest}, "
        f"expected {TINY.files[0].sha256}. "
        "Replace it with the file at https://example.org/tiny/tiny.data"
    )
    with raises(ValueError, expected):
        fetch(TINY, tiny)


# Downloads, with a stand-in for the network


def test_download_keeps_and_reuses_files(tmp_path: Path):
    calls: list[str] = []
    paths = download(TINY, tmp_path / "new", downloader=serve(PAGES, calls))
    assert paths["tiny.data"].read_bytes() == TRAIN.encode()
    assert paths["tiny.test"].read_bytes() == TEST.encode()
    again = download(TINY, tmp_path / "new", downloader=serve(PAGES, calls))
    assert again == paths
    assert calls == list(PAGES)


def test_altered_file_in_the_cache_is_fetched_again(tiny: Path):
    (tiny / "tiny.data").write_bytes(TRAIN.encode()[:-1])
    calls: list[str] = []
    download(TINY, tiny, downloader=serve(PAGES, calls))
    assert calls == ["https://example.org/tiny/tiny.data"]
    assert (tiny / "tiny.data").read_bytes() == TRAIN.encode()


def test_altered_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    pages = {url: text[:-1] for url, text in PAGES.items()}
    expected = (
        "tiny: what came from https://example.org/tiny/tiny.data is not the "
        "published file and was not kept; expected SHA-256 sum "
        f"{TINY.files[0].sha256}"
    )
    with raises(ValueError, expected):
        download(TINY, tmp_path / "new", downloader=serve(pages))
    assert list((tmp_path / "new").iterdir()) == []


def test_offline_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tries = []

    def offline(self, url, output_file, keeper, check_only=False):
        tries.append(url)
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", offline)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    monkeypatch.setenv(DATA_FOLDER, "")
    expected = (
        "adult: adult.data could not be downloaded (ConnectionError). Put these "
        "files into a folder and name that folder in MTL_ANNOTATED_DATA:\n"
        f"{ADULT_LISTING}"
    )
    with raises(FileNotFoundError, expected) as error:
        load_adult()
    assert isinstance(error.value.__cause__, requests.exceptions.ConnectionError)
    assert tries == [ADULT.address + "adult.data"] * 3
    assert list((tmp_path / "cache/mtl_annotated/adult").iterdir()) == []


def test_the_cache_is_used_without_a_named_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def network(self, url, output_file, keeper, check_only=False):
        serve(PAGES)(url, output_file, keeper)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", network)
    paths = fetch(TINY)
    assert paths["tiny.test"] == tmp_path / "cache/mtl_annotated/tiny/tiny.test"


def test_no_progress_bar_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []

    def choose(url, progressbar=False):
        shown.append(progressbar)
        return serve(PAGES)

    monkeypatch.setattr("pooch.core.choose_downloader", choose)
    download(TINY, tmp_path / "quiet")
    download(TINY, tmp_path / "bar", progress=True)
    assert shown == [False, False, True, True]


# The import, the counts, the source


def test_import_opens_no_connection_and_leaves_pooch_alone():
    code = (
        "import sys\n"
        "sys.addaudithook(lambda event, _: event.startswith('socket.') "
        "and event != 'socket.__new__' and print(event))\n"
        "import mtl_annotated.datasets\n"
        "print('pooch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"


def test_wrong_counts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = (publish("adult.data", TRAIN), publish("adult.test", TEST))
    (tmp_path / "adult.data").write_bytes(TRAIN.encode())
    (tmp_path / "adult.test").write_bytes(TEST.encode())
    source = dataclasses.replace(ADULT, files=files)
    monkeypatch.setattr(datasets, "ADULT", source)
    expected = (
        "adult.data was not read as published: found {'rows': 2, 'income': 1, "
        "'never_married': 1}, expected {'rows': 32561, 'income': 7841, "
        "'never_married': 10683}"
    )
    with raises(ValueError, expected):
        load_adult(tmp_path)


def test_right_counts_pass():
    rows = pd.DataFrame({"click": [0, 1, 1]})
    check_counts(rows, "log", {"rows": 3, "click": 2})


def test_source_is_frozen_and_complete():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ADULT.name = "other"  # type: ignore[misc]
    assert ADULT.listing() == ADULT_LISTING
    assert ADULT.license == "CC BY 4.0"
    assert "10.24432/C5XW20" in ADULT.citation


# The real files


FOLDER = os.environ.get(DATA_FOLDER)
real = pytest.mark.skipif(
    not FOLDER,
    reason="the UCI Adult files adult.data and adult.test are needed: "
    f"set {DATA_FOLDER} to their folder",
)


@pytest.fixture(scope="module")
def adult() -> tuple[pd.DataFrame, pd.DataFrame]:
    return load_adult(FOLDER)


@real
def test_published_split(adult: tuple[pd.DataFrame, pd.DataFrame]):
    train, test = adult
    assert (len(train), len(test)) == (32_561, 16_281)
    assert train.columns.to_list() == [*ADULT_COLUMNS, *LABELS]
    assert train.dtypes.to_dict() == test.dtypes.to_dict()
    assert not train.isna().any(axis=None)
    assert not test.isna().any(axis=None)
    assert train["income"].mean() == pytest.approx(0.241, abs=5e-4)
    assert train["never_married"].mean() == pytest.approx(0.328, abs=5e-4)
    assert test["income"].sum() == 3_846


@real
def test_order_of_the_rows(adult: tuple[pd.DataFrame, pd.DataFrame]):
    train, test = adult
    assert train.index.equals(pd.RangeIndex(32_561))
    assert test.index.equals(pd.RangeIndex(16_281))
    assert train["age"].iloc[[0, -1]].to_list() == [39, 52]
    assert test["age"].iloc[[0, -1]].to_list() == [25, 35]


@real
def test_columns_hold_what_the_chapter_says(adult: tuple[pd.DataFrame, pd.DataFrame]):
    for rows in adult:
        assert (rows["education"].cat.codes + 1 == rows["education_num"]).all()
        never = rows["marital_status"] == "Never-married"
        assert (never == (rows["never_married"] == 1)).all()
        unknown = [name for name in ADULT_VALUES if (rows[name] == "?").any()]
        assert unknown == ["workclass", "occupation", "native_country"]
    train = adult[0]
    for name, text in ADULT_VALUES.items():
        assert set(train[name]) == set(text.split())


@real
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_real_file(tmp_path: Path, damage: str):
    assert FOLDER is not None
    for file in ADULT.files:
        content = (Path(FOLDER) / file.name).read_bytes()
        (tmp_path / file.name).write_bytes(content)
    if damage == "truncated":
        content = content[:-100]
    else:
        content = content.replace(b"25, Private", b"26, Private", 1)
    (tmp_path / "adult.test").write_bytes(content)
    with pytest.raises(ValueError, match=f"adult.test is {damage}: "):
        load_adult(tmp_path)
