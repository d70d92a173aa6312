"""What must hold for every model, whatever its trunk: options, precision, tracing, names."""

import inspect
import itertools
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mtl_annotated as mtl
from mtl_annotated import big_tables, training
from mtl_annotated.cgc import expert_counts
from mtl_annotated.mmoe import expert_shapes
from mtl_annotated.shared_bottom import (
    ACTIVATIONS,
    INITIALIZERS,
    NORMALIZATIONS,
    checked_units,
)

BINARY = [mtl.Task("click"), mtl.Task("purchase")]
MIXED = [
    mtl.Task("click"),
    mtl.Task("stars", "multiclass", classes=3),
    mtl.Task("seconds", "regression", given="click"),
]
MODELS = {
    "SharedBottom": partial(mtl.SharedBottom, bottom_units=(8, 4), tower_units=(3,)),
    "OMoE": partial(
        mtl.MMoE, experts=3, expert_units=(8, 4), one_gate=True, tower_units=(3,)
    ),
    "MMoE": partial(
        mtl.MMoE, experts=3, expert_units=(8, 4), gate_units=(5,), tower_units=(3,)
    ),
    "CGC": partial(
        mtl.CGC, own_experts=2, shared_experts=1, expert_units=(8, 4), tower_units=(3,)
    ),
    "PLE": partial(
        mtl.PLE, own_experts=1, shared_experts=2, expert_units=(8, 4), tower_units=(3,)
    ),
}
FUNNELS = {
    "ESMM": partial(mtl.ESMM, tower_units=(3,)),
    "ESMM on MMoE": partial(mtl.ESMM, ranker=MODELS["MMoE"]),
    "ESMM on CGC": partial(mtl.ESMM, ranker=MODELS["CGC"]),
    "ESMM on PLE": partial(mtl.ESMM, ranker=MODELS["PLE"]),
}
ALL = MODELS | FUNNELS
every_model = pytest.mark.parametrize("name", ALL)
every_trunk = pytest.mark.parametrize("name", MODELS)


def rows(count, seed=0):
    generator = np.random.default_rng(seed)
    click = generator.integers(0, 2, count)
    return pd.DataFrame(
        {
            "item": generator.integers(0, 13, count),
            "price": generator.normal(size=count),
            "click": click,
            "purchase": click * generator.integers(0, 2, count),
            "stars": generator.integers(0, 3, count),
            "seconds": generator.normal(size=count),
        }
    )


def encoded(tasks, count=11):
    columns = [mtl.Sparse("item", width=3), mtl.Dense("price")]
    encoder = mtl.Encoder(columns, tasks).fit(rows(101))
    return encoder, encoder.transform(rows(count, seed=1))


def built(name, tasks=BINARY, seed=0, **options):
    encoder, batch = encoded(tasks)
    torch.manual_seed(seed)
    model = ALL[name](encoder, **options).double()
    return model, batch.to(dtype=torch.float64)


@every_model
def test_a_row_scores_the_same_alone_and_among_others(name):
    model, batch = built(name)
    together = mtl.predict(model, batch)
    alone = mtl.predict(model, batch, batch_size=1)
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-12)


