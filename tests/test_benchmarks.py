"""The benchmarks: what they compare is the same work, and they refuse a busy machine.

No time is asserted here.
"""

import csv
import dataclasses
import json
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mtl_annotated as mtl
from benchmarks import __main__ as command_line
from benchmarks import (
    details,
    encoding,
    floor,
    growth,
    networks,
    peers,
    plain,
    profile,
    replicas,
    store,
    suites,
    tricks,
    turns,
    vocabulary,
)
from benchmarks.peers import OURS, SWITCHED, Competitor
from benchmarks.rows import INPUTS, WIDTH, random_rows
from benchmarks.store import MADE_WITH, Store
from benchmarks.suites import Command
from benchmarks.turns import WORKERS, Load, Turn, Worker, WorkerError, interleave
from mtl_annotated import training

MODELS = tuple(networks.SIZES)
COLUMNS = {
    "suite",
    "model",
    "batch_size",
    "library",
    "version",
    "framework",
    "python",
    "limit",
    "code",
    "race",
    "rows_per_second",
    "spread",
    "middle_half",
    "rates",
    "runs",
    "passes",
    "cpu_seconds",
    "peak_mib",
    "ratio_to_floor",
    "ours_over_this",
    "repeats",
    "rows",
    "threads",
    "setting",
    "load_of_others_percent",
    "conclusive",
    "why_not",
    "cores",
    "system",
}
# A library without a network: it remembers labels, and prints where it should not.
# One of its settings does not work, the fastest in another process is the last one.
FAKE = f"""
import sys
sys.path.insert(0, {str(WORKERS)!r})
print("hello from the library")
import numpy as np
import protocol

BREAKS = False


class Fake(protocol.Library):
    def settings(self, suite):
        first = [{{"rest": 0.02}}, {{"rest": None}}, {{"rest": 0.004}}]
        return [first, [{{"fused": False}}, {{"fused": True}}]]

    def build(self, model, sizes, setting):
        print("building", model)
        if model == "PLE":
            raise ValueError("no such model")
        self.rest = setting.get("rest", 0.02)
        if self.rest is None:
            raise ValueError("no such setting")
        self.rest /= 2 if setting.get("fused") else 1
        self.runs = 0

    def train(self, epochs, rows):
        import time

        self.runs += 1
        if self.runs == 4 and BREAKS:
            raise ValueError("broken in a run")
        time.sleep(epochs * (self.rest + 0.001))
        return epochs * len(self.arrays.labels(rows))

    def predict(self, halves, rows):
        parts = [self.arrays.saved[half + "_labels"] for half in halves]
        return np.concatenate(parts)[:rows]


protocol.serve(Fake)
"""


@pytest.fixture(scope="module")
def rows():
    return random_rows(300, 100, funnel=True)


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    versions = {"fake": "1.2", "numpy": np.__version__}
    return Competitor("fake", script, sys.executable, "3.x", versions)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """No time is asserted: a run need not last a second."""
    monkeypatch.setattr(turns.Turn.warm_up, "__defaults__", (0.01,))
    monkeypatch.setattr(suites, "SHORT", 0.01)
    monkeypatch.setattr(turns, "STEADY", 100.0)


class Quiet(Load):
    """A machine on which others use what the test says."""

    def __init__(self, percent):
        self.percent = percent

    def start(self):
        pass

    def read(self):
        return self.percent

    def idle(self, seconds=1.0):
        return self.percent


