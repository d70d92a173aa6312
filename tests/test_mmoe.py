"""MMoE against a NumPy reference, by finite differences, and by its promises."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BINARY, assert_slopes, by_task, encoded, slopes_by_task

from mtl_annotated.mmoe import Experts, Gates, MMoE, MMoELayer
from mtl_annotated.shared_bottom import ACTIVATIONS, MLP, SharedBottom
from mtl_annotated.tasks import Task
from mtl_annotated.training import Settings, decay_groups, predict


def named(tasks):
    return [Task(f"t{k}", label="click") for k in range(tasks)]


def near(first, second):
    return torch.allclose(first, second, rtol=0, atol=1e-12)


def numpy_dense(x, state, prefix, layers, act, copy=None):
    """Layers `weight x + bias`, then `act`; an MLP has a module of each by turns."""
    for layer in range(layers):
        weight = state[f"{prefix}.{2 * layer}.weight"]
        bias = state.get(f"{prefix}.{2 * layer}.bias", np.zeros(weight.shape[:-1]))
        if copy is not None:
            weight, bias = weight[copy], bias[copy]
        x = act(x @ weight.T + bias)
    return x


def numpy_logits(model, batch, shapes, gate_units, tower, act):
    """Equations 6 and 7 of Ma et al., one expert and one task at a time."""
    state = {name: value.numpy() for name, value in by_task(model).items()}
    x = model.embedding(batch).detach().numpy()
    outputs, seen = [], {}
    for shape in shapes:
        name = "x".join(map(str, shape))
        copy = seen[name] = seen.get(name, -1) + 1
        prefix = f"trunk.experts.{name}"
        outputs.append(numpy_dense(x, state, prefix, len(shape), act, copy))
    logits = []
    for k, task in enumerate(model.tasks):
        if len(shapes) == 1:
            gate = np.ones((len(x), 1))
        else:
            gate = numpy_dense(x, state, "trunk.gates.hidden", len(gate_units), act, k)
            own = slice(k * len(shapes), (k + 1) * len(shapes))
            gate = np.exp(gate @ state["trunk.gates.weight"][own].T)
            gate /= gate.sum(1, keepdims=True)
        mixed = sum(gate[:, [i]] * output for i, output in enumerate(outputs))
        hidden = numpy_dense(
            mixed, state, f"towers.{task.name}.hidden", len(tower), act
        )
        last = f"towers.{task.name}.output"
        logits.append(hidden @ state[f"{last}.weight"].T + state[f"{last}.bias"])
    return np.concatenate(logits, axis=1)


def numpy_loss(logits, labels):
    """The sum of the tasks' mean cross-entropies, from probabilities."""
    probability = 1 / (1 + np.exp(-logits))
    chosen = np.where(labels == 1, probability, 1 - probability)
    return -np.log(chosen).mean(axis=0).sum()


widths = st.lists(st.integers(1, 5), min_size=0, max_size=2)
experts_of_any_shape = st.tuples(
    st.lists(widths, min_size=1, max_size=4), st.integers(1, 5)
).map(lambda drawn: [(*shape, drawn[1]) for shape in drawn[0]])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), experts_of_any_shape, widths, widths, st.integers(1, 5))
def test_logits_and_loss_equal_a_numpy_reference(tasks, shapes, gate, tower, count):
    encoder, batch = encoded(named(tasks), count)
    options = {"gate_units": gate, "tower_units": tower, "activation": "tanh"}
    model = MMoE(encoder, experts=len(shapes), expert_units=shapes, **options)
    model = model.double()
    expected = numpy_logits(model, batch, shapes, gate, tower, np.tanh)
    found = model(batch).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)
    loss = numpy_loss(expected, batch.labels.numpy())
    assert model.loss(batch).item() == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("gate_units", [(), (3,)])
def test_gradients_equal_finite_differences(gate_units):
    encoder, batch = encoded(BINARY)
    torch.manual_seed(0)
    model = MMoE(
        encoder,
        experts=3,
        expert_units=(4, 3),
        gate_units=gate_units,
        gate_bias=True,
        tower_units=(2,),
        activation="tanh",
    ).double()
    assert_slopes(model, batch)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), widths, widths, st.booleans())
