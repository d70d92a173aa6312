"""PLE against a NumPy reference of its equations, and by its promises."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BINARY, assert_slopes, by_task, encoded, rows, slopes_by_task
from torch import nn

from mtl_annotated.cgc import CGC, CGCLayer
from mtl_annotated.features import Dense, Encoder, Sparse
from mtl_annotated.mmoe import MMoELayer
from mtl_annotated.ple import (
    LEVEL_SETTINGS,
    PLE,
    PLELayer,
    level_settings,
    streams_read,
)
from mtl_annotated.shared_bottom import MLP, Towers
from mtl_annotated.tasks import Task
from mtl_annotated.training import Replicas, evaluate, fit, predict


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


class Reference:
    """Equations 6 and 7 of the paper, from a state dict of single-layer experts.

    An expert is a row of the stacked weights of its level; a gate is as many rows
    of the level's gate weights as it sees experts. Gates without parameters, whose
    logits are all equal, are not in the state dict.
    """

    def __init__(self, state, tasks, counts):
        self.state = {name: value.detach().numpy() for name, value in state.items()}
        self.tasks, self.counts = tasks, counts

    def level(self, number, streams, shared_gate, learned):
        own, shared = self.counts[number]
        owners = [k for k in range(self.tasks) for _ in range(own[k])]
        owners += [self.tasks] * shared
        (name,) = {
            name.removesuffix(".weight")
            for name in self.state
            if name.startswith(f"levels.{number}.experts") and name.endswith("weight")
        }
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        experts = [
            np.tanh(streams[k] @ weight[e].T + bias[e]) for e, k in enumerate(owners)
        ]
        gates = self.state.get(f"levels.{number}.gates.weight")
        found, first = [], 0
        for k in range(self.tasks + shared_gate):
            everything = range(len(owners))
            seen = [
                e for e in everything if k == self.tasks or owners[e] in (k, self.tasks)
            ]
            logits = np.zeros((len(streams[0]), len(seen)))
            if learned[k] and len(seen) > 1:
                logits = streams[k] @ gates[first : first + len(seen)].T
                first += len(seen)
            weights = softmax(logits)
            found.append(sum(weights[:, [n]] * experts[e] for n, e in enumerate(seen)))
        assert gates is None or first == len(gates)
        return found

    def __call__(self, features):
        streams = [features] * (self.tasks + 1)
        for number in range(len(self.counts)):
            needed = self.needed(number)
            streams = self.level(number, streams, needed[-1], needed)
            if not needed[-1]:
                streams.append(np.full_like(streams[0], np.nan))
        return np.stack(streams[: self.tasks], axis=1)

    def needed(self, number):
        """Which streams someone reads, by following each from the outputs down."""
        if number == len(self.counts) - 1:
            return [True] * self.tasks + [False]
        above = self.needed(number + 1)
        own, shared = self.counts[number + 1]
        needed = []
        for k in range(self.tasks + 1):
            sees = sum(own) + shared if k == self.tasks else own[k] + shared
            readers = shared if k == self.tasks else own[k]
            needed.append(readers > 0 or (above[k] and sees > 1))
        return needed


@st.composite
def stacks(draw):
    """Tasks, and for each level own experts by task and shared ones, never none."""
    tasks = draw(st.integers(1, 5))
    levels = []
    for _ in range(draw(st.integers(1, 3))):
        shared = draw(st.integers(0, 3))
        least = 1 if shared == 0 else 0
        own = draw(st.lists(st.integers(least, 3), min_size=tasks, max_size=tasks))
        levels.append((own, shared))
    return tasks, levels


def built(tasks, counts, inputs=4, units=3, **options):
    levels = [{"own_experts": own, "shared_experts": s} for own, s in counts]
    return PLELayer(
        inputs, (units,), tasks=tasks, levels=levels, activation="tanh", **options
    ).double()


@settings(max_examples=60, deadline=None)
@given(stacks(), st.integers(1, 4), st.integers(1, 5))
def test_the_layer_equals_a_numpy_reference(stack, count, units):
    tasks, counts = stack
    layer = built(tasks, counts, units=units)
    x = torch.randn(count, 4, dtype=torch.float64)
    expected = Reference(layer.state_dict(), tasks, counts)(x.numpy())
    found = layer(x).detach().numpy()
    assert found.shape == (count, tasks, units)
    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)


def numpy_joint_loss(model, batch, counts):
    """Equations 6 to 9: streams, linear towers, a mean over each task's own rows."""
    trunk = Reference(model.trunk.state_dict(), len(model.tasks), counts)
    streams = trunk(model.embedding(batch).detach().numpy())
    state = {name: value.numpy() for name, value in by_task(model).items()}
    total = 0.0
    for k, task in enumerate(model.tasks):
        output = f"towers.{task.name}.output"
        weight, bias = state[f"{output}.weight"], state[f"{output}.bias"]
        logit = (streams[:, k] @ weight.T + bias)[:, 0]
        labels = batch.labels[:, k].numpy()
        inside = ~np.isnan(labels)
        probability = 1 / (1 + np.exp(-logit[inside]))
        right = np.where(labels[inside] == 1, probability, 1 - probability)
        total += task.weight * -np.log(right).sum() / inside.sum()
    return total