@pytest.fixture
def command(rows, fake, monkeypatch):
    monkeypatch.setattr(suites, "adult_rows", lambda **_: rows)
    lines = []
    made = Command(
        competitors=[fake],
        models=["MMoE"],
        batch_sizes=[64],
        repeats=3,
        threads=1,
        show=lambda text: lines.append(json.loads(text)),
        load=Quiet(3.0),
    )
    made.lines = lines
    return made


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", MODELS)
def test_floor_multiplies_what_the_models_multiply(model, rows):
    sizes, batch = networks.SIZES[model], rows.train[:32]
    expected = (
        2 * len(batch) * floor.multiply_adds(floor.products(model, sizes, INPUTS))
    )
    ours = networks.build(model, rows.encoder)
    loop = plain.copy_of(ours, model, sizes, rows.encoder)
    parts = batch.ids, batch.dense, batch.labels
    assert flops(lambda: loop.losses(*parts).sum().backward()) == expected
    # Ours may give a gate's product the experts too that it does not see: 8 of 20,
    # for each of two tasks, on each level.
    hidden = {"CGC": 1, "PLE": 2}.get(model, 0) * 2 * 8 * 64
    found = flops(lambda: ours.loss(batch).backward())
    assert expected <= found <= expected + 3 * hidden * 2 * len(batch)


@pytest.mark.parametrize("model", MODELS)
def test_floor_runs_its_products_and_an_adam_step(model):
    found = floor.products(model, networks.SIZES[model], INPUTS)
    bare = floor.Floor(found, 8, [(3, 2)], tables=20, columns=8, width=WIDTH)
    before = bare.optimizer.param_groups[0]["params"][0].clone()
    assert flops(lambda: bare.run(17)) == 2 * 16 * floor.multiply_adds(found)
    assert bare.run(17) == 16
    assert bare.run(3) == 8
    after = bare.optimizer.param_groups[0]["params"][0]
    assert (before != after).any()


def test_floor_joins_what_reads_one_input():
    found = floor.products("MMoE", networks.SIZES["MMoE"], INPUTS)
    assert found[0] == floor.Product(INPUTS, 8 * 64 + 2 * 32)
    assert floor.Product(64, 64, 8) in found
    assert floor.Product(32, 8, 2) in found
    assert floor.Mixture(2, 8, 64) in found
    top = floor.products("PLE", networks.SIZES["PLE"], INPUTS)
    # The upper level's streams: two of the tasks', and the shared one without a gate.
    assert floor.Product(64, 8 * 64 + 16, 2) in top
    assert floor.Product(64, 4 * 64, 1) in top
    assert top.count(floor.Mixture(1, 20, 64)) == 1


@pytest.mark.parametrize("model", MODELS)
def test_ours_equals_the_plain_loop_in_double_precision(model, rows):
    gaps = plain.check(model, networks.SIZES[model], rows.encoder, rows.train)
    assert set(gaps) == {"losses", "gradients", "training", "predictions"}
    assert gaps["losses"] < 1e-10
    assert gaps["gradients"] < 1e-10


@pytest.mark.parametrize("spoiled", ["gradients", "training"])
def test_the_check_notices_other_weights_and_other_training(rows, monkeypatch, spoiled):
    copy_of = plain.copy_of

    def other(*arguments):
        found = copy_of(*arguments)
        with torch.no_grad():
            next(found.towers.parameters()).mul_(1.001)
        return found

    if spoiled == "gradients":
        monkeypatch.setattr(plain, "copy_of", other)
    else:
        monkeypatch.setattr(plain, "fit", lambda *_: None)
    with pytest.raises(AssertionError, match=spoiled):
        plain.check("MMoE", networks.SIZES["MMoE"], rows.encoder, rows.train)


def test_a_line_has_all_columns_and_the_better_setting(command):
    suites.race(command, next(suites.cells(command, "train")))
    (line,) = command.lines
    assert set(line) == COLUMNS
    assert line["library"] == "fake"
    assert line["version"] == "1.2"
    assert line["framework"] == f"numpy {np.__version__}"
    assert line["threads"] == 1
    assert json.loads(line["setting"]) == {"rest": 0.004, "fused": True}
    assert line["rows"] == 300
    assert line["rows_per_second"] > 0
    assert line["passes"] > 1
    assert len(line["rates"].split(";")) == line["runs"] == 3
    assert line["spread"] >= 0
    assert line["peak_mib"] > 5
    assert line["load_of_others_percent"] == 3.0
    assert line["conclusive"] is True
    assert line["why_not"] is None
    assert line["ratio_to_floor"] is None


