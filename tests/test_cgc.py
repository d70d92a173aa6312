"""CGC against a NumPy reference, by its equivalences, and by its promises."""

import inspect
import re
import subprocess
import sys
from itertools import count, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import BINARY, assert_slopes, by_task, encoded, slopes_by_task

from mtl_annotated.cgc import CGC, CGCLayer, expert_counts
from mtl_annotated.mmoe import MMoE, MMoELayer
from mtl_annotated.shared_bottom import SharedBottom, SharedBottomLayer
from mtl_annotated.tasks import Task
from mtl_annotated.training import Replicas, fit


def named(number):
    return [Task(f"t{k}", label="click") for k in range(number)]


def built(**options):
    return CGC(encoded(BINARY)[0], **options)


def layer_of(own=(2, 1), shared=1, inputs=7, units=(11,), seed=0, **options):
    torch.manual_seed(seed)
    return CGCLayer(
        inputs,
        units,
        tasks=len(own),
        own_experts=list(own),
        shared_experts=shared,
        **options,
    ).double()


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The reference: the paper's equations 2 to 5, one task, one expert, one row at a time.


def numpy_mlp(state, prefix, x, copy=None):
    """ReLU layers in the order of their numbers, of one copy if they are stacked."""
    for n in range(64):
        if f"{prefix}.{n}.weight" not in state:
            continue
        weight, bias = state[f"{prefix}.{n}.weight"], state.get(f"{prefix}.{n}.bias")
        if copy is not None:
            weight, bias = weight[copy], None if bias is None else bias[copy]
        x = np.maximum(weight @ x + (0 if bias is None else bias), 0)
    return x


def numpy_trunk(state, x, own, shared, shapes, temperature=1.0):
    """The tasks' mixtures of one row: equations 2, 3 and 4."""
    seen: dict[str, count] = {}
    outputs = []
    for shape in shapes:
        stack = "x".join(map(str, shape))
        copy = next(seen.setdefault(stack, count()))
        outputs.append(numpy_mlp(state, f"trunk.experts.{stack}", x, copy))
    mine = np.split(np.arange(sum(own)), np.cumsum(own)[:-1])
    everybody = list(range(sum(own), sum(own) + shared))
    row, gate, mixtures = 0, 0, []
    for k in range(len(own)):
        sight = [*mine[k], *everybody]
        weights = np.ones(1)
        if len(sight) > 1:
            hidden = numpy_mlp(state, "trunk.gates.hidden", x, gate)
            links = slice(row, row + len(sight))
            logits = state["trunk.gates.weight"][links] @ hidden
            if "trunk.gates.bias" in state:
                logits = logits + state["trunk.gates.bias"][links]
            weights = np.exp(logits / temperature)
            weights /= weights.sum()
            row, gate = row + len(sight), gate + 1
        mixtures.append(
            sum(w * outputs[e] for w, e in zip(weights, sight, strict=True))
        )
    return mixtures


def numpy_logits(model, batch, own, shared, shapes, temperature=1.0):
    state = {name: value.numpy() for name, value in by_task(model).items()}
    found = []
    for x in model.embedding(batch).detach().numpy():
        mixtures = numpy_trunk(state, x, own, shared, shapes, temperature)
        row = []
        for task, mixture in zip(model.tasks, mixtures, strict=True):
            top = numpy_mlp(state, f"towers.{task.name}.hidden", mixture)
            output = f"towers.{task.name}.output"
            row.extend(state[f"{output}.weight"] @ top + state[f"{output}.bias"])
        found.append(row)
    return np.array(found)


def numpy_loss(logits, labels):
    """The sum of the tasks' mean cross-entropies, from probabilities."""
    probability = 1 / (1 + np.exp(-logits))
    chosen = np.where(labels == 1, probability, 1 - probability)
    return -np.log(chosen).mean(axis=0).sum()


@st.composite
def experts(draw, least=1):
    """Own experts of each task, and shared ones; every task sees at least one."""
    own = draw(st.lists(st.integers(0, 3), min_size=least, max_size=5))
    shared = draw(st.integers(0, 3))
    assume(shared or min(own))
    return own, shared


