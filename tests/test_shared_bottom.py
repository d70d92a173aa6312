"""SharedBottom against a NumPy reference, by finite differences, and by its promises."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BINARY, assert_slopes, encoded

from mtl_annotated.shared_bottom import (
    ACTIVATIONS,
    INITIALIZERS,
    MLP,
    NORMALIZATIONS,
    SharedBottom,
    SharedBottomLayer,
    Towers,
    initialize,
)
from mtl_annotated.tasks import Task


def numpy_logits(model, batch):
    """Relu layers, then towers, from the weights alone: Caruana's network."""
    state = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def stack(x, prefix):
        for layer in itertools.count():
            if f"{prefix}.{layer}.weight" not in state:
                if layer > 64:
                    return x
                continue
            weight, bias = (state[f"{prefix}.{layer}.{k}"] for k in ("weight", "bias"))
            x = np.maximum(x @ weight.T + bias, 0)
        return x

    hidden = stack(model.embedding(batch).detach().numpy(), "trunk.bottom")
    logits = []
    for task in model.tasks:
        tower = stack(hidden, f"towers.{task.name}.hidden")
        weight = state[f"towers.{task.name}.output.weight"]
        logits.append(tower @ weight.T + state[f"towers.{task.name}.output.bias"])
    return np.concatenate(logits, axis=1)


def numpy_loss(logits, labels):
    """The sum of the tasks' mean cross-entropies, from probabilities."""
    probability = 1 / (1 + np.exp(-logits))
    chosen = np.where(labels == 1, probability, 1 - probability)
    return -np.log(chosen).mean(axis=0).sum()


widths = st.lists(st.integers(1, 7), min_size=0, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), widths, widths, st.integers(1, 6))
def test_logits_and_loss_equal_a_numpy_reference(tasks, bottom, tower, count):
    names = [Task(f"t{k}", label="click") for k in range(tasks)]
    encoder, batch = encoded(names, count)
    model = SharedBottom(encoder, bottom_units=bottom, tower_units=tower).double()
    expected = numpy_logits(model, batch)
    logits = model(batch)
    assert logits.shape == (count, tasks)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-10, rtol=0)
    loss = numpy_loss(expected, batch.labels.numpy())
    assert model.loss(batch).item() == pytest.approx(loss, abs=1e-10)


def test_gradients_equal_finite_differences():
    encoder, batch = encoded(BINARY)
    torch.manual_seed(0)
    model = SharedBottom(
        encoder, bottom_units=(4,), tower_units=(3,), activation="tanh"
    ).double()
    assert_slopes(model, batch)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), widths, widths)
def test_every_parameter_gets_a_gradient_even_from_one_row(tasks, bottom, tower):
    names = [Task(f"t{k}", label="click") for k in range(tasks)]
    encoder, batch = encoded(names, count=1)
    options = {"bottom_units": bottom, "tower_units": tower, "activation": "tanh"}
    model = SharedBottom(encoder, **options).double()
    model.loss(batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_the_order_of_the_tasks_is_the_order_of_the_outputs():
    encoder, batch = encoded([*BINARY, Task("seconds", "regression")])
    names = ["seconds", "click"]
    torch.manual_seed(3)
    model = SharedBottom(encoder, tasks=names, bottom_units=(5,)).double()
    assert [task.name for task in model.tasks] == names
    assert list(model.outputs) == names
    assert list(model.towers) == names
    swapped = SharedBottom(encoder, tasks=names[::-1], bottom_units=(5,)).double()
    swapped.load_state_dict(model.state_dict())
    assert torch.equal(swapped(batch), model(batch).flip(1))
    assert torch.allclose(swapped.loss(batch), model.loss(batch))


def test_a_missing_label_changes_nothing_for_the_other_task():
    encoder, batch = encoded(BINARY, count=7)
    model = SharedBottom(encoder, bottom_units=(5,), tower_units=(3,)).double()
    model.losses(batch)[0].backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    batch.labels[:, 1] = torch.nan
    model.zero_grad()
    model.loss(batch).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("towers.purchase"):
            assert not parameter.grad.any()
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def test_two_models_from_one_encoder_share_no_storage():
    encoder, _ = encoded(BINARY)
    first, second = SharedBottom(encoder), SharedBottom(encoder)
    owned = {p.data_ptr() for p in first.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in second.parameters())


def test_saving_and_loading_gives_equal_bits(tmp_path):
    encoder, batch = encoded(BINARY)
    model, other = SharedBottom(encoder).double(), SharedBottom(encoder).double()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))