def test_every_parameter_gets_a_gradient_even_from_one_row(
    tasks, experts, expert, gate, one_gate
):
    encoder, batch = encoded(named(tasks), count=1)
    model = MMoE(
        encoder,
        experts=experts,
        expert_units=(*expert, 3),
        gate_units=gate,
        one_gate=one_gate,
        tower_units=(3,),
        activation="tanh",
    ).double()
    # Rows of an embedding table that the batch does not name rightly get nothing.
    model.loss(batch).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), widths)
def test_no_two_experts_start_equal(experts, units):
    module = Experts(7, experts, (*units, 3))
    for parameter in module.parameters():
        first = [copy.flatten().tolist() for copy in parameter]
        assert len(set(map(tuple, first))) == experts


def test_cloned_experts_give_their_gates_no_gradient_and_drawn_ones_do():
    torch.manual_seed(0)
    layer = MMoELayer(7, (3,), tasks=2, experts=4, activation="tanh").double()
    x = torch.randn(5, 7).double()
    layer(x).square().sum().backward()
    assert layer.gates.weight.grad.abs().max() > 1e-3
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.gates.weight.grad.abs().max() < 1e-14


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_one_expert_is_the_shared_bottom(tasks, layers, count, one_gate):
    encoder, batch = encoded(named(tasks), count)
    torch.manual_seed(0)
    one = MMoE(
        encoder, experts=1, expert_units=(5,) * layers, one_gate=one_gate
    ).double()
    torch.manual_seed(0)
    bottom = SharedBottom(encoder, bottom_units=(5,) * layers).double()
    features = bottom.embedding(batch)
    assert torch.equal(one.trunk(features), bottom.trunk(features))
    assert near(one(batch), bottom(batch))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.booleans())
def test_tied_gates_are_one_gate(tasks, experts, bias):
    options = {"tasks": tasks, "experts": experts, "gate_bias": bias}
    one = MMoELayer(7, (3,), one_gate=True, **options).double()
    tied = MMoELayer(7, (3,), **options).double()
    state = one.state_dict()
    for name in ("gates.weight", "gates.bias")[: 1 + bias]:
        state[name] = torch.cat([state[name]] * tasks)
    tied.load_state_dict(state)
    x = torch.randn(5, 7).double()
    assert near(tied(x), one(x))


def test_renaming_experts_changes_nothing():
    layer = MMoELayer(7, (4, 3), tasks=2, experts=3).double()
    x, order = torch.randn(5, 7).double(), [2, 0, 1]
    before, shares = layer(x), layer.gates(x)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[order])
        rows_of = layer.gates.weight.view(2, 3, 7)
        rows_of.copy_(rows_of[:, order])
    assert near(layer(x), before)
    assert near(layer.gates(x), shares[..., order])


def test_the_order_of_the_tasks_is_the_order_of_the_outputs():
    encoder, batch = encoded([*BINARY, Task("seconds", "regression")])
    names = ["seconds", "click"]
    options = {"experts": 3, "expert_units": (4,)}
    model = MMoE(encoder, tasks=names, **options).double()
    assert list(model.outputs) == names
    swapped = MMoE(encoder, tasks=names[::-1], **options).double()
    state = model.state_dict()
    halves = state["trunk.gates.weight"].chunk(2)
    with pytest.raises(ValueError, match="laid out as .tasks: seconds, click"):
        swapped.load_state_dict(state)
    state["_extra_state"] = swapped.state_dict()["_extra_state"]
    for name in state:
        if name.startswith("towers"):
            state[name] = state[name].flip(0)
    swapped.load_state_dict(state | {"trunk.gates.weight": torch.cat(halves[::-1])})
    assert near(swapped(batch), model(batch).flip(1))
    assert near(swapped.loss(batch), model.loss(batch))


def test_a_missing_label_changes_nothing_for_the_other_task():
    encoder, batch = encoded(BINARY, count=7)
    model = MMoE(encoder, experts=3, expert_units=(5,), tower_units=(3,)).double()
    expected_losses = model.losses(batch).detach()
    model.losses(batch)[0].backward()
    expected = slopes_by_task(model)
    batch.labels[:, 1] = torch.nan
    assert torch.equal(model.losses(batch)[0], expected_losses[0])
    model.zero_grad()
    model.loss(batch).backward()
    found = slopes_by_task(model)
    assert found.keys() == by_task(model).keys()
    for name, slope in found.items():
        assert torch.equal(slope, expected[name]), name
        if name.startswith("towers.purchase"):
            assert not slope.any(), name