@settings(max_examples=25, deadline=None)
@given(experts(), st.data())
def test_logits_and_loss_equal_a_numpy_reference(counts, data):
    (own, shared), number = counts, sum(counts[0]) + counts[1]
    last = data.draw(st.integers(1, 4))
    shape = st.lists(st.integers(1, 4), max_size=1).map(lambda first: (*first, last))
    shapes = data.draw(st.lists(shape, min_size=number, max_size=number))
    gate_units = data.draw(st.sampled_from([(), (3,), (2, 5)]))
    options = {
        "gate_bias": data.draw(st.booleans()),
        "gate_temperature": data.draw(st.sampled_from([0.5, 1.0, 3.0])),
        "expert_bias": data.draw(st.booleans()),
    }
    encoder, batch = encoded(named(len(own)), data.draw(st.integers(1, 4)))
    model = CGC(
        encoder,
        own_experts=own,
        shared_experts=shared,
        expert_units=shapes,
        gate_units=gate_units,
        tower_units=(2,),
        **options,
    ).double()
    temperature = options["gate_temperature"]
    expected = numpy_logits(model, batch, own, shared, shapes, temperature)
    found = model(batch)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-10, rtol=0)
    loss = numpy_loss(expected, batch.labels.numpy())
    assert model.loss(batch).item() == pytest.approx(loss, abs=1e-10)


def test_gradients_equal_finite_differences():
    encoder, batch = encoded(BINARY)
    torch.manual_seed(0)
    model = CGC(
        encoder,
        own_experts={"click": 2, "purchase": 1},
        expert_units=(3,),
        gate_units=(2,),
        tower_units=(3,),
        gate_bias=True,
        activation="tanh",
    ).double()
    assert_slopes(model, batch)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("gate", [(), (3,)])
def test_without_own_experts_it_is_mmoe_to_the_last_bit(number, gate):
    encoder, batch = encoded(BINARY)
    options = {"expert_units": (6, 5), "gate_units": gate, "tower_units": (3,)}
    model = CGC(encoder, own_experts=0, shared_experts=number, **options).double()
    twin = MMoE(encoder, experts=number, **options).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(batch), twin(batch))
    model.loss(batch).backward()
    twin.loss(batch).backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_one_shared_expert_makes_the_layer_a_shared_bottom_to_the_last_bit():
    layer, bottom = layer_of((0, 0), 1), SharedBottomLayer(7, (11,), tasks=2).double()
    assert list(layer.state_dict()) == ["experts.11.0.weight", "experts.11.0.bias"]
    with torch.no_grad():
        bottom.bottom[0].weight.copy_(layer.experts["11"][0].weight[0])
        bottom.bottom[0].bias.copy_(layer.experts["11"][0].bias[0])
    x = drawn(5, 7)
    assert torch.equal(layer(x), bottom(x))


def test_without_shared_experts_each_task_is_a_mixture_alone():
    layer, x = layer_of((3, 2), 0), drawn(5, 7)
    stack, found = layer.experts["11"][0], layer(x)
    links = layer.gates.weight.split([3, 2])
    for task, (first, last) in enumerate(((0, 3), (3, 5))):
        alone = MMoELayer(7, (11,), tasks=1, experts=last - first).double()
        with torch.no_grad():
            alone.experts["11"][0].weight.copy_(stack.weight[first:last])
            alone.experts["11"][0].bias.copy_(stack.bias[first:last])
            alone.gates.weight.copy_(links[task])
        torch.testing.assert_close(found[:, task], alone(x)[:, 0], rtol=0, atol=1e-14)


def reached(layer, features, reader, owner):
    """The gradient of one reader's output for the weights of each owner's experts."""
    layer.zero_grad()
    layer(features)[:, reader].square().sum().backward()
    (stack,) = layer.experts.values()
    chosen = [e for e, k in enumerate(layer.owners) if k == owner]
    return stack[0].weight.grad[chosen]


@settings(max_examples=20, deadline=None)
@given(experts(least=2))
def test_a_task_reaches_its_own_experts_and_the_shared_ones_and_no_other(counts):
    own, shared = counts
    layer, x = layer_of(own, shared, activation="tanh"), drawn(5, 7)
    for task in range(len(own)):
        for owner in range(len(own) + 1):
            slopes = reached(layer, x, task, owner)
            wanted = owner in (task, len(own))
            assert (slopes != 0).any((1, 2)).tolist() == [wanted] * len(slopes)