def test_parameter_names_are_readable():
    encoder, _ = encoded(BINARY)
    names = list(
        SharedBottom(encoder, bottom_units=(5,), tower_units=(3,)).state_dict()
    )
    assert names[-10:] == [
        "trunk.bottom.0.weight",
        "trunk.bottom.0.bias",
        "towers.click.hidden.0.weight",
        "towers.click.hidden.0.bias",
        "towers.click.output.weight",
        "towers.click.output.bias",
        "towers.purchase.hidden.0.weight",
        "towers.purchase.hidden.0.bias",
        "towers.purchase.output.weight",
        "towers.purchase.output.bias",
    ]


def test_towers_of_mixed_kinds_and_sizes():
    tasks = [Task("click"), Task("stars", "multiclass", classes=3)]
    towers = Towers(11, tasks, {"click": (5, 2), "stars": ()})
    assert towers(torch.zeros(5, 2, 11)).shape == (5, 4)
    assert towers["click"].hidden.width == 2
    assert towers["stars"].output.in_features == 11


def test_each_tower_reads_its_own_slice():
    towers = Towers(3, BINARY, (4,))
    features = torch.randn(5, 2, 3)
    before = towers(features)
    features[:, 1] += 1
    after = towers(features)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_the_layer_hands_every_task_the_same_memory():
    layer = SharedBottomLayer(7, (11,), tasks=3)
    out = layer(torch.randn(5, 7))
    assert out.shape == (5, 3, 11)
    assert out.stride()[1] == 0
    assert layer.width == 11


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_activation_and_normalization_runs(activation, normalization):
    mlp = MLP(
        7, (5, 3), activation=activation, normalization=normalization, dropout=0.5
    )
    assert mlp(torch.randn(4, 7)).shape == (4, 3)
    kinds = [type(layer) for layer in mlp]
    if normalization != "none":
        assert kinds.count(NORMALIZATIONS[normalization]) == 2
    assert kinds.count(torch.nn.Linear) == 2
    assert kinds.count(ACTIVATIONS[activation]) == 2
    assert kinds.count(torch.nn.Dropout) == 2


def test_without_bias_there_is_none():
    assert all("bias" not in name for name in MLP(7, (5, 3), bias=False).state_dict())


TRACED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
import torch
from test_shared_bottom import BINARY, SharedBottom, encoded
encoder, batch = encoded(BINARY)
model = SharedBottom(encoder, bottom_units=(5,), tower_units=(3,)).double()
"""
COMPILED = """
compiled = torch.compile(model, backend="eager", fullgraph=True)
assert torch.equal(compiled(batch), model(batch))
"""
EXPORTED = """
by_row = {0: torch.export.Dim("rows")}
other = encoded(BINARY, count=211)[1]
weights = torch.ones(211, dtype=torch.float64)
for rows, tensors in ((other, 3), (replace(other, weights=weights), 4)):
    shapes = ([by_row] * tensors + [None],)
    program = torch.export.export(model, (rows[:5],), dynamic_shapes=shapes)
    for count in (1, 211):
        found = program.module()(rows[:count])
        assert found.shape == (count, 2)
        assert torch.allclose(found, model(rows[:count]), rtol=0, atol=1e-12)
try:
    program.module()(replace(rows, encoder="another"))
except (AssertionError, RuntimeError, ValueError):
    sys.exit()
raise SystemExit("a batch of another encoder was taken")
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMPILED, EXPORTED], ids=["compile", "export"])
def test_can_be_traced(code):
    # In its own process: the shape checks of this one are not traceable.
    command = [sys.executable, "-c", TRACED + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def linears(module):
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)]


def test_the_default_start_is_that_of_pytorch():
    torch.manual_seed(0)
    found = linears(MLP(7, (5, 3)))
    torch.manual_seed(0)
    for layer in found:
        weight = torch.empty_like(layer.weight)
        bias = torch.empty_like(layer.bias)
        initialize(weight, bias, "default")
        assert torch.equal(weight, layer.weight)
        assert torch.equal(bias, layer.bias)