def test_a_gate_listens_to_its_own_task_only():
    encoder, batch = encoded(BINARY)
    model = MMoE(encoder, experts=3, expert_units=(5,), activation="tanh").double()
    model.losses(batch)[1].backward()
    click, purchase = model.trunk.gates.weight.grad.chunk(2)
    assert not click.any()
    assert purchase.all()


def test_two_models_from_one_encoder_share_no_storage():
    encoder, _ = encoded(BINARY)
    first, second = MMoE(encoder), MMoE(encoder)
    owned = {p.data_ptr() for p in first.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in second.parameters())


def test_saving_and_loading_gives_equal_bits(tmp_path):
    encoder, batch = encoded(BINARY)
    options = {"expert_units": ((5, 3), (3,), (5, 3)), "experts": 3, "gate_units": (2,)}
    model, other = (MMoE(encoder, **options).double() for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))


def test_parameter_names_are_readable():
    layer = MMoELayer(
        7, ((5, 3), (3,)), tasks=2, experts=2, gate_units=(4,), gate_bias=True
    )
    assert sorted(layer.state_dict()) == [
        "experts.3.0.bias",
        "experts.3.0.weight",
        "experts.5x3.0.bias",
        "experts.5x3.0.weight",
        "experts.5x3.2.bias",
        "experts.5x3.2.weight",
        "gates.bias",
        "gates.hidden.0.bias",
        "gates.hidden.0.weight",
        "gates.weight",
    ]
    without = MMoELayer(7, (3,), tasks=2, experts=2, expert_bias=False)
    assert list(without.state_dict()) == ["experts.3.0.weight", "gates.weight"]


def test_experts_of_different_shapes_keep_their_order():
    shapes = ((3,), (5, 3), (3,), (4, 3))
    torch.manual_seed(0)
    experts = Experts(7, 4, shapes).double()
    torch.manual_seed(0)
    mlps = [MLP(7, shape).double() for shape in shapes]
    x, own = torch.randn(5, 7).double(), torch.randn(5, 4, 7).double()
    assert near(experts(x), torch.stack([mlp(x) for mlp in mlps], 1))
    apart = [mlp(own[:, i]) for i, mlp in enumerate(mlps)]
    assert near(experts(own), torch.stack(apart, 1))


sights = st.integers(1, 4).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.lists(
            st.lists(
                st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True
            ),
            min_size=1,
            max_size=4,
        ),
    )
)


@settings(max_examples=40, deadline=None)
@given(sights, widths, st.booleans(), st.floats(0.25, 4), st.data())
def test_gates_are_a_softmax_over_what_they_see(sight, units, bias, temperature, data):
    experts, sees = sight
    learned = data.draw(st.lists(st.booleans(), min_size=len(sees), max_size=len(sees)))
    options = {"units": units, "bias": bias, "temperature": temperature}
    gates = Gates(7, sees, experts, learned=learned, **options).double()
    state = {name: value.numpy() for name, value in gates.state_dict().items()}
    own = torch.randn(3, len(sees), 7).double()
    for x, everyone in ((own[:, 0], True), (own, False)):
        found, at, copy = gates(x).detach().numpy(), 0, 0
        assert found.shape == (3, len(sees), experts)
        for k, seen in enumerate(sees):
            logits = np.zeros((3, len(seen)))
            if learned[k] and len(seen) > 1:
                mine = (x if everyone else x[:, k]).numpy()
                hidden = numpy_dense(
                    mine, state, "hidden", len(units), lambda v: np.maximum(v, 0), copy
                )
                part = slice(at, at + len(seen))
                logits = hidden @ state["weight"][part].T
                logits += state["bias"][part] if bias else 0
                at, copy = at + len(seen), copy + 1
            expected = np.zeros((3, experts))
            expected[:, seen] = np.exp(logits / temperature)
            expected /= expected.sum(1, keepdims=True)
            np.testing.assert_allclose(found[:, k], expected, atol=1e-12)