@pytest.mark.parametrize("perturbed", range(6))
def test_changing_an_expert_changes_exactly_the_tasks_that_see_it(perturbed):
    # Three tasks with two experts each: an index that strides by tasks would mix.
    layer, x = layer_of((2, 2, 2), 0, activation="tanh"), drawn(5, 7)
    before = layer(x)
    with torch.no_grad():
        layer.experts["11"][0].weight[perturbed] += 1
    after = layer(x)
    same = [torch.equal(before[:, k], after[:, k]) for k in range(3)]
    assert same == [k != perturbed // 2 for k in range(3)]


def test_the_weight_of_another_tasks_expert_is_exactly_zero():
    layer, x = layer_of((2, 1), 1), drawn(5, 7)
    weights = layer.gates(x)
    assert weights.shape == (5, 2, 4)
    assert not weights[:, 0, 2].any()
    assert not weights[:, 1, :2].any()
    torch.testing.assert_close(weights.sum(2), torch.ones(5, 2).double())


def test_the_shared_gate_sees_every_expert_not_only_the_shared_ones():
    layer = layer_of((2, 1), 1, shared_gate=True)
    weights = layer.gates(drawn(5, 7))
    assert weights.shape == (5, 3, 4)
    assert (weights[:, 2] > 0).all()
    assert layer(drawn(5, 7)).shape == (5, 3, 11)


def test_no_shared_experts_does_not_mean_that_all_experts_are_shared():
    layer, x = layer_of((2, 2), 0), drawn(5, 7)
    assert (layer.gates(x) > 0)[0].tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]
    assert layer(x).shape == (5, 2, 11)


@pytest.mark.parametrize(("own", "shared"), [(0, 2), (2, 0), ((0, 2), 1)])
def test_a_group_of_experts_may_be_empty(own, shared):
    encoder, batch = encoded(BINARY)
    model = CGC(encoder, own_experts=own, shared_experts=shared, activation="tanh")
    model.double().loss(batch).backward()
    assert all(p.grad.any() for p in model.trunk.parameters())


def test_experts_are_told_apart_when_tasks_and_experts_a_task_differ_in_number():
    layer = layer_of((3, 3), 2)
    assert layer.owners == [0, 0, 0, 1, 1, 1, 2, 2]
    sight = (layer.gates(drawn(1, 7))[0] > 0).int().tolist()
    assert sight == [[1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("own", "shared"), [(1, 3), (3, 1), (0, 2)])
def test_the_number_of_shared_experts_is_not_that_of_own_ones(own, shared):
    layer = layer_of((own, own), shared)
    assert layer.owners.count(2) == shared
    assert layer.owners.count(0) == layer.owners.count(1) == own
    assert layer.experts["11"][0].weight.shape == (2 * own + shared, 11, 7)


@settings(max_examples=20, deadline=None)
@given(experts(), st.integers(1, 3))
def test_no_expert_starts_as_the_clone_of_another(counts, units):
    layer = layer_of(*counts, units=(units,))
    weight = layer.experts[str(units)][0].weight.flatten(1)
    assert len(weight.unique(dim=0)) == len(weight)
    gates = layer.gates.weight
    assert gates is None or len(gates.unique(dim=0)) == len(gates)


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_a_rows_gate_does_not_depend_on_its_batch(normalization):
    layer = layer_of(normalization=normalization, gate_units=(3,)).train()
    x = drawn(5, 7)
    together, alone = layer.gates(x), layer.gates(x[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-15)
    if normalization == "none":
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=0, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(experts(), st.sampled_from([(), (2,)]), st.integers(1, 3))
def test_every_parameter_gets_a_gradient_even_from_one_row(counts, gate, units):
    own, shared = counts
    encoder, batch = encoded(named(len(own)), count=1)
    torch.manual_seed(0)
    model = CGC(
        encoder,
        own_experts=own,
        shared_experts=shared,
        expert_units=(units,),
        gate_units=gate,
        tower_units=(2,),
        activation="tanh",
    ).double()
    model.loss(batch).backward()
    networks = [*model.trunk.named_parameters(), *model.towers.named_parameters()]
    without = [n for n, p in networks if p.grad is None or not p.grad.all()]
    assert without == []


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(2)))
def test_the_order_of_a_tasks_experts_does_not_matter(own, shared):
    layer, x = layer_of((3, 1), 2, gate_bias=True), drawn(5, 7)
    expected = layer(x)
    new = [*own, 3, *(4 + s for s in shared)]
    # The first gate's rows: own 0 1 2, shared 4 5. The second's: own 3, shared 4 5.
    links = [*own, *(3 + s for s in shared), 5, *(6 + s for s in shared)]
    stack = layer.experts["11"][0]
    with torch.no_grad():
        for values, order in (
            (stack.weight, new),
            (stack.bias, new),
            (layer.gates.weight, links),
            (layer.gates.bias, links),
        ):
            values.copy_(values[order])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_permuting_the_tasks_permutes_the_outputs(order):
    own = [2, 0, 1]
    layer, x = layer_of(own, 2), drawn(5, 7)
    other = layer_of([own[k] for k in order], 2, seed=5)
    starts = np.cumsum([0, *own])
    experts = [e for k in order for e in range(starts[k], starts[k + 1])] + [3, 4]
    links = layer.gates.weight.split([4, 2, 3])
    with torch.no_grad():
        for mine, its in zip(
            other.experts.parameters(), layer.experts.parameters(), strict=True
        ):
            mine.copy_(its[experts])
        other.gates.weight.copy_(torch.cat([links[k] for k in order]))
    torch.testing.assert_close(other(x), layer(x)[:, order], rtol=0, atol=1e-14)