def test_the_joint_loss_counts_each_task_in_its_own_sample_space():
    tasks = [Task("click"), Task("purchase", given="click", weight=3.0)]
    encoder, batch = encoded(tasks, count=23)
    assert 0 < batch.labels[:, 1].isnan().sum() < 20
    counts = [([1, 2], 1), ([2, 1], 3)]
    levels = [{"own_experts": own, "shared_experts": s} for own, s in counts]
    sizes = {"expert_units": (5,), "tower_units": (), "activation": "tanh"}
    model = PLE(encoder, levels=levels, **sizes).double()
    expected = numpy_joint_loss(model, batch, counts)
    assert model.loss(batch).item() == pytest.approx(expected, abs=1e-10)


def test_a_weight_ratio_multiplies_the_weight_once_an_epoch():
    fading = Task("purchase", weight=4.0, weight_ratio=0.5)
    encoder, batch = encoded([Task("click"), fading])
    model = PLE(encoder, expert_units=(3,)).double()
    losses = model.losses(batch).detach()
    for epoch, weight in ((0, 4.0), (1, 2.0), (3, 0.5)):
        expected = losses[0] + weight * losses[1]
        assert model.joint(losses, epoch).item() == pytest.approx(expected.item())
    assert model.loss(batch).item() == pytest.approx(model.joint(losses).item())


def test_gradients_equal_finite_differences():
    encoder, batch = encoded(BINARY)
    torch.manual_seed(0)
    sizes = {"expert_units": (3,), "tower_units": (2,), "activation": "tanh"}
    model = PLE(encoder, own_experts=[1, 2], levels=3, gate_units=(2,), **sizes)
    model = model.double()
    assert_slopes(model, batch)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))
