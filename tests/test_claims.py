"""What the prose says of an experiment must hold in the outputs that stand beside it.

nbval checks that the outputs are reproduced; this checks that the words fit them, so
that a changed seed or size cannot leave a sentence behind.
"""

import re
from pathlib import Path

import nbformat
import pytest

from mtl_annotated.weaving import results

BOOK = Path(__file__).parents[1] / "book"
GAIN = re.compile(r"(\d+) labels\s+(.+?)\s+([+-][\d.]+) ± ([\d.]+)")


def printed(name):
    """All text that a stored notebook prints or shows."""
    cells = nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    texts = [
        out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs
    ]
    return "\n".join(texts)


def test_every_test_that_the_museum_names_is_there():
    text = (BOOK / "museum.md").read_text(encoding="utf-8")
    _, rooms = text.split("\n## Room 1", 1)
    caught = re.findall(r"^- \*\*Caught by\*\*: (.*)$", rooms, re.MULTILINE)
    assert len(caught) == rooms.count("\n### ") == 30
    named = 0
    for line in caught:
        for name, file in re.findall(r"`(test_\w+)(\.py)?`", line):
            if file:
                source = (Path(__file__).parent / f"{name}.py").read_text()
            else:
                assert f"def {name}(" in source, name
                named += 1
    assert named > 40


@pytest.fixture(scope="module")
def gains():
    found = {
        (int(labels), runner): (float(mean), float(half))
        for labels, runner, mean, half in GAIN.findall(printed("shared_bottom"))
    }
    assert len(found) == 8
    return found


def test_scarce_labels_of_the_same_task_gain_nearly_half_of_the_error(gains):
    mean, half = gains[100, "shared, p = 1"]
    single = float(
        re.search(r"100 +single +1\.0 +([\d.]+)", printed("shared_bottom"))[1]
    )
    assert 0.4 * single < mean - half / 2 < mean < 0.5 * single


@pytest.mark.parametrize("runner", ["shuffled", "shared, p = 0.5", "shared, p = 0"])
def test_scarce_labels_gain_nothing_from_other_tasks_or_shuffled_labels(gains, runner):
    mean, half = gains[100, runner]
    assert abs(mean) <= half


def test_plenty_of_labels_and_different_tasks_cost(gains):
    text = printed("shared_bottom")
    single = float(re.search(r"4000 +single +1\.0 +([\d.]+)", text)[1])
    for runner in ("shared, p = 0.5", "shared, p = 0"):
        mean, half = gains[4000, runner]
        assert mean + half < -0.03
        assert 0.6 < -mean / single < 0.85
    assert abs(gains[4000, "shared, p = 1"][0]) < 0.015
    mean, half = gains[4000, "shuffled"]
    assert abs(mean) <= half


def test_a_wider_bottom_removes_most_of_the_cost():
    found = re.search(
        r"bottom of 12: ([\d.]+)  of 24: ([\d.]+)  single task: ([\d.]+)",
        printed("shared_bottom"),
    )
    tight, wide, single = map(float, found.groups())
    assert wide - single < 0.3 * (tight - single)


def test_a_reversed_task_is_as_good_as_the_same():
    found = re.search(
        r"p = -1: ([\d.]+)  p = 1: ([\d.]+)  single task: ([\d.]+)",
        printed("shared_bottom"),
    )
    flipped, same, single = map(float, found.groups())
    assert abs(flipped - same) < 0.5 * (single - flipped)


NETWORKS = ("single task", "SharedBottom", "MMoE", "CGC", "PLE")


def adult(model, with_relationship):
    table = printed("adult").split("True  logistic", 1)[1].split("False ", 1)
    text = "logistic" + table[0] if with_relationship else table[1]
    income, _, never, _ = re.search(
        rf"{model} +(\S+) +(\S+) +(\S+) +(\S+)", text
    ).groups()
    return float(income), float(never)


def test_adult_lands_where_the_floors_are_known_to_be():
    assert adult("logistic regression", True) == pytest.approx(
        (0.904, 0.962), abs=0.002
    )
    assert adult("boosted trees", True) == pytest.approx((0.926, 0.963), abs=0.002)
    assert adult("SharedBottom", True) == pytest.approx((0.909, 0.963), abs=0.003)


def test_adult_trees_lead_and_one_column_makes_the_second_task():
    for kept in (True, False):
        trees = adult("boosted trees", kept)
        for model in NETWORKS:
            assert adult(model, kept)[0] < trees[0]
    for model in ("logistic regression", "boosted trees", *NETWORKS):
        assert adult(model, True)[1] > 0.96
        assert adult(model, False)[1] < 0.89