def test_the_order_of_the_names_is_the_order_of_the_own_experts():
    counts = {"click": 2, "purchase": 0}
    encoder, _ = encoded(BINARY)
    assert CGC(encoder, own_experts=counts).trunk.owners == [0, 0, 2]
    turned = CGC(encoder, own_experts=counts, tasks=["purchase", "click"])
    assert turned.trunk.owners == [1, 1, 2]


def test_a_missing_label_changes_nothing_for_the_other_task():
    encoder, batch = encoded(BINARY, count=7)
    options = {"own_experts": 2, "expert_units": (5,), "tower_units": (3,)}
    model = CGC(encoder, **options).double()
    losses = model.losses(batch)
    losses[0].backward()
    expected = slopes_by_task(model)
    batch.labels[:, 1] = torch.nan
    model.zero_grad()
    assert torch.equal(model.losses(batch)[0], losses[0])
    model.loss(batch).backward()
    assert not model.trunk.experts["5"][0].weight.grad[2:4].any()
    found = slopes_by_task(model)
    assert found.keys() == by_task(model).keys()
    for name, slope in found.items():
        assert torch.equal(slope, expected[name]), name
        if name.startswith("towers.purchase"):
            assert not slope.any(), name


def test_equal_streams_give_what_one_input_gives():
    layer, x = layer_of(shared_gate=True), drawn(5, 7)
    streams = x[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(layer(streams), layer(x), rtol=0, atol=1e-14)


def test_each_stream_is_read_by_its_own_experts_and_gate():
    layer = layer_of((2, 0), 1, shared_gate=True, activation="tanh")
    x = drawn(5, 3, 7)
    before = layer(x)
    changed = []
    for stream in range(3):
        other = x.clone()
        other[:, stream] += 1
        after = layer(other)
        changed.append([not torch.equal(before[:, k], after[:, k]) for k in range(3)])
    # The second task sees the shared expert alone: its own stream has no reader.
    assert changed == [[True, False, True], [False, False, False], [True, True, True]]


def test_a_gate_that_learns_nothing_takes_the_mean_of_what_it_sees():
    layer = layer_of((2, 1), 1, learned=[False, True])
    weights = layer.gates(drawn(5, 7))
    third = torch.tensor([1, 1, 0, 1]).double() / 3
    torch.testing.assert_close(weights[:, 0], third.expand(5, 4))
    assert layer.gates.weight.shape == (2, 7)


def test_a_gate_that_sees_one_expert_has_no_parameters_and_weight_one():
    layer, x = layer_of((2, 0), 1), drawn(5, 7)
    assert layer.gates.weight.shape == (3, 7)
    assert layer.gates(x)[:, 1].tolist() == [[0.0, 0.0, 1.0]] * 5
    assert torch.equal(layer(x)[:, 1], layer.experts(x)[:, 2])


def test_saving_and_loading_gives_equal_bits(tmp_path):
    encoder, batch = encoded(BINARY)
    options = {"own_experts": (2, 1), "gate_units": (3,)}
    model, other = (CGC(encoder, **options).double() for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))


