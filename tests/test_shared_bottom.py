"""SharedBottom against a NumPy reference, by finite differences, and by its promises."""

import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BINARY, assert_slopes, by_task, encoded, rows, slopes_by_task
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_annotated.shared_bottom import (
    ACTIVATIONS,
    INITIALIZERS,
    MLP,
    NORMALIZATIONS,
    SharedBottom,
    SharedBottomLayer,
    StackedLinear,
    StackedMLP,
    Stacks,
    Towers,
    initialize,
)
from mtl_annotated.tasks import Task
from mtl_annotated.training import fit, layouts, predict


def near(first, second):
    return torch.allclose(first, second, rtol=0, atol=1e-12)


def numpy_logits(model, batch):
    """Relu layers, then towers, from the weights alone: Caruana's network."""
    state = {name: value.numpy() for name, value in by_task(model).items()}

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
    swapped = SharedBottom(encoder, tasks=names[::-1], bottom_units=(5,)).double()
    state = model.state_dict()
    for name in (n for n in state if n.startswith("towers")):
        state[name] = state[name].flip(0)
    state["_extra_state"] = swapped.state_dict()["_extra_state"]
    swapped.load_state_dict(state)
    assert torch.equal(swapped(batch), model(batch).flip(1))
    assert torch.allclose(swapped.loss(batch), model.loss(batch))


def test_a_missing_label_changes_nothing_for_the_other_task():
    encoder, batch = encoded(BINARY, count=7)
    model = SharedBottom(encoder, bottom_units=(5,), tower_units=(3,)).double()
    model.losses(batch)[0].backward()
    expected = slopes_by_task(model)
    batch.labels[:, 1] = torch.nan
    model.zero_grad()
    model.loss(batch).backward()
    found = slopes_by_task(model)
    assert found.keys() == by_task(model).keys()
    for name, slope in found.items():
        assert torch.equal(slope, expected[name]), name
        if name.startswith("towers.purchase"):
            assert not slope.any(), name


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
    assert names[-6:] == [
        "trunk.bottom.0.weight",
        "trunk.bottom.0.bias",
        "towers.3x1.0.weight",
        "towers.3x1.0.bias",
        "towers.3x1.2.weight",
        "towers.3x1.2.bias",
    ]


def test_towers_of_mixed_kinds_and_sizes():
    tasks = [Task("click"), Task("stars", "multiclass", classes=3)]
    towers = Towers(11, tasks, {"click": (5, 2), "stars": ()})
    assert towers(torch.zeros(5, 2, 11)).shape == (5, 4)
    shapes = {name: list(value.shape) for name, value in towers.state_dict().items()}
    assert shapes == {
        "5x2x1.0.weight": [1, 5, 11],
        "5x2x1.0.bias": [1, 5],
        "5x2x1.2.weight": [1, 2, 5],
        "5x2x1.2.bias": [1, 2],
        "5x2x1.4.weight": [1, 1, 2],
        "5x2x1.4.bias": [1, 1],
        "3.0.weight": [1, 3, 11],
        "3.0.bias": [1, 3],
    }


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


# Linear layers and MLPs side by side.