def test_on_adult_the_networks_score_alike_and_as_the_page_says():
    scores = results("adult")
    assert (
        scores.groupby(["relationship", "model", "label"])["seed"].nunique() == 5
    ).all()
    kept = scores[scores["relationship"]].groupby(["model", "label"])["auc"].mean()
    for model in ("SharedBottom", "MMoE", "CGC", "PLE"):
        assert kept[model, "income"] == pytest.approx(0.909, abs=0.002)
        assert kept[model, "never_married"] == pytest.approx(0.964, abs=0.001)
    wide = scores.pivot_table(
        index=["relationship", "label", "seed"], columns="model", values="auc"
    )
    difference = wide.sub(wide["single task"], axis=0)
    means = difference.groupby(["relationship", "label"]).mean()
    assert means.abs().to_numpy().max() < 0.001
    assert re.search(r"differences: 16 beyond their interval: 1\n", printed("adult"))


def test_adult_refuses_its_labels_as_a_funnel_with_their_share():
    assert "95.3% of 9624 conversions" in printed("adult")


def test_one_gate_pays_more_than_a_gate_a_task_as_the_tasks_part():
    text = printed("mmoe")
    rises = {
        name: (float(mean), float(half))
        for name, mean, half in re.findall(
            r"^(\S+(?: bottom)?) +rises .* by ([\d.]+) ± ([\d.]+)$", text, re.MULTILINE
        )
    }
    assert len(rises) == 4
    assert rises["OMoE"][0] - rises["OMoE"][1] > 3 * sum(rises["MMoE"])
    against = {
        (name, float(p)): (float(mean), float(half))
        for name, p, mean, half in re.findall(
            r"^(\S+(?: bottom)?) +minus MMoE at p = +(\S+): (-?[\d.]+) ± ([\d.]+)$",
            text,
            re.MULTILINE,
        )
    }
    assert len(against) == 9
    assert abs(against["OMoE", 1][0]) <= against["OMoE", 1][1]
    for p in (0.5, 0):
        assert against["OMoE", p][0] - against["OMoE", p][1] > 0
    assert all(against["wide bottom", p][0] < 0.001 for p in (1, 0.5, 0))


def test_clones_stay_clones_at_the_low_rate():
    cosine = {
        (rate, start): float(value)
        for rate, start, value in re.findall(
            r"rate (\S+) +(\w+) +cosine ([\d.]+)", printed("mmoe")
        )
    }
    assert cosine["0.003", "cloned"] >= 0.88
    assert cosine["0.003", "drawn"] <= 0.6
    assert cosine["0.03", "cloned"] - cosine["0.03", "drawn"] < 0.15


def test_own_experts_tilt_the_seesaw():
    text = printed("cgc")
    number = r"([+-][\d.]+) ± ([\d.]+)"
    gains = {
        (int(steps), int(p), runner.strip()): tuple(map(float, values))
        for steps, p, runner, *values in re.findall(
            rf"^ *(\d+)  (\d)  ([\w ]+?) +{number} +{number}$", text, re.MULTILINE
        )
    }
    assert len(gains) == 12
    first, _, second, half = gains[400, 1, "shared bottom"]
    assert first > 0.05
    assert second + half < -0.03
    for runner in ("MMoE", "CGC"):
        for p in (1, 0):
            _, _, second, half = gains[400, p, runner]
            assert second + half > 0
    saved = {
        (int(steps), int(p)): tuple(map(float, values))
        for steps, p, *values in re.findall(
            rf"^ *(\d+) steps, p = (\d): +first task {number} +second task {number}$",
            text,
            re.MULTILINE,
        )
    }
    first, first_half, second, second_half = saved[1600, 1]
    assert first + first_half < 0 < second - second_half
    first, first_half, second, second_half = saved[1600, 0]
    assert abs(first) < first_half
    assert abs(second) < second_half


def test_esmm_gains_where_clicks_and_purchases_share_a_cause_and_stays_biased():
    rows = results("esmm")
    rows = rows[rows["hidden"] == 0]
    wide = rows.pivot_table(
        index=["bias", "click_rate", "seed"], columns="runner", values="auc_all"
    )
    assert wide.groupby(["bias", "click_rate"]).size().eq(10).all()
    gain = wide["ESMM"] - wide["BASE"]
    table = gain.groupby(["bias", "click_rate"]).agg(["mean", "std"])
    half = 2.26 * table["std"] / 10**0.5
    for bias in (1, 2):
        assert (table["mean"] - half).loc[bias].min() > 0
    assert (table["mean"].abs() < half).loc[0].all()
    ratio = rows[rows["runner"] == "ESMM"].groupby(["bias", "click_rate"])["ratio_all"]
    biased = ratio.mean().loc[[1, 2]]
    assert biased.min() == pytest.approx(1.11, abs=0.01)
    assert biased.max() == pytest.approx(1.29, abs=0.01)