def test_parameter_names_are_readable():
    names = list(built(expert_units=(5,), tower_units=()).state_dict())
    assert [name for name in names if name.startswith("t")] == [
        "trunk.experts.5.0.weight",
        "trunk.experts.5.0.bias",
        "trunk.gates.weight",
        "towers.1.0.weight",
        "towers.1.0.bias",
    ]


def test_two_models_from_one_encoder_share_no_storage():
    encoder, _ = encoded(BINARY)
    first, second = CGC(encoder), CGC(encoder)
    owned = {p.data_ptr() for p in first.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in second.parameters())


def test_replicas_are_what_each_layer_is_alone():
    layers = [layer_of(seed=seed, gate_bias=True) for seed in range(3)]
    x = drawn(3, 5, 7)
    alone = torch.stack([layer(one) for layer, one in zip(layers, x, strict=True)])
    torch.testing.assert_close(Replicas(layers)(x), alone, rtol=0, atol=1e-14)


def test_bfloat16_and_single_precision_are_close_to_double():
    layer, x = layer_of((2, 0), 1), drawn(5, 7)
    exact = layer(x)
    single = layer.float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.05)


def test_trains_tasks_of_mixed_kinds():
    tasks = [
        Task("click"),
        Task("stars", "multiclass", classes=3),
        Task("seconds", "regression"),
    ]
    encoder, batch = encoded(tasks, count=211)
    price = batch.dense[:, 0]
    stars = (price > -0.5).double() + (price > 0.5)
    batch.labels.copy_(torch.stack([(price > 0).double(), stars, price], 1))
    torch.manual_seed(0)
    model = CGC(encoder, own_experts={"click": 1, "stars": 0, "seconds": 2}).double()
    assert model(batch).shape == (211, 5)
    before = model.loss(batch).item()
    fit(model, batch, epochs=5, batch_size=32, learning_rate=0.01, progress=False)
    assert model.loss(batch).item() < 0.3 * before


def test_one_row_and_one_unit():
    model = built(expert_units=(1,), tower_units=(1,)).double()
    assert model(encoded(BINARY, count=1)[1]).shape == (1, 2)


def test_with_one_task_it_runs():
    model = built(tasks=["click"], own_experts={"click": 2}).double()
    assert model.trunk.owners == [0, 0, 1]
    assert model(encoded(BINARY)[1]).shape == (5, 1)


def test_options_reach_experts_gates_and_towers():
    model = built(
        gate_units=(3,),
        gate_bias=True,
        gate_dropout=0.25,
        gate_temperature=2.0,
        expert_bias=False,
        tower_bias=False,
        dropout=0.5,
        activation="gelu",
    )
    names = model.state_dict()
    assert [n for n in names if n.startswith("trunk.experts") and "bias" in n] == []
    assert [n for n in names if n.startswith("towers") and "bias" in n] == []
    assert {"trunk.gates.bias", "trunk.gates.hidden.0.bias"} <= set(names)
    assert (model.trunk.gates.dropout, model.trunk.gates.temperature) == (0.25, 2.0)
    kinds = [type(part) for part in model.trunk.gates.modules()]
    assert torch.nn.GELU in kinds
    assert torch.nn.Dropout not in kinds


def test_gate_dropout_never_shows_a_task_the_experts_of_another():
    layer = layer_of((2, 1), 1, gate_dropout=0.5).train()
    torch.manual_seed(0)
    weights = layer.gates(drawn(997, 7))
    assert not weights[:, 0, 2].any()
    assert not weights[:, 1, :2].any()
    torch.testing.assert_close(weights.sum(2), torch.ones(997, 2).double())
    assert (weights[:, 0, 0] == 0).double().mean().item() > 0.3