# The standard deviation that each start promises for a matrix of 300 by 200.
PROMISED = {
    "default": (3 * 200) ** -0.5,
    "xavier_uniform": (2 / 500) ** 0.5,
    "xavier_normal": (2 / 500) ** 0.5,
    "kaiming_uniform": (2 / 200) ** 0.5,
    "kaiming_normal": (2 / 200) ** 0.5,
    "orthogonal": 300**-0.5,
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_starts_have_the_promised_size(name):
    torch.manual_seed(0)
    weight, bias = torch.empty(300, 200), torch.ones(300)
    initialize(weight, bias, name)
    assert weight.std().item() == pytest.approx(PROMISED[name], rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * PROMISED[name]
    largest = (weight.abs().max() / weight.std()).item()
    assert (largest < 1.75) == (name.endswith("uniform") or name == "default")
    if name == "orthogonal":
        one = torch.eye(200)
        torch.testing.assert_close(weight.T @ weight, one, rtol=0, atol=1e-4)
    if name == "default":
        assert bias.std().item() == pytest.approx(PROMISED[name], rel=0.1)
    else:
        assert not bias.any()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_stacked_matrices_start_apart(name):
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.zeros(3, 5, 7))
    biases = torch.nn.Parameter(torch.ones(3, 5))
    for weight, bias in zip(stack, biases, strict=True):
        initialize(weight, bias, name)
    assert stack.is_leaf
    assert stack.requires_grad
    assert all(not torch.equal(stack[0], stack[k]) for k in (1, 2))
    assert stack.detach().abs().sum((1, 2)).min() > 0
    assert biases.any().item() == (name == "default")


def test_the_start_reaches_every_linear_layer_of_bottom_and_towers():
    model = built(bottom_units=(8, 8), tower_units=(8,), initializer="orthogonal")
    found = linears(model)
    assert len(found) == 2 + 2 * 2
    for layer in found:
        weight = layer.weight.detach()
        few = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(few, torch.eye(len(few)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("tower", [True, False])
def test_biases_of_bottom_and_towers_are_switched_apart(bottom, tower):
    model = built(
        bottom_units=(5,), tower_units=(3,), bottom_bias=bottom, tower_bias=tower
    )
    assert {layer.bias is not None for layer in linears(model.trunk)} == {bottom}
    assert {layer.bias is not None for layer in linears(model.towers)} == {tower}
    assert len(linears(model.towers)) == 4


@pytest.mark.parametrize("option", ["initialiser", "bias", "units"])
def test_an_unknown_option_is_named(option):
    with pytest.raises(TypeError, match=f"'{option}'"):
        built(**{option: 1})


def built(**options):
    return SharedBottom(encoded(BINARY)[0], **options)


REFUSALS = [
    (
        lambda: MLP(7, (5,), activation="Relu"),
        "unknown activation 'Relu', choose from relu, gelu, silu, tanh, identity",
    ),
    (
        lambda: MLP(7, (5,), normalization="bn"),
        "unknown normalization 'bn', choose from none, batch, layer",
    ),
    (
        lambda: MLP(7, (5,), dropout=1.0),
        "dropout must be a number in [0, 1), found 1.0",
    ),
    (
        lambda: MLP(7, (), initializer="he"),
        "unknown initializer 'he', choose from default, xavier_uniform,"
        " xavier_normal, kaiming_uniform, kaiming_normal, orthogonal",
    ),
    (lambda: MLP(7, (5, 0)), "units: expected widths of at least 1, found (5, 0)"),
    (lambda: MLP(-1, ()), "inputs: expected widths of at least 1, found (-1,)"),
    (
        lambda: built(bottom_units=(8, True)),
        "bottom_units: expected widths of at least 1, found (8, True)",
    ),
    (
        lambda: built(tower_units=(-3,)),
        "tower_units: expected widths of at least 1, found (-3,)",
    ),
    (
        lambda: Towers(3, BINARY, {"click": (4,), "purchase": (0,)}),
        "tower_units['purchase']: expected widths of at least 1, found (0,)",
    ),
    (
        lambda: Towers(3, BINARY, {"click": (4,), "purchases": (4,)}),
        "tower_units name the tasks ['click', 'purchases'],"
        " expected ['click', 'purchase']",
    ),
    (
        lambda: Towers(3, [Task("keys")]),
        "task 'keys': PyTorch modules reserve this name",
    ),
    (
        lambda: Towers(3, [Task("training")]),
        "task 'training': PyTorch modules reserve this name",
    ),
    (
        lambda: SharedBottomLayer(3, (4,), tasks=0),
        "tasks: expected a whole number of at least 1, found 0",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_refuses_with_a_message_that_names_the_culprit(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def test_an_unknown_task_is_refused_with_the_valid_ones():
    encoder, _ = encoded(BINARY)
    with pytest.raises(ValueError, match=r"click, purchase; found \['likes'\]"):
        SharedBottom(encoder, tasks=["likes"])