def test_environments_are_chosen_before_settings_and_one_may_not_work(command, fake):
    fake.script.write_text(
        FAKE.replace("import protocol", "import os, protocol\nos.environ['NEEDED']")
    )
    choices = ({"OTHER": "1"}, {"NEEDED": "1"})
    tried = dataclasses.replace(fake, environments=(choices,))
    cell = next(suites.cells(command, "train"))
    with suites.Trial(command, tried, cell) as trial:
        found = trial.tuned()
    assert found.environment == {"NEEDED": "1"}
    assert found.setting == {"rest": 0.004, "fused": True}
    assert set(trial.readings) <= {3.0}
    broken = dataclasses.replace(fake, environments=(choices[:1] * 2,))
    with (
        suites.Trial(command, broken, cell) as trial,
        pytest.raises(WorkerError, match="NEEDED"),
    ):
        trial.tuned()


def test_a_file_is_continued_and_a_case_is_not_run_twice(command, tmp_path):
    path = tmp_path / "speed.csv"
    command.store = Store(path)
    suites.speed(command, "predict")
    assert len(command.lines) == 1
    command.store = Store(path)
    suites.speed(command, "predict")
    assert len(command.lines) == 1
    command.again = True
    suites.speed(command, "predict")
    assert len(command.lines) == 2
    with path.open(newline="") as file:
        assert next(file) == store.HEADER
        (stored,) = csv.DictReader(file)
    assert stored["rows"] == "400"
    assert stored["suite"] == "predict"


@pytest.mark.parametrize(
    "changed", [{"limit": 50}, {"repeats": 4}, {"threads": 2}, {"code": "other"}]
)
def test_what_was_measured_otherwise_is_measured_again(
    command, tmp_path, changed, capsys
):
    line = suites.Cell("train", "MMoE", 64, {}, tmp_path).line("fake")
    (fake,) = command.competitors
    command.put(line | command.made_with(fake) | {"conclusive": True})
    assert not command.wanted(line | command.made_with(fake))
    for name, value in changed.items():
        setattr(command, name, value)
    assert command.wanted(line | command.made_with(fake))
    assert f"measured again, {next(iter(changed))} is" in capsys.readouterr().err
    assert set(MADE_WITH) == set(command.made_with(fake))


def test_the_digest_of_the_code_is_of_what_is_run(tmp_path, monkeypatch):
    path = tmp_path / "module.py"
    monkeypatch.setattr(store.mtl, "__file__", str(path))

    def digest(text):
        path.write_text(text)
        return store.code()

    first = digest('"""One."""\ndef f():\n    """It."""\n    return 1  # why\n')
    assert first == digest('"""Two."""\n\ndef f():\n    "It"\n    return 1\n')
    assert first != digest('"""One."""\ndef f():\n    """It."""\n    return 2\n')


@pytest.mark.parametrize("percent", [3.0, 90.0])
def test_a_busy_machine_allows_no_conclusion(command, tmp_path, percent):
    command.load, command.store = Quiet(percent), Store(tmp_path / "out.jsonl")
    suites.speed(command, "train")
    (line,) = command.lines
    assert line["load_of_others_percent"] == percent
    assert line["conclusive"] is (percent == 3.0)
    assert line["why_not"] == (None if percent == 3.0 else "load")
    assert command_line.exit_status(command) == (0 if percent == 3.0 else 3)
    # What is not conclusive is run again, and then replaced.
    command.load, command.store = Quiet(1.0), Store(tmp_path / "out.jsonl")
    suites.speed(command, "train")
    assert len(command.lines) == (1 if percent == 3.0 else 2)
    stored = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(stored) == 1
    assert stored[0]["conclusive"] is True


