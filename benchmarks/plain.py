"""The same five networks written plainly: a loop over columns, experts, gates, towers.

Two uses. It is the reference: `check` gives it the weights of one of our models and
compares losses, gradients and a few steps of training in double precision. And it is
the honest "before" of the timings: what somebody writes who reads the papers and knows
PyTorch, with nothing batched and nothing slow on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtl_annotated as mtl
from benchmarks.networks import build
from mtl_annotated.training import epoch_seeds, shuffled_order

CLOSE = 1e-10


def perceptron(
    inputs: int, units: Sequence[int], *, bias: bool = True
) -> nn.Sequential:
    """Linear layers, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((inputs, *units)):
        layers += [nn.Linear(width_in, width_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers)


def tower(inputs: int, units: Sequence[int]) -> nn.Sequential:
    """A task's hidden layers and its logit."""
    hidden = perceptron(inputs, units)
    return nn.Sequential(hidden, nn.Linear((inputs, *units)[-1], 1))


class Level(nn.Module):
    """Experts, each task's own and then shared ones, and a gate for each reader."""

    def __init__(
        self,
        inputs: int,
        tasks: int,
        own: int,
        shared: int,
        expert_units: Sequence[int],
        gate_units: Sequence[int],
        shared_gate: bool,
    ) -> None:
        super().__init__()
        # The stream that each expert reads; the shared one comes after the tasks'.
        self.reads = [t for t in range(tasks) for _ in range(own)] + [tasks] * shared
        self.sees = [
            [e for e, stream in enumerate(self.reads) if stream in (task, tasks)]
            for task in range(tasks)
        ]
        if shared_gate:
            self.sees.append(list(range(len(self.reads))))
        self.experts = nn.ModuleList(
            perceptron(inputs, expert_units) for _ in self.reads
        )
        last = (inputs, *gate_units)[-1]
        self.gates = nn.ModuleList(
            nn.Sequential(
                perceptron(inputs, gate_units, bias=False),
                nn.Linear(last, len(seen), bias=False),
            )
            for seen in self.sees
        )

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        made = [
            expert(streams[stream])
            for expert, stream in zip(self.experts, self.reads, strict=True)
        ]
        mixed = []
        for reader, (gate, seen) in enumerate(zip(self.gates, self.sees, strict=True)):
            weights = gate(streams[reader]).softmax(1)
            experts = torch.stack([made[e] for e in seen], 1)
            mixed.append(torch.bmm(weights.unsqueeze(1), experts).squeeze(1))
        return mixed


class Plain(nn.Module):
    """One of the five networks; `forward` gives a logit a task, `[batch, tasks]`."""

    def __init__(
        self,
        model: str,
        sizes: dict[str, Any],
        table_rows: Sequence[int],
        width: int,
        dense: int,
        tasks: int = 2,
    ) -> None:
        super().__init__()
        self.model = model
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in table_rows)
        inputs = len(table_rows) * width + dense
        self.bottom, self.levels = nn.Sequential(), nn.ModuleList()
        if model in ("SharedBottom", "ESMM"):
            units = sizes.get("bottom_units", ())
            self.bottom = perceptron(inputs, units)
            inputs = (inputs, *units)[-1]
        else:
            own, levels = sizes.get("own_experts", 0), sizes.get("levels", 1)
            shared = sizes["shared_experts"] if own else sizes["experts"]
            for number in range(levels):
                level = Level(
                    inputs,
                    tasks,
                    own,
                    shared,
                    sizes["expert_units"],
                    sizes["gate_units"],
                    number < levels - 1,
                )
                self.levels.append(level)
                inputs = sizes["expert_units"][-1]
        self.towers = nn.ModuleList(
            tower(inputs, sizes["tower_units"]) for _ in range(tasks)
        )

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        vectors = [table(ids[:, n]) for n, table in enumerate(self.tables)]
        features = self.bottom(torch.cat([*vectors, dense], 1))
        streams = [features] * (len(self.towers) + 1)
        for level in self.levels:
            streams = level(streams)
        # Without a shared gate, and after a bottom, there are streams left over.
        pairs = zip(self.towers, streams, strict=False)
        return torch.cat([tower(stream) for tower, stream in pairs], 1)

    def probabilities(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Of each task; of ESMM, of the click and of click and conversion."""
        found = self(ids, dense).sigmoid()
        if self.model != "ESMM":
            return found
        click, conversion = found.unbind(1)
        return torch.stack([click, click * conversion], 1)

    def losses(self, ids: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
        """Each task's mean cross-entropy."""
        if self.model == "ESMM":
            found = self.probabilities(ids, dense)
            rows = F.binary_cross_entropy(found, labels, reduction="none")
        else:
            found = self(ids, dense)
            rows = F.binary_cross_entropy_with_logits(found, labels, reduction="none")
        return rows.mean(0)


def fit(
    model: Plain,
    batch: mtl.Batch,
    batch_size: int,
    *,
    epochs: int = 1,
    seed: int = 0,
    fused: bool = False,
) -> None:
    """Train with torch's own Adam, on the batches that `mtl.fit` would take.

    `fused` is a word that torch's Adam takes and does not have by default.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    model.train()
    for epoch in range(epochs):
        order = shuffled_order(len(batch), epoch_seeds(seed, epoch)[0])
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            parts = batch.ids[rows], batch.dense[rows], batch.labels[rows]
            model.losses(*parts).sum().backward()
            optimizer.step()


@torch.no_grad()
def predict(model: Plain, batch: mtl.Batch, batch_size: int) -> Tensor:
    """Probabilities, `[rows, tasks]`."""
    model.eval()
    parts = zip(batch.ids.split(batch_size), batch.dense.split(batch_size), strict=True)
    return torch.cat([model.probabilities(*part) for part in parts])


Piece = tuple[nn.Parameter, Any]


def linears(stack: nn.Module) -> list[nn.Module]:
    """The layers of an MLP, or of MLPs side by side, that have weights."""
    return [
        layer for layer in stack.modules() if getattr(layer, "weight", None) is not None
    ]


def layer_pieces(layers: Sequence[Any], index: Any) -> Iterator[Piece]:
    """Weights and biases, layer after layer, of one copy."""
    for layer in layers:
        yield layer.weight, index
        if layer.bias is not None:
            yield layer.bias, index


def pieces(model: mtl.Ranker, table_rows: Sequence[int]) -> Iterator[Piece]:
    """Where in our parameters each parameter of `Plain` is, in the order it has them."""
    (packed,) = model.embedding.weights.values()
    ends = torch.tensor(table_rows).cumsum(0).tolist()
    for rows, end in zip(table_rows, ends, strict=True):
        yield packed, slice(end - rows, end)
    trunk = model.trunk
    if isinstance(trunk, mtl.SharedBottomLayer):
        yield from layer_pieces(linears(trunk.bottom), ...)
    else:
        for level in getattr(trunk, "levels", [trunk]):
            yield from level_pieces(level)
    yield from stacked_pieces(model.towers, len(model.label_index))


def stacked_pieces(stacks: Any, count: int) -> Iterator[Piece]:
    """Of MLPs of one shape, which our models keep side by side, one after another."""
    (stack,) = stacks.values()
    for copy in range(count):
        yield from layer_pieces(linears(stack), copy)


def level_pieces(level: Any) -> Iterator[Piece]:
    """The same of one layer of experts and gates."""
    yield from stacked_pieces(level.experts, len(level.experts.place))
    start = 0
    for gate, count in enumerate(level.gates.counts):
        yield from layer_pieces(linears(level.gates.hidden), gate)
        yield level.gates.weight, slice(start, start + count)
        start += count


def copy_of(
    model: mtl.Ranker, name: str, sizes: dict[str, Any], encoder: mtl.Encoder
) -> Plain:
    """The plain network with the weights that our model has now."""
    rows = [table.rows for table in encoder.tables.values()]
    width = next(iter(encoder.tables.values())).width
    dense = model.embedding.width - len(rows) * width
    plain = Plain(name, sizes, rows, width, dense, len(encoder.tasks))
    own = model.embedding.weights[str(width)]
    plain.to(own.dtype)
    with torch.no_grad():
        for target, (source, index) in zip(
            plain.parameters(), pieces(model, rows), strict=True
        ):
            target.copy_(source[index])
    return plain


def largest_gap(plain: Plain, model: mtl.Ranker, part: str) -> float:
    """The largest difference between their parameters, or their gradients."""
    rows = [len(table) for table in plain.tables.parameters()]
    return gap_of_pieces(plain, pieces(model, rows), part)


def gap_of_pieces(plain: Plain, found: Iterable[Piece], part: str) -> float:
    """The same, by where each parameter of `plain` is in the other network."""
    gaps = []
    for each, (source, index) in zip(plain.parameters(), found, strict=True):
        ours, theirs = (x if part == "parameters" else x.grad for x in (source, each))
        assert ours is not None
        assert theirs is not None
        gaps.append(float((theirs - ours[index]).detach().abs().max()))
    return max(gaps)


def check(
    name: str,
    sizes: dict[str, Any],
    encoder: mtl.Encoder,
    batch: mtl.Batch,
    *,
    rows: int = 513,
    batch_size: int = 128,
) -> dict[str, float]:
    """Compare our model with the plain one in double precision.

    `losses` and `gradients` are of one batch, `training` is what an epoch of `mtl.fit`
    left apart from an epoch of the plain loop, `predictions` come after that.
    Raises: AssertionError with the gaps, where one is not close.
    """
    few = batch[:rows].to(dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = build(name, encoder, sizes).double()
    plain = copy_of(ours, name, sizes, encoder)
    parts = few.ids, few.dense, few.labels
    losses = plain.losses(*parts)
    # ESMM reports the loss of a third task, which it does not train.
    trained = ours.losses(few)[[0, 2]] if name == "ESMM" else ours.losses(few)
    losses.sum().backward()
    ours.loss(few).backward()
    gaps = {
        "losses": float((losses - trained).abs().max().detach()),
        "gradients": largest_gap(plain, ours, "gradients"),
    }
    fit(plain, few, batch_size)
    mtl.fit(
        ours, few, epochs=1, batch_size=batch_size, train_metrics=False, progress=False
    )
    gaps["training"] = largest_gap(plain, ours, "parameters")
    found = mtl.predict(ours, few)[list(ours.outputs)].to_numpy()
    found = found[:, [0, 2]] if name == "ESMM" else found
    expected = predict(plain, few, batch_size).numpy()
    gaps["predictions"] = float(abs(found - expected).max())
    # Adam divides by the root of a gradient's mean square: a rounding of a gradient
    # near zero comes out larger than it went in.
    limits = {"training": 100 * CLOSE, "predictions": 100 * CLOSE}
    far = {k: gap for k, gap in gaps.items() if not gap <= limits.get(k, CLOSE)}
    if far:
        raise AssertionError(
            f"{name}: in double precision the model and the plain loop differ by {far},"
            f" expected at most {CLOSE} (after training {100 * CLOSE})"
        )
    return gaps