def test_one_level_is_cgc_to_the_last_bit(tasks, own, shared):
    counts = {"own_experts": own, "shared_experts": shared}
    ple = PLELayer(4, (3, 2), tasks=tasks, levels=1, **counts)
    cgc = CGCLayer(4, (3, 2), tasks=tasks, **counts)
    cgc.load_state_dict(ple.levels[0].state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(ple(x), cgc(x))


def test_a_model_of_one_level_is_cgc_with_equal_scores():
    encoder, batch = encoded(BINARY)
    torch.manual_seed(0)
    ple = PLE(encoder, levels=1).double()
    torch.manual_seed(0)
    cgc = CGC(encoder).double()
    assert torch.equal(ple(batch), cgc(batch))


def test_without_own_experts_it_is_a_stack_of_mmoe_layers():
    deep = PLELayer(4, (3,), tasks=2, own_experts=0, shared_experts=5).double()
    lower = MMoELayer(4, (3,), tasks=3, experts=5).double()
    upper = MMoELayer(3, (3,), tasks=2, experts=5).double()
    lower.load_state_dict(deep.levels[0].state_dict())
    upper.load_state_dict(deep.levels[1].state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    streams = lower(x)
    expected = upper.gates(streams[:, :2]) @ upper.experts(streams[:, 2])
    torch.testing.assert_close(deep(x), expected, rtol=0, atol=1e-12)


def test_without_shared_experts_tasks_are_separate_networks():
    layer = PLELayer(4, (3,), tasks=2, own_experts=2, shared_experts=0).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x)[:, 0].sum().backward()
    for level in layer.levels:
        weight = next(level.experts.parameters()).grad
        assert weight[:2].any()
        assert not weight[2:].any()


def test_a_number_of_levels_is_short_for_that_many_empty_mappings():
    torch.manual_seed(0)
    short = PLELayer(4, (3,), tasks=2, levels=3)
    torch.manual_seed(0)
    long = PLELayer(4, (3,), tasks=2, levels=[{}, {}, {}])
    x = torch.randn(5, 4)
    assert torch.equal(short(x), long(x))
    assert len(short.levels) == 3


@settings(max_examples=60, deadline=None)
@given(stacks(), st.integers(1, 3))
def test_every_parameter_gets_a_gradient_even_from_one_row(stack, units):
    tasks, counts = stack
    layer = built(tasks, counts, units=units)
    out = layer(torch.randn(1, 4, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    dead = [
        n for n, p in layer.named_parameters() if p.grad is None or (p.grad == 0).any()
    ]
    assert dead == []


def test_every_parameter_of_the_model_gets_a_gradient():
    encoder, batch = encoded([Task("click"), Task("stars", "multiclass", classes=3)])
    sizes = {"expert_units": (5, 4), "gate_units": (3,), "gate_bias": True}
    model = PLE(encoder, own_experts=2, levels=3, activation="tanh", **sizes).double()
    model.loss(batch).backward()
    table = {"embedding"}
    dead = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or (n.split(".")[0] not in table and not p.grad.all())
    ]
    assert dead == []


@settings(max_examples=20, deadline=None)
@given(stacks())
def test_no_two_experts_start_equal(stack):
    tasks, counts = stack
    layer = built(tasks, counts)
    for level, (own, shared) in zip(layer.levels, counts, strict=True):
        weight = next(level.experts.parameters()).detach().flatten(1)
        assert len(weight) == sum(own) + shared
        assert len(weight.unique(dim=0)) == len(weight)


READ = [
    # own and shared experts of level 2; streams of level 1 that are read
    ((1, 1), [True, True, True]),
    ((1, 0), [True, True, False]),
    ((0, 2), [True, True, True]),
    ((0, 1), [False, False, True]),
]


@pytest.mark.parametrize(("above", "expected"), READ)
def test_streams_that_are_read(above, expected):
    own, shared = above
    below = {"own_experts": 2, "shared_experts": 2}
    found = streams_read([below, {"own_experts": own, "shared_experts": shared}], 2)
    assert found == [expected, [True, True, False]]


def test_a_gate_without_a_choice_makes_the_gate_below_it_needless():
    top = {"own_experts": 0, "shared_experts": 1}
    middle = {"own_experts": 0, "shared_experts": 2}
    # The middle gates of the tasks are not read, so nobody reads what feeds them.
    assert streams_read([{}, middle, top], 2) == [
        [False, False, True],
        [False, False, True],
        [True, True, False],
    ]


def test_the_last_level_has_no_shared_gate():
    for levels in (1, 2, 3):
        layer = PLELayer(4, (3,), tasks=2, levels=levels)
        rows = [len(level.gates.weight) for level in layer.levels]
        # Two gates that see two experts, and below the top one that sees three.
        assert rows == [7] * (levels - 1) + [4]
        assert layer.levels[-1].gates.shape == (2, 3)


def test_the_shared_gate_sees_every_expert_not_only_shared_ones():
    layer = built(2, [([1, 1], 1), ([1, 1], 1)])
    streams = layer.levels[0](torch.randn(5, 4, dtype=torch.float64))
    weight = next(layer.levels[0].experts.parameters())
    streams[:, 2].square().sum().backward()
    assert weight.grad.flatten(1).any(1).tolist() == [True, True, True]


def test_an_own_expert_reaches_the_other_task_from_the_second_level_on():
    for levels, reaches in ((1, False), (2, True), (3, True)):
        layer = built(2, [([1, 1], 1)] * levels)
        layer(torch.randn(5, 4, dtype=torch.float64))[:, 1].square().sum().backward()
        clicks_own = next(layer.levels[0].experts.parameters()).grad[0]
        assert bool(clicks_own.any()) is reaches


def test_shared_experts_read_the_shared_stream_and_not_the_tasks():
    upper = built(2, [([1, 1], 2), ([1, 1], 2)]).levels[1]
    kept = []
    upper.experts.register_forward_hook(lambda *found: kept.append(found[-1]))
    streams = torch.randn(5, 3, 3, dtype=torch.float64)
    changed = streams.clone()
    changed[:, :2] += 1
    upper(streams)
    upper(changed)
    assert torch.equal(kept[0][:, 2:], kept[1][:, 2:])
    assert not torch.isclose(kept[0][:, :2], kept[1][:, :2]).any()


@pytest.mark.parametrize(("own", "shared"), [(1, 2), (3, 1), (2, 2)])
def test_shared_experts_are_as_many_as_asked_for_whatever_the_own_ones(own, shared):
    layer = PLELayer(4, (3,), tasks=2, own_experts=own, shared_experts=shared)
    for level in layer.levels:
        assert level.owners == [0] * own + [1] * own + [2] * shared
        assert next(level.experts.parameters()).shape[0] == 2 * own + shared


def test_each_task_gets_its_own_experts_where_tasks_and_experts_differ_in_number():
    layer = built(3, [([2, 1, 3], 1)])
    weight = next(layer.levels[0].experts.parameters())
    out = layer(torch.randn(5, 4, dtype=torch.float64))
    for k, own in enumerate([[0, 1], [2], [3, 4, 5]]):
        (slope,) = torch.autograd.grad(out[:, k].sum(), weight, retain_graph=True)
        reached = slope.flatten(1).any(1).nonzero().flatten().tolist()
        assert reached == [*own, 6]


def test_own_or_shared_experts_alone_are_enough():
    x = torch.randn(5, 4)
    for own, shared in ((0, 2), (2, 0), (0, 1), (1, 0)):
        layer = PLELayer(4, (3,), tasks=2, own_experts=own, shared_experts=shared)
        assert layer(x).shape == (5, 2, 3)


def test_towers_end_in_the_logits_of_their_task():
    encoder, batch = encoded([Task("click"), Task("stars", "multiclass", classes=3)])
    model = PLE(encoder, expert_units=(7,), tower_units=(5,)).double()
    assert model(batch).shape == (5, 4)


def test_a_gate_reads_its_stream_and_not_the_raw_input():
    layer = built(2, [([1, 1], 1), ([1, 1], 1)])
    x = torch.randn(5, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] += 10
    assert not torch.allclose(layer(x), layer(changed))
    with torch.no_grad():
        for name, parameter in layer.levels[0].named_parameters():
            if name.endswith("weight"):
                parameter[..., 0] = 0
    assert torch.equal(layer(x), layer(changed))


def test_permuting_shared_experts_with_their_gate_rows_changes_nothing():
    layer = built(2, [([1, 1], 3), ([1, 1], 3)])
    x = torch.randn(5, 4, dtype=torch.float64)
    before = layer(x)
    order = torch.tensor([0, 1, 4, 2, 3])
    gate = [0, 3, 1, 2]
    blocks = [torch.tensor(gate), 4 + torch.tensor(gate)]
    with torch.no_grad():
        for number, level in enumerate(layer.levels):
            for parameter in level.experts.parameters():
                parameter.copy_(parameter[order])
            wide = [] if number else [8 + order]
            level.gates.weight.copy_(level.gates.weight[torch.cat(blocks + wide)])
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)


def test_permuting_tasks_permutes_the_outputs():
    names = ["seconds", "click"]
    encoder, batch = encoded([Task("click"), Task("seconds", "regression")])
    first = PLE(encoder, expert_units=(3,), own_experts={"click": 1, "seconds": 1})
    first, second = (
        first.double(),
        PLE(encoder, expert_units=(3,), tasks=names).double(),
    )
    state = first.state_dict()
    for number, level in enumerate(first.trunk.levels):
        for name in (
            n for n in state if n.startswith(f"trunk.levels.{number}.experts")
        ):
            state[name] = state[name][[1, 0, 2]]
        gates = list(level.gates.weight.detach().split(2))
        swapped = [gates[1], gates[0], *gates[2:]]
        if number == 0:
            wide = level.gates.weight.detach()[4:]
            swapped = [gates[1], gates[0], wide[[1, 0, 2]]]
        state[f"trunk.levels.{number}.gates.weight"] = torch.cat(swapped)
    for name in (n for n in state if n.startswith("towers")):
        state[name] = state[name].flip(0)
    state["_extra_state"] = second.state_dict()["_extra_state"]
    second.load_state_dict(state)
    assert list(second.outputs) == names
    torch.testing.assert_close(second(batch), first(batch).flip(1), rtol=0, atol=1e-12)


def test_a_missing_label_changes_nothing_for_the_other_task():
    encoder, batch = encoded(BINARY, count=7)
    model = PLE(encoder, expert_units=(5,), tower_units=(3,)).double()
    model.losses(batch)[0].backward()
    alone = {name: slope.clone() for name, slope in slopes_by_task(model).items()}
    loss = model.losses(batch)[0].item()
    model.zero_grad()
    labels = batch.labels.clone()
    labels[:, 1] = torch.nan
    masked = replace(batch, labels=labels)
    assert model.losses(masked).tolist() == [loss, 0.0]
    model.loss(masked).backward()
    found = slopes_by_task(model)
    assert found.keys() == by_task(model).keys()
    for name, slope in found.items():
        if name.startswith("towers.purchase"):
            assert not slope.any(), name
        elif name.startswith("towers.click"):
            assert torch.equal(slope, alone[name]), name
        else:
            torch.testing.assert_close(slope, alone[name], rtol=0, atol=1e-14)


def test_levels_differ_in_what_their_mapping_says():
    levels = [{"own_experts": 2}, {"own_experts": 1, "expert_units": (32,)}]
    layer = PLELayer(4, (64,), tasks=2, levels=levels)
    lower, upper = (next(level.experts.parameters()) for level in layer.levels)
    assert lower.shape == (5, 64, 4)
    assert upper.shape == (3, 32, 64)
    assert layer.width == 32


def test_own_experts_by_name_on_one_level():
    encoder, _ = encoded(BINARY)
    levels = [{"own_experts": {"purchase": 3, "click": 1}}, {}]
    model = PLE(encoder, levels=levels, expert_units=(3,))
    assert model.trunk.levels[0].owners == [0, 1, 1, 1, 2]
    assert model.trunk.levels[1].owners == [0, 1, 2]


EXAMPLES = {
    "own_experts": 2,
    "shared_experts": 2,
    "expert_units": (5, 4),
    "expert_bias": False,
    "gate_units": (3,),
    "gate_bias": True,
    "gate_temperature": 2.0,
    "gate_dropout": 0.5,
    "activation": "gelu",
    "normalization": "layer",
    "dropout": 0.5,
    "initializer": "orthogonal",
}


@pytest.mark.parametrize("name", LEVEL_SETTINGS)
def test_every_level_setting_works_on_one_level_and_changes_the_layer(name):
    layers = []
    for level in ({}, {name: EXAMPLES[name]}):
        torch.manual_seed(0)
        layers.append(PLELayer(4, (3,), tasks=2, levels=[{}, level]))
    x = torch.randn(50, 4)
    plain, changed = (layer(x) for layer in layers)
    assert plain.shape != changed.shape or not torch.allclose(plain, changed)


def test_settings_are_merged_and_the_level_wins():
    common = {"own_experts": 1, "shared_experts": 2}
    levels = [{}, {"own_experts": 3}]
    found = level_settings(levels, common)
    assert found == [common, {"own_experts": 3, "shared_experts": 2}]
    assert levels == [{}, {"own_experts": 3}]


def test_initializers_and_biases_reach_experts_gates_and_towers():
    encoder, _ = encoded(BINARY)
    model = PLE(encoder, expert_units=(7,), expert_bias=False, tower_bias=False)
    assert not any(
        "bias" in name for name in model.state_dict() if "bedding" not in name
    )
    torch.manual_seed(0)
    one = PLE(encoder, expert_units=(7,), initializer="orthogonal")
    weight = one.trunk.levels[1].experts["7"][0].weight[0].detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(7), rtol=0, atol=1e-5)