def test_runs_that_do_not_agree_allow_no_conclusion(command, monkeypatch):
    def turn(seconds):
        answers = [{"rows": 10, "seconds": each} for each in seconds]
        return Turn("one", lambda _: {}, answers=answers)

    steady, wild = turn([1, 1, 1, 1, 9]), turn([1, 2, 3, 4, 5])
    assert steady.middle_half() == 0
    assert wild.middle_half() == pytest.approx((5 - 2.5) / (10 / 3))
    monkeypatch.setattr(turns, "STEADY", 0.15)
    assert command.verdict([3.0], steady)["conclusive"] is True
    assert command.verdict([3.0], steady, wild)["why_not"] == "spread"
    assert command.verdict([30.0], wild)["why_not"] == "load and spread"


def test_who_is_not_steady_gets_more_rounds(monkeypatch):
    monkeypatch.setattr(turns, "STEADY", 0.15)
    seconds = iter([1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    even = Turn("even", lambda _: {"rows": 1, "seconds": 1.0})
    odd = Turn("odd", lambda _: {"rows": 1, "seconds": next(seconds)})
    never = Turn("never", lambda _: {"rows": 1, "seconds": len(never.answers) + 1.0})
    interleave([even, odd, never], 3, Quiet(1.0))
    assert [len(each.answers) for each in (even, odd, never)] == [3, 8, 9]
    assert odd.steady()
    assert not never.steady()


def test_a_run_has_as_many_passes_as_make_it_long():
    asked = []

    def run(passes):
        asked.append(passes)
        # The first pass compiles something.
        seconds = 5.0 if len(asked) == 1 else 0.3 * passes
        return {"rows": passes, "seconds": seconds, "cpu_seconds": 1.2, "peak_mib": 7}

    turn = Turn("one", run)
    turn.warm_up(1.0)
    assert (turn.passes, turn.peak_mib, turn.answers) == (4, 7, [])
    turn.take()
    assert asked == [1, 1, 4]
    found = turn.measures()
    assert found["rates"] == "3"
    assert found["cpu_seconds"] == 0.3


def test_a_library_that_fails_is_named_and_the_command_goes_on(command):
    command.models = ["PLE", "CGC"]
    suites.speed(command, "train")
    failed, fine = command.lines
    assert failed["model"] == "PLE"
    assert "no such model" in failed["error"]
    assert fine["model"] == "CGC"
    assert command_line.exit_status(command) == 1
    # Nobody has changed anything: it is not tried again.
    suites.speed(command, "train")
    assert len(command.lines) == 2


def test_a_library_that_fails_in_a_round_costs_no_other(command, fake):
    script = fake.script.with_name("broken.py")
    script.write_text(FAKE.replace("BREAKS = False", "BREAKS = True"))
    broken = dataclasses.replace(fake, name="broken", tuned=False, script=script)
    command.competitors = [broken, fake]
    suites.speed(command, "train")
    failed, fine = command.lines
    assert failed["library"] == "broken"
    assert "broken in a run" in failed["error"]
    assert fine["rows_per_second"] > 0
    assert fine["conclusive"] is True
    assert failed["race"] == fine["race"]


def test_auc_is_of_each_task_on_the_test_rows(command, rows, monkeypatch):
    command.seeds = 2
    suites.auc(command)
    assert [line["seed"] for line in command.lines] == [0, 1]
    # The rows are random: nobody can learn them, and no AUC is given.
    assert command.lines[0]["auc_first"] is None
    command.again = True
    monkeypatch.setitem(vars(rows), "real", True)
    suites.auc(command)
    assert command.lines[2]["auc_first"] == 1.0
    assert command.lines[2]["auc_second"] == 1.0
    assert command.lines[2]["task_names"] == "income,income_and_never_married"


def test_our_worker_trains_predicts_and_runs_the_floor(rows, tmp_path):
    arrays = rows.save(tmp_path / "rows.npz")
    file = tmp_path / "scores.npy"
    with Worker(OURS.script, sys.executable, arrays, 1, tmp_path) as worker:
        sizes = networks.SIZES["ESMM"]
        wanted = {"model": "ESMM", "sizes": sizes, "setting": {}, "batch_size": 64}
        worker.ask("build", seed=0, **wanted)
        assert worker.ask("train", epochs=2, rows=200)["rows"] == 400
        assert worker.ask("predict", passes=2, rows=None)["rows"] == 800
        assert worker.ask("floor", passes=3, rows=None)["rows"] == 3 * 256
        worker.ask("build", seed=0, slot="other", **wanted)
        assert worker.ask("train", epochs=1, rows=50, slot="other")["rows"] == 50
        worker.ask("scores", file=str(file))
    scores = np.load(file)
    assert scores.shape == (100, 2)
    assert ((scores > 0) & (scores < 1)).all()
    # Of the click, and of click and conversion, which is the rarer.
    assert (scores[:, 1] < scores[:, 0]).all()


def test_a_worker_that_ends_is_no_silence(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('cannot start')")
    none = tmp_path / "none.npz"
    with Worker(script, sys.executable, none, 1, tmp_path) as worker:
        # Nobody waits for an answer that cannot come, the second time neither.
        for _ in range(2):
            with pytest.raises(WorkerError, match="(?s)process ended.*cannot start"):
                worker.ask("hello")


def test_the_load_is_what_others_use_of_all_processors(monkeypatch):
    clock = {"now": 0.0, "all": 100.0, "own": 10.0}
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(turns, "machine_seconds", lambda: clock["all"])
    monkeypatch.setattr(turns, "processor_seconds", lambda _: clock["own"])
    monkeypatch.setattr(turns.os, "cpu_count", lambda: 4)
    load = Load()
    clock |= {"now": 0.1}
    assert load.read() is None
    clock |= {"now": 1.0, "all": 103.0, "own": 11.0}
    assert load.read() == pytest.approx(50.0)
    # Clocks of processes and of the machine tick apart: never below zero.
    clock |= {"own": 14.0}
    assert load.read() == 0.0


def test_our_own_work_counts_that_of_ended_children():
    process = psutil.Process()
    before = turns.processor_seconds(process)
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert turns.processor_seconds(process) - before >= 0.25


def test_turns_change_places():
    order = []

    def turn(name):
        answer = {"rows": 10, "seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1.0}
        return Turn(name, lambda _: order.append(name) or answer)

    three = [turn("a"), turn("b"), turn("c")]
    assert interleave(three, 6, Quiet(5.0)) == [5.0] * 6
    assert order[:3] == ["a", "b", "c"]
    assert all(order.count(name) == 6 for name in "abc")
    before = [pair for pair in pairwise(order) if pair[0] != pair[1]]
    assert {one for one, other in before if other == "a"} == {"b", "c"}
    assert three[0].measures()["rows_per_second"] == 10
    assert three[0].measures()["spread"] == 0


def test_growth_has_three_families_of_curves():
    points = list(growth.points((256,)))
    assert [p.experts for p in points if p.varies == "experts"] == [4, 8, 16, 32, 64]
    assert [p.tasks for p in points if p.varies == "tasks"] == [2, 4, 8, 16]
    assert max(p.batch_size for p in points if p.varies == "batch") == 65_536


@pytest.mark.parametrize("study", replicas.STUDIES, ids=lambda each: each.model)
def test_replicas_end_where_each_model_ends_alone(study):
    assert replicas.check(study) < 1e-10


UNCOMPILED = tuple(n for n, _ in tricks.ladder() if n != "torch.compile")


def test_every_trick_computes_the_plain_loop_s_gradients(monkeypatch):
    rows = random_rows(400, 50)
    model = networks.build("MMoE", rows.encoder)
    gaps = tricks.check(model, rows.encoder, rows.train, UNCOMPILED)
    assert set(gaps) == set(UNCOMPILED)
    assert all(gap < 1e-10 for gap in gaps.values())
    backward = tricks.ExpertBank.backward

    def swapped(context, *gradients):
        """As it is, with the gradients of the first two experts changed about."""
        of_x, *others = backward(context, *gradients)
        order = [1, 0, *range(2, len(others[0]))]
        return of_x, *(each[order] for each in others)

    monkeypatch.setattr(tricks.ExpertBank, "backward", staticmethod(swapped))
    with pytest.raises(AssertionError, match=r"autograd.Function: differs"):
        tricks.check(model, rows.encoder, rows.train, UNCOMPILED)


def test_the_check_of_the_tricks_sees_rows_of_tables_that_are_swapped(monkeypatch):
    rows = random_rows(400, 50)
    model = networks.build("MMoE", rows.encoder)
    features = tricks.Variant.features

    def other(self, ids, dense):
        if "towers side by side" in self.tricks:
            ids = torch.where(ids == 1, 2, torch.where(ids == 2, 1, ids))
        return features(self, ids, dense)

    monkeypatch.setattr(tricks.Variant, "features", other)
    with pytest.raises(AssertionError, match="towers side by side: differs"):
        tricks.check(model, rows.encoder, rows.train, UNCOMPILED)


def test_each_rung_of_the_ladder_has_one_trick_more():
    rungs = list(tricks.ladder())
    assert [len(has) for _, has in rungs[: len(tricks.TRICKS) + 1]] == list(
        range(len(tricks.TRICKS) + 1)
    )
    assert [name for name, _ in rungs[-3:]] == list(tricks.LEFT_OUT)
    assert all(name in has for name, has in rungs[1:])


def test_the_suite_tricks_puts_a_line_for_each_variant_but_those_left_out(command):
    command.repeats = 1
    tricks.run(command, left_out=())
    found = command.lines
    names = [tricks.START, *tricks.TRICKS, tricks.PACKAGE]
    assert [line["case"] for line in found] == names
    assert found[0]["over_start"] == 1
    assert all(line["rows_per_second"] > 0 for line in found)
    assert len({line["race"] for line in found}) == 1


def test_a_trick_that_cannot_run_costs_no_other(monkeypatch, command):
    def no_compiler(_):
        raise RuntimeError("no compiler")

    # Compiled when it is called, as torch does.
    monkeypatch.setattr(torch, "compile", lambda _: no_compiler)
    command.repeats = 1
    tricks.run(command, left_out=("torch.compile",))
    failed = [line for line in command.lines if "error" in line]
    assert [line["case"] for line in failed] == ["torch.compile"]
    assert len(command.lines) == len(tricks.TRICKS) + 3


def test_the_profile_sorts_the_work_of_a_step_by_kind(command, monkeypatch):
    assert profile.kind_of("aten::baddbmm") == "matrix products"
    assert profile.kind_of("aten::view") == profile.OTHER
    assert profile.kind_of("aten::index_select") == profile.TABLES
    monkeypatch.setattr(profile, "LOOKS", 1)
    command.repeats = 1
    # The second batch size is larger than all rows together.
    for command.models, command.batch_sizes in (
        (["SharedBottom"], [64]),
        (["CGC"], [512]),
    ):
        profile.run(command)
    found = command.lines
    size = len(profile.NAMES)
    cells = [found[n : n + size] for n in range(0, len(found), size)]
    assert len(cells) == 2
    for cell in cells:
        assert [line["case"] for line in cell] == list(profile.NAMES)
        of_all = sum(line["microseconds"] for line in cell)
        # What is outside of operators is the rest of the step, if there is a rest.
        assert of_all >= cell[0]["step_microseconds"] - 1
        calls = {line["case"]: line["calls"] for line in cell}
        assert calls["rows of the tables"] == 2
        assert calls["copies"] >= (30 if cell[0]["model"] == "CGC" else 1)
    calls = {line["case"]: line["calls"] for line in cells[0]}
    # Two layers of the bottom and three of the towers, each with two products back.
    assert calls["matrix products"] == 15
    assert calls["softmax of the gates"] == 0


class Stopped(Exception):
    pass


def test_an_interrupted_suite_goes_on_where_it_was(command, tmp_path, monkeypatch):
    def rows(size):
        return pd.DataFrame({"click": range(size)})

    monkeypatch.setattr(encoding, "table", rows)
    monkeypatch.setattr(encoding, "lists", rows)
    sides = SimpleNamespace(transform=lambda rows: {"click": rows["click"]})
    monkeypatch.setattr(encoding, "our_encoder", lambda _: sides)
    monkeypatch.setattr(encoding, "Recipe", lambda _: sides)
    monkeypatch.setattr(encoding, "check_equal", lambda *_: None)
    monkeypatch.setattr(encoding, "measured", lambda *_: dict(output=1, peak=1, rss=1))
    command.store = Store(tmp_path / "out.csv")
    show, seen = command.show, []

    def stop(text):
        seen.append(text)
        raise Stopped

    command.show = stop
    with pytest.raises(Stopped):
        encoding.run(command, rows=40)
    command.show, command.store = show, Store(tmp_path / "out.csv")
    encoding.run(command, rows=40)
    assert [line["size"] for line in command.lines] == [40, 4, 40]
    assert json.loads(seen[0])["size"] == 4
    encoding.run(command, rows=40)
    assert len(command.lines) == 3


def test_variants_of_a_table_take_turns_and_share_their_reading(command, monkeypatch):
    monkeypatch.setattr(vocabulary, "steps_of", lambda *_: 3)
    monkeypatch.setattr(vocabulary, "memory", lambda *_: {"ratio": 1.0})
    monkeypatch.setattr(vocabulary, "DRAWS", ("zipf",))
    command.load = Quiet(90.0)
    vocabulary.run(command, [500], measured=[500])
    speeds = [line for line in command.lines if line["case"] == "vocabulary"]
    assert [line["variant"] for line in speeds] == list(vocabulary.VARIANTS)
    assert len({line["race"] for line in speeds}) == 1
    assert {line["why_not"] for line in speeds} == {"load"}
    assert all(line["start_seconds"] > 0 for line in speeds)
    assert len(command.lines) == len(speeds) + len(vocabulary.STATE)


def test_details_compare_lookups_rows_at_once_updates_and_products(
    command, monkeypatch
):
    command.repeats = 1
    monkeypatch.setattr(details, "VOCABULARIES", (300, 900))
    monkeypatch.setattr(details, "LARGEST_DENSE", 300)
    monkeypatch.setattr(details, "AT_ONCE", (32, 4096))
    command.models = ["MMoE", "ESMM"]
    asked, forward = set(), mtl.Ranker.forward

    def watched(self, batch):
        asked.add((type(self).__name__, self.training, training.ROWS_AT_ONCE[0]))
        return forward(self, batch)

    monkeypatch.setattr(mtl.Ranker, "forward", watched)
    monkeypatch.setattr(details, "memory", lambda _: None)
    details.run(command)
    assert training.ROWS_AT_ONCE == (512, 4096)
    variants = product(("MMoE", "ESMM"), (True, False), (32, 4096))
    assert asked == set(variants)
    assert [line["variant"] for line in command.lines] == [
        *details.LOOKUPS,
        *["32", "4096"] * 6,
        "by row",
        "dense",
        "by row",
        *details.PRECISIONS * len(details.PRODUCTS),
    ]
    errors = [line["largest_error"] for line in command.lines[-8:]]
    # On processors that have units for it, oneDNN may multiply in bfloat16.
    assert all(0 < float(error) < 1e-5 for error in errors[::2])
    assert all(0 < float(error) < 2e-2 for error in errors[1::2])
    assert torch.get_float32_matmul_precision() == "highest"
    twice = partial(torch.optim.Adam, amsgrad=True, weight_decay=1.0)
    monkeypatch.setattr(details.torch.optim, "Adam", twice)
    with pytest.raises(AssertionError):
        details.check_updates()
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    monkeypatch.setitem(details.LOOKUPS, "F.embedding", lambda t, rows: t[rows] * 2)
    with pytest.raises(AssertionError):
        details.check(table, torch.tensor([3, 3, 1]))


def test_peers_are_found_by_their_distributions(tmp_path, monkeypatch):
    assert peers.installed(sys.executable, ["numpy", "no-such-thing"]) == {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }
    with pytest.raises(ValueError, match="not a Python interpreter"):
        peers.find(["/no/such/python"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(
        peers,
        "installed",
        lambda *_: {"python": "3.x", "deepctr": "1", "tf-keras": "2", "torch": "0"},
    )
    (found,) = peers.find(["./python", sys.executable], threads=2)
    assert found.interpreter == str(tmp_path / "python")
    keras, threads = found.environments
    assert [each["TF_USE_LEGACY_KERAS"] for each in keras] == ["1", "0"]
    assert [each["TF_NUM_INTRAOP_THREADS"] for each in threads] == ["2", "1"]
    assert found.versions == {"deepctr": "1", "tf-keras": "2"}
    (alone,) = peers.find(["./python"], threads=1)
    assert alone.environments == (keras,)
    assert all((WORKERS / script).is_file() for script in peers.SCRIPTS.values())


def test_another_torch_than_ours_is_named():
    here = OURS.versions["torch"].split("+")[0]
    same = dataclasses.replace(OURS, name="same", versions={"torch": f"{here}+cu"})
    other = dataclasses.replace(OURS, name="other", versions={"torch": "1.0"})
    assert peers.other_torch([OURS, same, other]) == ["other on 1.0"]


def test_memory_is_given_back_in_one_process_and_kept_in_the_other(
    command, fake, monkeypatch
):
    fake.script.write_text(
        FAKE.replace("import protocol", "import os, protocol").replace(
            "def train(self, epochs, rows):",
            "def train(self, epochs, rows):\n"
            '        print(sorted(v for v in os.environ if "MALLOC" in v), file=open(__file__ + ".seen", "a"))',
        )
    )
    monkeypatch.setattr(details, "SWITCHED", fake)
    command.models, command.repeats = ["CGC"], 1
    details.memory(command)
    assert [line["library"] for line in command.lines] == ["given back", "kept"]
    assert len({line["race"] for line in command.lines}) == 1
    assert {line["case"] for line in command.lines} == {"memory"}
    seen = set(fake.script.with_suffix(".py.seen").read_text().splitlines())
    assert seen == {"[]", str(sorted(peers.KEPT))}
    details.memory(command)
    assert len(command.lines) == 2


def test_the_plain_loop_with_switches_takes_part_where_time_is_measured():
    command = Command(competitors=suites.own_competitors())
    assert SWITCHED in suites.taking_part(command, "train")
    assert SWITCHED not in suites.taking_part(command, "auc")


def test_a_file_that_is_no_file_of_results_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a column 'suite', found a, b"):
        Store(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown suite 'speed', choose from train, predict"),
        (["--python", "/no/such/python"], "'/no/such/python' is not a Python"),
        (["--out", "file.txt"], "expected a name in .csv or .jsonl"),
        (["--repeats", "0"], "expected at least 1, found '0'"),
        (["--out", "no/such/file.csv"], "there is no folder no/such"),
        (["--libraries", "deepctr"], "none of deepctr is installed here"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