def test_gate_dropout_loses_experts_in_training_only_and_sums_stay_one():
    torch.manual_seed(0)
    gates = Gates(7, [[0, 1, 2], [1], [0, 2]], 3, dropout=0.3).double()
    x = torch.randn(20_000, 7).double()
    trained = gates(x)
    assert near(trained.sum(-1), torch.ones(20_000, 3).double())
    assert not trained[:, 1, [0, 2]].any()
    assert (trained[:, 1, 1] == 1).all()
    # An expert of two is lost alone: 0.3 times the 0.7 that the other one stays.
    lost = (trained[:, 2, 0] == 0).double().mean().item()
    assert lost == pytest.approx(0.21, abs=0.015)
    again = torch.equal(gates(x), trained)
    assert not again
    plain = Gates(7, [[0, 1, 2], [1], [0, 2]], 3).double()
    plain.load_state_dict(gates.state_dict())
    assert torch.equal(gates.eval()(x), plain(x))


def test_the_weights_of_the_gates_are_a_public_result():
    layer = MMoELayer(7, (3,), tasks=2, experts=4).double()
    x = torch.randn(5, 7).double()
    shares = layer.gates(x)
    assert shares.shape == (5, 2, 4)
    mixed = torch.einsum("bte,beu->btu", shares, layer.experts(x))
    assert near(layer(x), mixed)
    assert MMoELayer(7, (3,), tasks=2, experts=4, one_gate=True).gates.shape == (1, 4)


def test_a_batch_of_one_row_and_an_expert_of_one_unit_keep_their_axes():
    layer = MMoELayer(7, (1,), tasks=2, experts=3)
    assert layer(torch.randn(1, 7)).shape == (1, 2, 1)
    encoder, batch = encoded(BINARY, count=1)
    model = MMoE(encoder, experts=3, expert_units=(1,), tower_units=(1,)).double()
    assert model(batch).shape == (1, 2)


@pytest.mark.parametrize("training", [True, False])
def test_a_row_does_not_depend_on_its_batch_mates(training):
    layer = MMoELayer(7, (5, 3), tasks=2, experts=3, gate_units=(4,)).double()
    x = torch.randn(6, 7).double()
    layer.train(training)
    singly = torch.cat([layer(row[None]) for row in x])
    assert near(layer(x), singly)
    assert near(layer.gates(x)[:1], layer.gates(x[:1]))


def test_batch_normalization_of_the_experts_never_reaches_a_gate():
    layer = MMoELayer(
        7, (3,), tasks=2, experts=3, gate_units=(4,), normalization="batch", dropout=0.5
    )
    kinds = [type(module) for module in layer.gates.modules()]
    assert not any(
        issubclass(k, (torch.nn.BatchNorm1d, torch.nn.Dropout)) for k in kinds
    )
    inside = [type(module) for module in layer.experts.modules()]
    assert any(issubclass(kind, torch.nn.BatchNorm1d) for kind in inside)


def test_a_gate_has_no_hidden_layer_and_no_bias_unless_asked():
    names = [
        n for n, _ in MMoELayer(7, (3,), tasks=2, experts=3).gates.named_parameters()
    ]
    assert names == ["weight"]


def test_every_column_of_the_encoder_reaches_the_experts():
    encoder, _ = encoded(BINARY)
    model = MMoE(encoder, experts=3, expert_units=(5,))
    assert model.trunk.experts["5"][0].weight.shape == (3, 5, 3 + 1)


def test_mixed_kinds_and_one_row_at_a_time():
    tasks = [*BINARY, Task("stars", "multiclass", classes=3)]
    encoder, batch = encoded([*tasks, Task("seconds", "regression")], count=9)
    model = MMoE(encoder, experts=3, expert_units=(5,)).double()
    assert model(batch).shape == (9, 6)
    model.loss(batch).backward()
    whole = predict(model, batch).to_numpy()
    singly = predict(model, batch, batch_size=1).to_numpy()
    np.testing.assert_allclose(singly, whole, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_run_and_stay_near(dtype):
    torch.manual_seed(0)
    layer = MMoELayer(7, (5, 3), tasks=2, experts=3).double()
    x = torch.randn(5, 7).double()
    expected = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    near_enough = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), expected, rtol=0, atol=near_enough)
    found.sum().backward()


@pytest.mark.slow
def test_compiles_and_exports_without_a_graph_break():
    # In its own process: the shape checks of this one are not traceable.
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_mmoe import BINARY, MMoE, MMoELayer, encoded
encoder, batch = encoded(BINARY)
shapes = ((5, 3), (3,), (5, 3))
for options in ({{}}, {{"gate_units": (4,), "gate_bias": True}}, {{"one_gate": True}}):
    model = MMoE(encoder, experts=3, expert_units=shapes, **options).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch), model(batch))