def test_parameter_names_are_readable():
    encoder, _ = encoded(BINARY)
    model = PLE(encoder, expert_units=(5,), tower_units=())
    names = [name for name in model.state_dict() if name.startswith("t")]
    assert names == [
        "trunk.levels.0.experts.5.0.weight",
        "trunk.levels.0.experts.5.0.bias",
        "trunk.levels.0.gates.weight",
        "trunk.levels.1.experts.5.0.weight",
        "trunk.levels.1.experts.5.0.bias",
        "trunk.levels.1.gates.weight",
        "towers.1.0.weight",
        "towers.1.0.bias",
    ]


def test_saving_and_loading_gives_equal_bits(tmp_path):
    encoder, batch = encoded(BINARY)
    model, other = PLE(encoder).double(), PLE(encoder).double()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))


def test_two_models_from_one_encoder_share_no_storage():
    encoder, _ = encoded(BINARY)
    first, second = PLE(encoder), PLE(encoder)
    owned = {p.data_ptr() for p in first.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in second.parameters())


def test_training_with_mixed_kinds_lowers_the_loss():
    tasks = [
        Task("click"),
        Task("purchase", given="click", weight=2.0, weight_ratio=0.9),
        Task("stars", "multiclass", classes=3),
        Task("seconds", "regression"),
    ]
    encoder = Encoder([Sparse("item", width=3), Dense("price")], tasks).fit(rows(101))
    batch = encoder.transform(rows(200))
    torch.manual_seed(0)
    model = PLE(encoder, levels=3, expert_units=(8,), tower_units=(4,))
    before = model.loss(batch).item()
    fit(model, batch, epochs=5, batch_size=20, learning_rate=0.01, progress=False)
    assert model.loss(batch).item() < before - 0.1
    assert list(evaluate(model, batch).index) == [task.name for task in tasks]
    scores = predict(model, batch)
    assert list(scores) == [
        "click",
        "purchase",
        "stars=0",
        "stars=1",
        "stars=2",
        "seconds",
    ]
    assert np.isfinite(scores.to_numpy()).all()