@every_model
def test_every_parameter_gets_a_gradient_from_one_row(name):
    model, batch = built(name, activation="tanh")
    model.loss(batch[:1]).backward()
    silent = [
        key
        for key, parameter in model.named_parameters()
        if not key.startswith("embedding")
        and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent


@every_trunk
def test_tasks_of_all_kinds_stand_side_by_side(name):
    model, batch = built(name, MIXED)
    predicted = mtl.predict(model, batch)
    assert list(predicted) == ["click", "stars=0", "stars=1", "stars=2", "seconds"]
    np.testing.assert_allclose(predicted.iloc[:, 1:4].sum(axis=1), 1, atol=1e-12)
    losses = model.losses(batch)
    assert losses.shape == (3,)
    assert losses.isfinite().all()


@every_trunk
def test_one_task_is_enough(name):
    model, batch = built(name, tasks=BINARY[:1])
    assert list(mtl.predict(model, batch)) == ["click"]


@every_model
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_options_reach_the_trunk_and_the_towers(name, normalization, activation):
    options = {"normalization": normalization, "activation": activation}
    model, batch = built(name, dropout=0.5, **options)
    model.loss(batch).backward()
    parts = [model.towers] if name == "ESMM" else [model.trunk, model.towers]
    for part in parts:
        kinds = {type(module) for module in part.modules()}
        assert ACTIVATIONS[activation] in kinds
        assert torch.nn.Dropout in kinds
        words = ("BatchNorm", "LayerNorm")
        norms = [kind for kind in kinds if any(w in kind.__name__ for w in words)]
        assert len(norms) == (normalization != "none")
    model.eval()
    assert torch.equal(model(batch), model(batch))


@every_trunk
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_start_by_name_reaches_every_part(name, initializer):
    torch.manual_seed(0)
    model, batch = built(name, initializer=initializer)
    for key, parameter in model.named_parameters():
        if key.startswith("embedding"):
            continue
        zero = "bias" in key and initializer != "default"
        assert parameter.any() != zero, key
    assert model(batch).isfinite().all()


BIASES = {
    "SharedBottom": {"bottom_bias": False, "tower_bias": False},
    "OMoE": {"expert_bias": False, "tower_bias": False},
    "MMoE": {"expert_bias": False, "tower_bias": False},
    "CGC": {"expert_bias": False, "tower_bias": False},
    "PLE": {"expert_bias": False, "tower_bias": False},
}


@every_trunk
def test_biases_can_be_left_out(name):
    model, _ = built(name, **BIASES[name])
    assert not [key for key, _ in model.named_parameters() if "bias" in key]


@pytest.mark.parametrize("name", ["OMoE", "MMoE", "CGC", "PLE"])
def test_gates_have_biases_only_when_asked(name):
    plain, _ = built(name)
    biased, _ = built(name, gate_bias=True)
    before, after = (
        {key for key, _ in model.named_parameters() if "gates" in key and "bias" in key}
        for model in (plain, biased)
    )
    assert not before
    assert after


@every_model
def test_an_unknown_option_is_refused_by_name(name):
    with pytest.raises(TypeError, match="'expert_count'"):
        built(name, expert_count=3)


@every_model
def test_single_and_half_precision_come_near_double(name):
    model, batch = built(name)
    exact = mtl.predict(model, batch)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found = mtl.predict(model.to(dtype), batch)
        np.testing.assert_allclose(found, exact, rtol=0, atol=near)


@every_model
def test_training_in_bfloat16_lowers_the_loss(name):
    encoder, _ = encoded(BINARY)
    train = encoder.transform(rows(101))
    torch.manual_seed(0)
    model = ALL[name](encoder)
    quiet = {"precision": "bf16", "learning_rate": 0.03, "progress": False}
    history = mtl.fit(model, train, epochs=20, **quiet)
    losses = history[history["split"] == "batches"].groupby("epoch")["loss"].sum()
    assert losses.iloc[-1] < losses.iloc[0] - 0.02
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@every_model
def test_saved_weights_give_the_same_bits(name, tmp_path):
    model, batch = built(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again, _ = built(name, seed=1)
    assert not torch.equal(again(batch), model(batch))
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(batch), model(batch))


@pytest.mark.parametrize("pair", list(itertools.pairwise(ALL)), ids=" and ".join)
def test_models_of_one_encoder_share_no_storage(pair):
    encoder, _ = encoded(BINARY)
    first, second = (ALL[name](encoder) for name in pair)
    again = ALL[pair[0]](encoder)
    found = [
        {
            tensor.untyped_storage().data_ptr()
            for tensor in model.state_dict().values()
            if isinstance(tensor, torch.Tensor)
        }
        for model in (first, second, again)
    ]
    assert sum(map(len, found)) == len(set.union(*found))


@every_model
def test_no_input_is_changed(name):
    model, batch = built(name)
    before = [tensor.clone() for tensor in (batch.ids, batch.dense, batch.labels)]
    model.loss(batch).backward()
    mtl.evaluate(model, batch, metrics="log_loss")
    for old, new in zip(before, (batch.ids, batch.dense, batch.labels), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


TOWERS = {
    "towers.3x1.0.weight": (2, 3, 4),
    "towers.3x1.0.bias": (2, 3),
    "towers.3x1.2.weight": (2, 1, 3),
    "towers.3x1.2.bias": (2, 1),
}
NAMES = {
    "SharedBottom": {
        "trunk.bottom.0.weight": (8, 4),
        "trunk.bottom.0.bias": (8,),
        "trunk.bottom.2.weight": (4, 8),
        "trunk.bottom.2.bias": (4,),
    },
    "ESMM": {},
    "MMoE": {
        "trunk.experts.8x4.0.weight": (3, 8, 4),
        "trunk.experts.8x4.0.bias": (3, 8),
        "trunk.experts.8x4.2.weight": (3, 4, 8),
        "trunk.experts.8x4.2.bias": (3, 4),
        "trunk.gates.hidden.0.weight": (2, 5, 4),
        "trunk.gates.weight": (6, 5),
    },
    "CGC": {
        "trunk.experts.8x4.0.weight": (5, 8, 4),
        "trunk.experts.8x4.0.bias": (5, 8),
        "trunk.experts.8x4.2.weight": (5, 4, 8),
        "trunk.experts.8x4.2.bias": (5, 4),
        "trunk.gates.weight": (6, 4),
    },
    "PLE": {
        f"trunk.levels.{level}.{key}": shape
        for level, gates, inputs in ((0, 10, 4), (1, 6, 4))
        for key, shape in {
            "experts.8x4.0.weight": (4, 8, inputs),
            "experts.8x4.0.bias": (4, 8),
            "experts.8x4.2.weight": (4, 4, 8),
            "experts.8x4.2.bias": (4, 4),
            "gates.weight": (gates, inputs),
        }.items()
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_saved_weights_stay(name):
    model, _ = built(name)
    found = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if key.startswith("t")
    }
    assert found == NAMES[name] | TOWERS


ELSEWHERE = [
    # Weights of equal shapes whose places mean something else.
    ({"own_experts": (2, 1)}, {"own_experts": (1, 2)}),
    ({"tasks": ["click", "purchase"]}, {"tasks": ["purchase", "click"]}),
    (
        {"expert_units": [(5, 4), (4,), (4,)]},
        {"expert_units": [(4,), (5, 4), (4,)]},
    ),
]


@pytest.mark.parametrize(("saved", "other"), ELSEWHERE)
def test_weights_laid_out_in_another_way_are_refused(saved, other, tmp_path):
    encoder, _ = encoded(BINARY)
    train = encoder.transform(rows(50))
    first, second = (mtl.CGC(encoder, **options) for options in (saved, other))
    shapes = [
        [value.shape for value in model.parameters()] for model in (first, second)
    ]
    assert sorted(shapes[0]) == sorted(shapes[1])
    before = second.state_dict()["trunk.gates.weight"].clone()
    with pytest.raises(ValueError, match="these weights are of a model laid out as"):
        second.load_state_dict(first.state_dict())
    assert torch.equal(second.trunk.gates.weight, before)
    options = {"epochs": 1, "checkpoint": tmp_path / "run.pt", "progress": False}
    mtl.fit(first, train, **options)
    with pytest.raises(ValueError, match="is of another run"):
        mtl.fit(second, train, **options)


@pytest.mark.parametrize("option", [{"gate_temperature": 5.0}, {"gate_dropout": 0.5}])
def test_a_gate_of_other_settings_is_another_run_and_no_replica(option, tmp_path):
    encoder, _ = encoded(BINARY)
    train = encoder.transform(rows(50))
    options = {"epochs": 1, "checkpoint": tmp_path / "run.pt", "progress": False}
    mtl.fit(mtl.PLE(encoder), train, **options)
    with pytest.raises(ValueError, match=r"module trunk\.levels\.0\.gates"):
        mtl.fit(mtl.PLE(encoder, **option), train, **options)
    layers = [
        mtl.MMoELayer(4, (3,), tasks=2),
        mtl.MMoELayer(4, (3,), tasks=2, **option),
    ]
    with pytest.raises(ValueError, match="model 1 differs from model 0"):
        mtl.Replicas(layers)


# The annotations ask for sequences; whoever runs no type checker may pass less.
LOOSE = [
    (lambda each: inspect.unwrap(checked_units)("units", each), (8, 4)),
    (lambda each: inspect.unwrap(expert_shapes)(2, each), ((8, 4), (5, 4))),
    (lambda each: inspect.unwrap(expert_shapes)(1, each), (8, 4)),
    (lambda each: inspect.unwrap(expert_counts)("own_experts", each, 2), (2, 1)),
]


@pytest.mark.parametrize(("read", "sizes"), LOOSE)
def test_sizes_may_come_from_a_generator_and_none_is_lost(read, sizes):
    assert read(iter(sizes)) == read(sizes)
    assert len(read(sizes)) > 0


@pytest.mark.parametrize(("read", "sizes"), [LOOSE[0], LOOSE[3]])
@pytest.mark.parametrize("unordered", [{8, 4}, {8: 1, 4: 2}])
def test_sizes_without_an_order_are_refused(read, sizes, unordered):
    with pytest.raises((TypeError, ValueError), match="expected .* found"):
        read(unordered)


@pytest.mark.parametrize("name", ["SharedBottom", "MMoE", "CGC"])
@pytest.mark.parametrize("option", ["gate_droput", "bias", "learned", "shared_gate"])
def test_an_unknown_option_is_answered_with_the_known_ones(name, option):
    valid = "activation, normalization, dropout, initializer"
    with pytest.raises(TypeError, match=rf"unknown option '{option}'.*{valid}$"):
        built(name, **{option: True})


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE"])
def test_a_start_reaches_every_expert_and_every_gate(name):
    options = {"expert_units": (4,), "gate_units": (4,), "initializer": "orthogonal"}
    model, _ = built(name, **options)
    for key, weight in model.trunk.named_parameters():
        if not key.endswith("weight") or key.endswith("gates.weight"):
            continue
        for one in weight.detach():
            torch.testing.assert_close(
                one @ one.T, torch.eye(4).double(), rtol=0, atol=1e-5
            )
    gates = model.trunk.levels[0].gates if name == "PLE" else model.trunk.gates
    for one in gates.weight.detach().split(gates.counts):
        few = one @ one.T if len(one) <= 4 else one.T @ one
        torch.testing.assert_close(few, torch.eye(len(few)).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_lose_experts_apart_from_each_other_and_as_often_as_asked(dtype):
    torch.manual_seed(0)
    gates = mtl.Gates(1, [range(2)] * 2, 2, dropout=np.float64(0.02)).to(dtype).train()
    lost = gates(torch.ones(100_000, 1, dtype=dtype))[:, :, 0] == 0
    share = lost.double().mean(0)
    torch.testing.assert_close(
        share, torch.full((2,), 0.0196).double(), rtol=0, atol=0.0015
    )
    assert lost.all(1).double().mean() < 0.001


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            mtl.MMoELayer(4, tasks=2),
            (2, 3, 4),
            "expected [batch, inputs], found [2, 3, 4]",
        ),
        (mtl.MMoELayer(4, tasks=2), (4,), "expected [batch, inputs], found [4]"),
        (mtl.CGCLayer(4, tasks=2), (2, 2, 4), "with 3 to 3 streams, found [2, 2, 4]"),
        (mtl.CGCLayer(4, tasks=2), (2, 4, 4), "with 3 to 3 streams, found [2, 4, 4]"),
        (
            mtl.CGCLayer(4, tasks=2, shared_experts=0),
            (2, 1, 4),
            "with 2 to 3 streams, found [2, 1, 4]",
        ),
    ],
)
def test_features_of_another_rank_or_number_of_streams_are_refused(
    layer, shape, message
):
    forward = inspect.unwrap(type(layer).forward)
    with pytest.raises(ValueError, match=re.escape(message)):
        forward(layer, torch.zeros(shape))


def test_layers_are_built_without_memory_on_the_meta_device():
    with torch.device("meta"):
        layer = mtl.PLELayer(4, (3,), tasks=2)
    assert all(parameter.is_meta for parameter in layer.parameters())


@every_model
@pytest.mark.parametrize("by_row", [False, True])
def test_rows_in_pieces_change_neither_losses_nor_slopes(name, by_row, monkeypatch):
    columns = [mtl.Sparse("item", width=3), mtl.Dense("price")]
    columns += [mtl.Sequence("history", width=3, length=4)]
    table = rows(23).assign(history=[[k % 5, k % 3][: k % 4] for k in range(23)])
    encoder = mtl.Encoder(columns, BINARY).fit(table)
    batch = encoder.transform(table).to(dtype=torch.float64)
    torch.manual_seed(0)
    model, found = ALL[name](encoder).double(), []
    widths = [int(width) for width in model.embedding.weights] if by_row else []
    for most in (5, 23):
        monkeypatch.setattr(training, "ROWS_AT_ONCE", (most, most))
        assert len(model.split_rows(torch.zeros(23, 1))) == (5 if most == 5 else 1)
        model.zero_grad()
        with big_tables.by_row(model.embedding, widths):
            losses = model.losses(batch)
            model.joint(losses).backward()
        slopes = [p.grad.to_dense() for p in model.parameters()]
        found.append([losses.detach(), *slopes])
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)


TRACED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_models import ALL, BINARY, encoded
encoder, batch = encoded(BINARY, count=2049)
batch = batch.to(dtype=torch.float64)
by_row = {{0: torch.export.Dim("rows")}}
for name, build in ALL.items():
    model = build(encoder).double().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for count in (5, 1, 211):
        assert torch.equal(compiled(batch[:count]), model(batch[:count])), name
    assert torch.allclose(compiled(batch), model(batch), rtol=0, atol=1e-12), name
    shapes = ([by_row] * 3 + [None],)
    program = torch.export.export(model, (batch[:5],), dynamic_shapes=shapes)
    for count in (1, 5, 2049):
        found = program.module()(batch[:count])
        assert torch.allclose(found, model(batch[:count]), rtol=0, atol=1e-12), name
    torch._dynamo.reset()
print("all", len(ALL))
"""


@pytest.mark.slow
def test_every_model_is_compiled_without_a_break_and_exported():
    # In its own process: the shape checks of this one are not traceable.
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"all {len(ALL)}"
