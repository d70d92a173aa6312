"""The three files that say what to install must agree, and the README must be true."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-]+==[\w.+!]+", line) for line in lines), lines
    pairs = [line.split("==") for line in lines]
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names), "a package is pinned twice"
    return dict(zip(names, (version for _, version in pairs), strict=True))


def declared():
    return [
        Requirement(line)
        for lines in (PROJECT["dependencies"], EXTRAS["book"], EXTRAS["test"])
        for line in lines
    ]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_declared_range_holds_its_pin(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{requirement} refuses the pin {pin}"


def test_constraints_cover_everything_that_the_project_pulls_in():
    pinned, waiting, seen = pins(), declared(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            # torch pins its own CUDA packages; a CPU build has none.
            continue
        assert name in pinned, f"{name} is installed but constraints.txt lacks it"
        for need in map(Requirement, needs):
            extras = requirement.extras or {""}
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append(need)
    unused = set(pinned) - seen - {"setuptools"}
    assert not unused, f"pinned, but nothing needs it: {sorted(unused)}"


def test_installed_versions_are_the_pinned_ones():
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.split("+")[0] == version, f"{name}: {installed} != {version}"


def test_conda_environment_says_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, last = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in plain
    assert last["pip"] == ["-c constraints.txt", "-e .[book,test]"]


def test_no_other_file_pins_a_version():
    lines = [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]
    exact = [line for line in lines if "==" in line]
    # nbval's tolerance hook uses an interface that is not public.
    assert exact == ["nbval==0.11.0"]


def readme_snippets():
    """The Python blocks of the README's section for importers, in order."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Import it\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_readme_snippets_run_in_an_empty_folder(tmp_path):
    first, second = readme_snippets()
    done = run(first, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "click" in done.stdout
    assert "purchase" in done.stdout
    assert not list(tmp_path.iterdir()), "the snippet left files behind"
    done = run(first + second, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "weights.pt"]


@pytest.mark.slow
def test_readme_command_runs_a_chapter(tmp_path):
    text = (ROOT / "README.md").read_text()
    line = re.search(r"^\$ (\.venv/bin/jupyter execute .*)$", text, re.M)[1]
    # Any chapter will do, and index is the quickest that has code.
    line = line.replace("shared_bottom", "index").replace("$PWD/build", str(tmp_path))
    line = line.replace(".venv/bin", str(Path(sys.executable).parent))
    done = subprocess.run(line.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.ipynb").exists()


def test_readme_names_only_targets_and_folders_that_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z]+)`", text))
    assert {"book", "test", "check", "sync"} <= named <= targets
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}, which does not exist"


def test_importing_prints_nothing_writes_nothing_and_needs_no_network(tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network on import')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "import mtl_annotated\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_documented_and_listed_once():
    import mtl_annotated

    names = mtl_annotated.__all__
    assert len(set(names)) == len(names)
    for name in names:
        thing = getattr(mtl_annotated, name)
        if callable(thing):
            assert thing.__doc__, f"{name} has no docstring"