layer = MMoELayer(7, shapes, tasks=2, experts=3, gate_units=(4,)).eval()
rows = {{"features": {{0: torch.export.Dim("rows", min=1)}}}}
program = torch.export.export(layer, (torch.randn(5, 7),), dynamic_shapes=rows)
for count in (1, 2, 11):
    x = torch.randn(count, 7)
    assert torch.allclose(program.module()(x), layer(x), atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def layer_of(**options):
    return MMoELayer(7, **({"tasks": 2, "experts": 3, "expert_units": (4,)} | options))


REFUSALS = [
    (
        lambda: layer_of(experts=0),
        "experts: expected a whole number of at least 1, found 0",
    ),
    (
        lambda: layer_of(experts=True),
        "experts: expected a whole number of at least 1, found True",
    ),
    (
        lambda: layer_of(tasks=0),
        "tasks: expected a whole number of at least 1, found 0",
    ),
    (
        lambda: layer_of(expert_units=((4,), (4,))),
        "expert_units: expected widths for 3 experts, found 2",
    ),
    (
        lambda: layer_of(expert_units=((4,), (4,), (5,))),
        "expert_units: expected at least one layer an expert and equal last widths,"
        " because experts are mixed; found ((4,), (4,), (5,))",
    ),
    (
        lambda: layer_of(expert_units=()),
        "expert_units: expected at least one layer an expert and equal last widths,"
        " because experts are mixed; found ()",
    ),
    (
        lambda: layer_of(expert_units=(4, 0)),
        "expert_units: expected widths of at least 1, found (4, 0)",
    ),
    (
        lambda: layer_of(gate_units=(-1,)),
        "gate_units: expected widths of at least 1, found (-1,)",
    ),
    (
        lambda: layer_of(gate_temperature=0.0),
        "gate_temperature must be above 0, found 0.0",
    ),
    (
        lambda: layer_of(gate_temperature=float("nan")),
        "gate_temperature must be above 0, found nan",
    ),
    (
        lambda: layer_of(gate_dropout=1.0),
        "gate_dropout must be in [0, 1), found 1.0",
    ),
    (
        lambda: Gates(7, [[0], []], 2),
        "sees[1]: expected at least one expert, each once, from 0 to 1; found []",
    ),
    (
        lambda: Gates(7, [[0, 2]], 2),
        "sees[0]: expected at least one expert, each once, from 0 to 1; found [0, 2]",
    ),
    (
        lambda: Gates(7, [[1, 1]], 2),
        "sees[0]: expected at least one expert, each once, from 0 to 1; found [1, 1]",
    ),
    (
        lambda: Gates(7, [[0, 1]], 2, learned=[True, False]),
        "learned: expected one for each of 1 gates, found [True, False]",
    ),
    (
        lambda: layer_of(activation="Relu"),
        "unknown activation 'Relu', choose from " + ", ".join(ACTIVATIONS),
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_refuses_with_a_message_that_names_the_culprit(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def test_expert_widths_that_are_no_sequence_are_refused_by_name():
    # In its own process: the type checks of this one would refuse them first.
    code = """
from mtl_annotated.mmoe import MMoELayer
for units in (64, "64", (64, (32,))):
    try:
        MMoELayer(7, units, tasks=2, experts=3)
    except TypeError as error:
        assert str(error).startswith("expert_units: expected layer widths"), error
    else:
        raise AssertionError(units)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_option_that_nobody_knows_is_refused():
    encoder, _ = encoded(BINARY)
    with pytest.raises(TypeError, match="gate_temprature"):
        MMoE(encoder, gate_temprature=2.0)


def test_decay_leaves_the_norms_and_biases_of_stacks_alone():
    encoder, _ = encoded(BINARY)
    model = MMoE(encoder, experts=3, normalization="layer", gate_bias=True)
    named = {id(p): name for name, p in model.named_parameters()}
    groups = decay_groups(model, Settings(epochs=1, weight_decay=0.1))
    (decayed,) = [each["params"] for each in groups if each["weight_decay"]]
    names = sorted(named[id(p)] for p in decayed)
    assert names == [
        "towers.64x32x1.0.weight",
        "towers.64x32x1.3.weight",
        "towers.64x32x1.6.weight",
        "trunk.experts.64x64.0.weight",
        "trunk.experts.64x64.3.weight",
        "trunk.gates.weight",
    ]