TRACED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_cgc import BINARY, CGC, encoded
encoder, batch = encoded(BINARY)
options = {{"own_experts": (2, 0), "expert_units": (5, 3), "gate_units": (2,)}}
model = CGC(encoder, **options).double()
"""
COMPILED = """
compiled = torch.compile(model, backend="eager", fullgraph=True)
assert torch.equal(compiled(batch), model(batch))
"""
EXPORTED = """
by_row = {0: torch.export.Dim("rows")}
rows = encoded(BINARY, 211)[1]
shapes = ([by_row] * 3 + [None],)
program = torch.export.export(model, (rows[:5],), dynamic_shapes=shapes)
for number in (1, 211):
    found = program.module()(rows[:number])
    assert found.shape == (number, 2)
    assert torch.allclose(found, model(rows[:number]), rtol=0, atol=1e-12)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMPILED, EXPORTED], ids=["compile", "export"])
def test_can_be_traced(code):
    # In its own process: the shape checks of this one are not traceable.
    command = [sys.executable, "-c", TRACED + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COUNTS = "own_experts: expected a whole number of at least 0, or 2 of them, one a task"
NOBODY = "expected at least one own expert or one shared"
REFUSALS = [
    (lambda: built(own_experts=-1), f"{COUNTS}; found -1"),
    (lambda: built(own_experts=True), f"{COUNTS}; found True"),
    (lambda: built(own_experts=(1, 2, 3)), f"{COUNTS}; found (1, 2, 3)"),
    (
        lambda: built(shared_experts=-1),
        "shared_experts: expected a whole number of at least 0; found -1",
    ),
    (
        lambda: built(own_experts={"click": 1, "purchase": 0}, shared_experts=0),
        f"own_experts, shared_experts: task 1, counted from 0, sees no expert; {NOBODY}",
    ),
    (
        lambda: built(own_experts=0, shared_experts=0),
        f"own_experts, shared_experts: task 0, counted from 0, sees no expert; {NOBODY}",
    ),
    (
        lambda: built(own_experts={"click": 1, "purchases": 1}),
        "own_experts names the tasks ['click', 'purchases'],"
        " expected ['click', 'purchase']",
    ),
    (
        lambda: built(own_experts={"click": 1}),
        "own_experts names the tasks ['click'], expected ['click', 'purchase']",
    ),
    (
        lambda: built(expert_units=((5,), (5,))),
        "expert_units: expected widths for 3 experts, found 2",
    ),
    (
        lambda: CGCLayer(7, (11,), tasks=0),
        "tasks: expected a whole number of at least 1, found 0",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_refuses_with_a_message_that_names_the_culprit(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


@pytest.mark.parametrize("option", ["num_experts", "bias", "shared_gates"])
def test_an_unknown_option_is_named(option):
    with pytest.raises(TypeError, match=f"'{option}'"):
        built(**{option: 1})


# What the annotations forbid, and what a user who runs no type checker may pass.
counted = inspect.unwrap(expert_counts)


@pytest.mark.parametrize("counts", [1.5, None, "21", [1, 0.5], {0: 2, 1: 3}, {1, 2}])
def test_what_is_no_number_of_experts_is_refused(counts):
    with pytest.raises(ValueError, match=f"^{re.escape(COUNTS)}; found "):
        counted("own_experts", counts, 2)


def test_a_pair_is_no_number_of_shared_experts():
    with pytest.raises(ValueError, match=r"at least 0; found \(1, 1\)$"):
        counted("shared_experts", (1, 1), 1)


def test_numbers_of_numpy_count_as_numbers():
    assert counted("own_experts", np.int64(2), 2) == [2, 2]
    assert counted("own_experts", [np.int32(2), 1], 2) == [2, 1]


def test_one_shared_expert_makes_the_model_a_shared_bottom_to_the_last_bit():
    encoder, batch = encoded(BINARY)
    options = {"own_experts": 0, "expert_units": (5,), "tower_units": (3,)}
    model = CGC(encoder, **options).double()
    twin = SharedBottom(encoder, bottom_units=(5,), tower_units=(3,)).double()
    state = dict(model.state_dict())
    for part in ("weight", "bias"):
        stack = state.pop(f"trunk.experts.5.0.{part}")
        state[f"trunk.bottom.0.{part}"] = stack[0]
    layout = {"_extra_state": twin.state_dict()["_extra_state"]}
    twin.load_state_dict(state | layout)
    assert torch.equal(model(batch), twin(batch))