def test_stacking_copies_the_weights():
    mlps = [MLP(7, (5, 3)) for _ in range(2)]
    stack = StackedMLP(mlps)
    owned = {p.data_ptr() for mlp in mlps for p in mlp.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in stack.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_mlps_equal_the_mlps_apart(activation, normalization, bias):
    options = {"activation": activation, "normalization": normalization, "bias": bias}
    mlps = [MLP(7, (5, 3), **options).double() for _ in range(3)]
    stack, x = StackedMLP(mlps).double(), torch.randn(4, 7).double()
    own = torch.randn(4, 3, 7).double()
    for training in (True, False):
        for module in (stack, *mlps):
            module.train(training)
        apart = torch.stack([mlp(x) for mlp in mlps], 1)
        assert near(stack(x), apart)
        apart = torch.stack([mlp(own[:, i]) for i, mlp in enumerate(mlps)], 1)
        assert near(stack(own), apart)


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_a_stack_takes_over_trained_mlps_and_trains_like_them(normalization):
    torch.manual_seed(0)
    x = torch.randn(64, 7, dtype=torch.float64)
    mlps = [MLP(7, (5, 3), normalization=normalization).double() for _ in range(4)]
    optimizer = torch.optim.SGD([p for mlp in mlps for p in mlp.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(mlp(x).square().mean() for mlp in mlps).backward()
        optimizer.step()
    stack = StackedMLP(mlps).double()
    for training in (True, False):
        stack.train(training)
        apart = torch.stack([mlp.train(training)(x) for mlp in mlps], 1)
        torch.testing.assert_close(stack(x), apart, rtol=0, atol=1e-12)
    for decayed in ("weight", "bias"):
        shapes = [p.ndim for name, p in stack.named_parameters() if decayed in name]
        assert shapes.count(3) == (2 if decayed == "weight" else 0)


def test_mlps_of_another_depth_do_not_stack():
    with pytest.raises(ValueError, match="zip"):
        StackedMLP([MLP(7, (5,)), MLP(7, (5, 5))])


@pytest.mark.parametrize("bias", [True, False])
def test_one_copy_gives_the_bits_of_the_layer_itself(bias):
    layer = nn.Linear(7, 5, bias=bias)
    stack, x = StackedLinear([layer]), torch.randn(11, 7)
    assert torch.equal(stack(x)[:, 0], layer(x))
    assert torch.equal(stack(x[:, None])[:, 0], layer(x))


def test_a_stacked_layer_says_what_it_holds():
    stack = StackedLinear([nn.Linear(7, 5) for _ in range(3)])
    assert repr(stack) == "StackedLinear(3 x (7 -> 5), bias=True)"


shapes_of_mlps = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(shapes_of_mlps, st.integers(1, 4))
def test_stacks_keep_each_mlp_in_the_stack_of_its_shape(shapes, count):
    mlps = [MLP(7, shape, activation="tanh").double() for shape in shapes]
    stacks = Stacks(mlps, shapes)
    order = list(dict.fromkeys(shapes))
    assert list(stacks) == ["x".join(map(str, shape)) for shape in order]
    assert list(stacks.members.values()) == [
        [k for k, shape in enumerate(shapes) if shape == own] for own in order
    ]
    x = torch.randn(count, 7, dtype=torch.float64)
    own = torch.randn(count, len(shapes), 7, dtype=torch.float64)
    for features in (x, own):
        parts = stacks.parts(features)
        for part, members in zip(parts, stacks.members.values(), strict=True):
            mine = [x if features is x else own[:, k] for k in members]
            pairs = zip(members, mine, strict=True)
            assert near(part, torch.stack([mlps[k](each) for k, each in pairs], 1))


def test_the_layout_tells_which_mlp_stands_where():
    def layout(*shapes):
        return Stacks([MLP(7, shape) for shape in shapes], shapes).layout

    assert layout((5,), (3,), (5,)) == "{'5': [0, 2], '3': [1]}"
    assert layout((5,), (5,), (3,)) != layout((5,), (3,), (5,))
    assert layout((5,), (3,)) != layout((3,), (5,))


# Towers side by side.

KINDS = st.sampled_from(["binary", "regression", "multiclass"])
TOWERS = st.lists(
    st.tuples(KINDS, st.integers(2, 3), st.lists(st.integers(1, 3), max_size=2)),
    min_size=1,
    max_size=6,
)


def drawn_tasks(drawn):
    return [
        Task(f"t{k}", kind, classes=classes if kind == "multiclass" else None)
        for k, (kind, classes, _) in enumerate(drawn)
    ]


def loop(inputs, tasks, units, *, bias=True, **options):
    """The towers one by one, drawn in the order of the tasks."""
    found = []
    for task in tasks:
        mlp = MLP(inputs, units[task.name], bias=bias, **options)
        found.append(nn.Sequential(mlp, nn.Linear(mlp.width, task.width, bias=bias)))
    return nn.ModuleList(found).double()


def looped(towers, features):
    outputs = [tower(features[:, k]) for k, tower in enumerate(towers)]
    return torch.cat(outputs, 1)


@settings(max_examples=50, deadline=None)
@given(TOWERS, st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_towers_of_any_shapes_are_the_loop_over_them(drawn, count, bias, seed):
    tasks = drawn_tasks(drawn)
    units = {task.name: own for task, (_, _, own) in zip(tasks, drawn, strict=True)}
    options = {"activation": "tanh", "bias": bias}
    torch.manual_seed(seed)
    towers = Towers(5, tasks, units, **options).double()
    torch.manual_seed(seed)
    apart = loop(5, tasks, units, **options)
    features = torch.randn(count, len(tasks), 5, dtype=torch.float64)
    features.requires_grad_()
    found, expected = towers(features), looped(apart, features)
    assert found.shape == (count, sum(task.width for task in tasks))
    assert near(found, expected)
    # Unequal weights, so that a logit in another's place changes the slopes as well.
    pull = torch.arange(1.0, found.shape[1] + 1, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((logits.tanh() * pull).sum(), features)[0]
        for logits in (found, expected)
    ]
    assert near(*slopes)


@settings(max_examples=25, deadline=None)
@given(TOWERS, st.data())
def test_a_task_reaches_its_own_slice_and_its_own_tower_and_no_other(drawn, data):
    tasks = drawn_tasks(drawn)
    units = {task.name: own for task, (_, _, own) in zip(tasks, drawn, strict=True)}
    torch.manual_seed(0)
    towers = Towers(5, tasks, units, activation="tanh").double()
    reader = data.draw(st.integers(0, len(tasks) - 1))
    first = sum(task.width for task in tasks[:reader])
    features = torch.randn(3, len(tasks), 5, dtype=torch.float64, requires_grad=True)
    logits = towers(features)[:, first : first + tasks[reader].width]
    logits.square().sum().backward()
    for k in range(len(tasks)):
        assert features.grad[:, k].any() == (k == reader)
    for name, members in towers.members.items():
        for parameter in towers[name].parameters():
            for k, copy in enumerate(members):
                slope = None if parameter.grad is None else parameter.grad[k]
                touched = slope is not None and bool(slope.any())
                assert touched == (copy == reader)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_towers_with_norms_are_the_loop_in_training_and_after(
    normalization, activation
):
    tasks = [*BINARY, Task("stars", "multiclass", classes=3), Task("late")]
    units = {"click": (5, 3), "purchase": (4,), "stars": (5, 3), "late": (5, 3)}
    options = {"normalization": normalization, "activation": activation}
    torch.manual_seed(0)
    towers = Towers(7, tasks, units, **options).double()
    torch.manual_seed(0)
    apart = loop(7, tasks, units, **options)
    features = torch.randn(11, 4, 7, dtype=torch.float64)
    for training in (True, True, False):
        towers.train(training)
        apart.train(training)
        assert near(towers(features), looped(apart, features))


def test_logits_stand_in_the_order_of_the_tasks_and_not_of_the_stacks():
    tasks = [Task("click"), Task("stars", "multiclass", classes=3), Task("late")]
    towers = Towers(2, tasks, {"click": (4,), "stars": (), "late": (4,)}, bias=True)
    assert towers.members == {"4x1": [0, 2], "3": [1]}
    assert towers.place.tolist() == [0, 2, 3, 4, 1]
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.zero_()
        towers["4x1"][-1].bias.copy_(torch.tensor([[1.0], [5.0]]))
        towers["3"][-1].bias.copy_(torch.tensor([[2.0, 3.0, 4.0]]))
    assert towers(torch.zeros(1, 3, 2)).tolist() == [[1, 2, 3, 4, 5]]


class Kernels(TorchDispatchMode):
    """Counts the kernels that PyTorch calls."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels(tasks, units, **options):
    """What forward, and forward with backward, of that many towers call."""
    towers = Towers(7, tasks, units, **options)
    features = torch.randn(5, len(tasks), 7, requires_grad=True)
    with Kernels() as forward:
        logits = towers(features)
    with Kernels() as backward:
        logits.sum().backward()
    return forward.found, backward.found


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
PICKED = ("cat", "index", "index_select", "stack", "gather", "index_put")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_sixteen_towers_of_one_shape_take_the_calls_of_two(bias, normalization):
    options = {"bias": bias, "normalization": normalization}
    few, many = (
        kernels([Task(f"t{k}") for k in range(count)], (5, 3), **options)
        for count in (2, 16)
    )
    assert few == many
    forward, backward = many
    assert sum(forward[name] for name in PRODUCTS) == 3
    assert sum(backward[name] for name in PRODUCTS) == 6
    assert not any(found[name] for found in many for name in PICKED)


def test_two_shapes_take_the_products_of_two_stacks():
    units = {f"t{k}": (5,) if k % 3 else () for k in range(16)}
    forward, _ = kernels([Task(f"t{k}") for k in range(16)], units)
    assert sum(forward[name] for name in PRODUCTS) == 3
    assert forward["cat"] == 1
    assert forward["index_select"] == 1
    assert forward["index"] == 0


RESERVED = ["keys", "training", "items", "type", "weight", "forward", "bias", "0"]


def test_tasks_may_have_the_names_of_what_a_module_has(tmp_path):
    tasks = [Task(name, label="click") for name in RESERVED]
    encoder, batch = encoded(tasks, count=7)
    sizes = {name: (4,) if name in ("keys", "weight") else (3,) for name in RESERVED}
    model, other = (SharedBottom(encoder, tower_units=sizes).double() for _ in range(2))
    assert list(predict(model, batch)) == RESERVED
    found = numpy_logits(model, batch)
    assert near(model(batch), torch.from_numpy(found))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(batch), other(batch))
    train = encoder.transform(rows(50))
    history = fit(SharedBottom(encoder), train, epochs=1, progress=False)
    assert set(RESERVED) <= set(history["task"])


# Weights of equal names and shapes that stand for other tasks.
ELSEWHERE = [
    ({"tasks": ["click", "purchase"]}, {"tasks": ["purchase", "click"]}),
    (
        {"tower_units": {"click": (5,), "purchase": (4,)}},
        {"tower_units": {"click": (4,), "purchase": (5,)}},
    ),
    (
        {"tasks": ["click", "purchase"]},
        {"tasks": ["click", "seconds"]},
    ),
]


@pytest.mark.parametrize(("saved", "other"), ELSEWHERE)
def test_towers_of_other_tasks_or_in_another_order_are_refused(saved, other, tmp_path):
    tasks = [*BINARY, Task("seconds", "regression")]
    if "tower_units" in saved:
        tasks = BINARY
    encoder, _ = encoded(tasks)
    train = encoder.transform(rows(50))
    first, second = (SharedBottom(encoder, **options) for options in (saved, other))
    sizes = [{n: p.shape for n, p in m.named_parameters()} for m in (first, second)]
    assert sizes[0] == sizes[1]
    before = [parameter.clone() for parameter in second.parameters()]
    message = (
        f"these weights are of a model laid out as {layouts(first)!r}; this model is"
        f" laid out as {layouts(second)!r}"
    )
    for strict in (True, False):
        with pytest.raises(ValueError, match=re.escape(message)):
            second.load_state_dict(first.state_dict(), strict=strict)
    for old, parameter in zip(before, second.parameters(), strict=True):
        assert torch.equal(old, parameter)
    options = {"epochs": 1, "checkpoint": tmp_path / "run.pt", "progress": False}
    fit(first, train, **options)
    with pytest.raises(ValueError, match="is of another run"):
        fit(second, train, **options)


def test_the_layout_of_a_shared_bottom_is_its_tasks_and_its_towers():
    found = layouts(built(tower_units={"click": (5,), "purchase": ()}))
    assert found == "tasks: click, purchase; towers: {'5x1': [0], '1': [1]}"


def test_tensors_by_task_are_the_slices_of_their_stacks():
    sizes = {"click": (5,), "purchase": (5,)}
    model = built(tower_units=sizes, normalization="batch")
    state, found = model.state_dict(), by_task(model)
    for k, task in enumerate(sizes):
        weight = found[f"towers.{task}.output.weight"]
        assert torch.equal(weight, state["towers.5x1.3.weight"][k])
        scale = found[f"towers.{task}.hidden.1.running_var"]
        assert torch.equal(scale, state["towers.5x1.1.running_var"][5 * k : 5 * k + 5])
        assert found[f"towers.{task}.hidden.1.num_batches_tracked"] == 0


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
    """Weight and bias of each linear layer, the stacked ones taken apart."""
    found = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            found.append((part.weight, part.bias))
        if isinstance(part, StackedLinear):
            copies = len(part.weight)
            biases = [None] * copies if part.bias is None else part.bias
            found += zip(part.weight, biases, strict=True)
    return found


def test_the_default_start_is_that_of_pytorch():
    torch.manual_seed(0)
    found = linears(MLP(7, (5, 3)))
    torch.manual_seed(0)
    assert len(found) == 2
    for drawn_weight, drawn_bias in found:
        weight, bias = torch.empty_like(drawn_weight), torch.empty_like(drawn_bias)
        initialize(weight, bias, "default")
        assert torch.equal(weight, drawn_weight)
        assert torch.equal(bias, drawn_bias)


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
    for weight, bias in found:
        few = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(few.detach(), torch.eye(len(few)), rtol=0, atol=1e-5)
        assert not bias.any()


@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("tower", [True, False])
def test_biases_of_bottom_and_towers_are_switched_apart(bottom, tower):
    model = built(
        bottom_units=(5,), tower_units=(3,), bottom_bias=bottom, tower_bias=tower
    )
    assert {bias is not None for _, bias in linears(model.trunk)} == {bottom}
    assert {bias is not None for _, bias in linears(model.towers)} == {tower}
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