def test_one_row_one_unit_one_task():
    encoder, batch = encoded([Task("click")], count=1)
    model = PLE(encoder, expert_units=(1,), tower_units=(1,), levels=3).double()
    assert model(batch).shape == (1, 1)
    assert model.loss(batch).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_close(dtype):
    encoder, batch = encoded(BINARY, count=20)
    torch.manual_seed(0)
    model = PLE(encoder, expert_units=(8,)).double()
    exact = model(batch)
    lower = model.to(dtype)(batch.to(dtype=dtype))
    assert lower.dtype == dtype
    error = (lower.double() - exact).abs().max().item()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_replicas_compute_what_each_layer_computes_alone():
    def network():
        trunk = PLELayer(4, (3,), tasks=2, levels=3)
        return nn.Sequential(trunk, Towers(3, BINARY, ())).double()

    networks = [network() for _ in range(3)]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = torch.stack([each(own) for each, own in zip(networks, x, strict=True)])
    torch.testing.assert_close(Replicas(networks)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiles_and_exports_and_refuses_wrong_types_of_levels():
    # In its own process: the shape checks of this one are not traceable, and they
    # stop a wrong type before the package can say what is wrong.
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import torch
from test_ple import BINARY, PLE, PLELayer, encoded, level_settings, no_levels
encoder, batch = encoded(BINARY)
levels = [{{"own_experts": [1, 2]}}, {{"shared_experts": 2}}, {{"own_experts": 0}}]
model = PLE(encoder, levels=levels, expert_units=(5,), tower_units=(3,)).double()
compiled = torch.compile(model, backend="eager", fullgraph=True)
assert torch.equal(compiled(batch), model(batch))
layer = PLELayer(4, (5,), tasks=2, levels=levels[:2]).double().eval()
rows = torch.export.Dim("rows")
x = torch.randn(5, 4, dtype=torch.float64)
exported = torch.export.export(layer, (x,), dynamic_shapes=({{0: rows}},)).module()
for count in (2, 5, 17):
    x = torch.randn(count, 4, dtype=torch.float64)
    assert torch.allclose(exported(x), layer(x), rtol=0, atol=1e-12)
assert len(level_settings(np.int64(2), {{}})) == 2
for found in (2.0, "2", {{"own_experts": 2}}, [{{}}, 2], None):
    try:
        level_settings(found, {{}})
    except ValueError as error:
        assert str(error) == no_levels(repr(found)), error
    else:
        raise AssertionError(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def layer(**options):
    return PLELayer(4, (3,), tasks=2, **options)


def model(**options):
    return PLE(encoded(BINARY)[0], **options)


def no_levels(found):
    return (
        "levels: expected a number of at least 1, or a mapping of settings for each"
        f" level such as [{{'own_experts': 2}}, {{}}]; found {found}"
    )


def unknown_setting(name):
    valid = ", ".join(LEVEL_SETTINGS)
    return f"unknown setting {name!r} of a level, choose from {valid}"


REFUSALS = [
    (lambda: layer(levels=0), no_levels("0")),
    (lambda: layer(levels=-1), no_levels("-1")),
    (lambda: layer(levels=[]), no_levels("[]")),
    (lambda: level_settings(True, {}), no_levels("True")),
    (
        lambda: layer(levels=[{}, {"activation": "Relu"}]),
        "levels[1]: unknown activation 'Relu', choose from relu, gelu, silu, tanh,"
        " identity",
    ),
    (
        lambda: layer(levels=[{"gate_temperature": 0.0}, {}]),
        "levels[0]: gate_temperature must be above 0, found 0.0",
    ),
    (
        lambda: model(levels=[{}, {"own_experts": {"click": 1, "buy": 1}}]),
        "levels[1]: own_experts names the tasks ['buy', 'click'], expected"
        " ['click', 'purchase']",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_refuses_with_a_message_that_names_the_culprit(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


# Refusals of a CGC layer, with the level in front.
REFUSED_BY_A_LEVEL = [
    (
        lambda: layer(levels=[{}, {"own_experts": [1, 2, 3]}]),
        r"levels\[1\]: own_experts: expected .*; found \[1, 2, 3\]",
    ),
    (
        lambda: layer(levels=[{"own_experts": -1}, {}]),
        r"levels\[0\]: own_experts: expected .*; found -1",
    ),
    (
        lambda: layer(levels=[{}, {"shared_experts": -1}]),
        r"levels\[1\]: shared_experts: expected .*; found -1",
    ),
    (
        lambda: layer(levels=[{}, {"own_experts": [1, 0], "shared_experts": 0}]),
        r"levels\[1\]: own_experts, shared_experts: task 1.* no expert.*",
    ),
]


@pytest.mark.parametrize(("build", "pattern"), REFUSED_BY_A_LEVEL)
def test_refuses_with_the_number_of_the_level(build, pattern):
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        build()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: layer(levels=[{}, {"own_expert": 2}]), "own_expert"),
        (lambda: layer(levels=[{}, {"shared_gate": True}]), "shared_gate"),
        (lambda: layer(units=3), "units"),
        (lambda: model(experts=3), "experts"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_valid_ones(build, name):
    with pytest.raises(TypeError, match=f"^{re.escape(unknown_setting(name))}$"):
        build()


def test_level_settings_are_all_that_cgc_and_its_experts_take():
    import inspect

    taken = {
        *inspect.signature(CGCLayer.__init__).parameters,
        *inspect.signature(MLP.__init__).parameters,
    }
    given_by_ple = {"self", "inputs", "tasks", "shared_gate", "learned", "options"}
    assert taken - given_by_ple - {"units", "bias"} == set(LEVEL_SETTINGS)


# What the chapter says of its experiment must stand in the outputs beside it.


@pytest.fixture(scope="module")
def gains():
    """Mean and half interval over both tasks, as the stored notebook prints them."""
    path = Path(__file__).parents[1] / "book" / "ple.ipynb"
    outputs = [
        "".join(output.get("text", ""))
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", [])
    ]
    line = re.compile(r"(\S+) +p = (\S+) .* ([+-][\d.]+) ± ([\d.]+)\n")
    found = {
        (runner, float(p)): (float(mean), float(half))
        for runner, p, mean, half in line.findall("\n".join(outputs))
    }
    assert len(found) == 21
    return found


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_chapter_shows_that_mmoe_loses_where_tasks_differ_and_ple_loses_less(
    gains, p
):
    mean, half = gains["MMoE", p]
    assert -2.0 < mean < mean + 2 * half < 0
    for pair in ("CGC-MMoE", "PLE-MMoE"):
        mean, half = gains[pair, p]
        assert mean - half > 0
    mean, half = gains["PLE-CGC", p]
    assert abs(mean) < half


def test_the_chapter_shows_a_gain_of_mmoe_and_ple_on_one_task_twice(gains):
    for runner in ("MMoE", "PLE", "PLE-CGC"):
        mean, half = gains[runner, 1.0]
        assert 0 < mean - half < mean < 1.5
    mean, half = gains["PLE-MMoE", 1.0]
    assert abs(mean) < half
