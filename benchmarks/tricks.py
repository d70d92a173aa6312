"""What each trick buys: MMoE from loader and loops to the package, one trick at a time.

The first variant reads rows through a `DataLoader`, one after another, and has no trick
at all. (The plain loop of the suite `train` has two of them: its batches are slices of
tensors, and one product mixes the experts.) The variants are cumulative, in the order
of `TRICKS`; those in `LEFT_OUT` are each put on top of the last one, to see what they
would add. All compute the same gradients, which is checked in double precision first,
number by number. All run in this process and take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mtl_annotated as mtl
from benchmarks import plain
from benchmarks.networks import SIZES, build
from benchmarks.store import Line
from benchmarks.suites import Command, compare, here, ratio
from mtl_annotated.shared_bottom import StackedMLP
from mtl_annotated.training import batches

TRICKS = (
    "batches are slices of tensors",
    "one packed table",
    "experts side by side",
    "one product mixes",
    "gates side by side",
    "towers side by side",
    "rows by index_select",
    "one pass of Adam",
)
LEFT_OUT = (
    "ReLU in place",
    "experts as one autograd.Function",
    "torch.compile",
)
START, PACKAGE = "loader and loops", "the package"


class ExpertBank(torch.autograd.Function):
    """Two layers of experts with ReLU, forward and backward in as few calls as we know.

    Features `[batch, inputs]`, weights `[experts, units, inputs]` and
    `[experts, width, units]` with biases `[experts, units]` and `[experts, width]`, to
    `[experts, batch, width]`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        first, first_bias, second, second_bias = weights
        count = len(first)
        low = torch.addmm(first_bias.flatten(), x, first.flatten(0, 1).t()).relu_()
        own = low.view(len(x), count, -1).transpose(0, 1)
        high = torch.baddbmm(second_bias[:, None], own, second.mT).relu_()
        ctx.save_for_backward(x, first, second, low, high)
        return high

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, first, second, low, high = ctx.saved_tensors
        cut = torch.ops.aten.threshold_backward.grad_input
        top = cut(gradients[0], high, 0, grad_input=torch.empty_like(high))
        own = low.view(len(x), len(first), -1)
        below = torch.empty_like(own)
        cut(torch.bmm(top, second).transpose(0, 1), own, 0, grad_input=below)
        flat = below.flatten(1)
        return (
            flat @ first.flatten(0, 1),
            (flat.t() @ x).view_as(first),
            flat.sum(0).view(len(first), -1),
            torch.bmm(top.mT, own.transpose(0, 1)),
            top.sum(1),
        )


class Variant(nn.Module):
    """An MMoE with the weights of a plain one, and some of the tricks."""

    def __init__(self, start: plain.Plain, tricks: Sequence[str]) -> None:
        super().__init__()
        self.tricks = frozenset(tricks)
        (level,) = start.levels
        tables = [table.weight.detach() for table in start.tables.children()]
        sizes = torch.tensor([0, *map(len, tables[:-1])])
        self.register_buffer("first_rows", sizes.cumsum(0))
        self.tables = start.tables
        if "one packed table" in tricks:
            self.tables = nn.ModuleList(
                [nn.Embedding.from_pretrained(torch.cat(tables))]
            )
            self.tables[0].weight.requires_grad_()
        self.experts: nn.Module = level.experts
        if "experts side by side" in tricks:
            self.experts = StackedMLP(list(level.experts.children()))
        if "ReLU in place" in tricks:
            for part in self.experts.modules():
                if isinstance(part, nn.ReLU):
                    part.inplace = True
        self.gates, self.towers = level.gates, start.towers
        if "gates side by side" in tricks:
            self.gates = StackedMLP([flattened(gate) for gate in level.gates])
        if "towers side by side" in tricks:
            self.towers = StackedMLP([flattened(tower) for tower in start.towers])

    def features(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Vectors and numbers, `[batch, inputs]`."""
        if "one packed table" not in self.tricks:
            vectors = [table(ids[:, n]) for n, table in enumerate(self.tables)]
            return torch.cat([*vectors, dense], 1)
        rows, weight = ids + self.first_rows, self.tables[0].weight
        if "rows by index_select" not in self.tricks:
            return torch.cat([F.embedding(rows, weight).flatten(1), dense], 1)
        found = weight.index_select(0, rows.flatten()).view(len(rows), -1)
        return torch.cat([found, dense], 1)

    def made(self, x: Tensor) -> Tensor:
        """What the experts make of the features, `[batch, experts, units]`."""
        if "experts as one autograd.Function" in self.tricks:
            return ExpertBank.apply(x, *self.experts.parameters()).transpose(0, 1)
        if "experts side by side" in self.tricks:
            return self.experts(x)
        return torch.stack([expert(x) for expert in self.experts], 1)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = self.features(ids, dense)
        experts = self.made(x)
        if "gates side by side" in self.tricks:
            weights = self.gates(x).softmax(2)
        else:
            weights = torch.stack([gate(x) for gate in self.gates], 1).softmax(2)
        if "one product mixes" in self.tricks:
            mixed = torch.bmm(weights, experts)
        else:
            # As most libraries write it: every weight times every unit, then the sum.
            mixed = (weights.unsqueeze(3) * experts.unsqueeze(1)).sum(2)
        if "towers side by side" in self.tricks:
            return self.towers(mixed).flatten(1)
        pairs = zip(self.towers, mixed.unbind(1), strict=True)
        return torch.cat([tower(own) for tower, own in pairs], 1)


def flattened(stack: nn.Module) -> nn.Sequential:
    """Hidden layers and last layer as one sequence."""
    hidden, last = stack.children()
    return nn.Sequential(*hidden.children(), last)


def parts_of(
    batch: mtl.Batch, batch_size: int, tricks: frozenset[str], seed: int
) -> Iterator[Sequence[Tensor]]:
    """Ids, dense values and labels of each batch of an epoch."""
    generator = torch.Generator().manual_seed(seed)
    if "batches are slices of tensors" in tricks:
        order = torch.randperm(len(batch), generator=generator)
        for part in batches(batch, order, batch_size):
            yield part.ids, part.dense, part.labels
    else:
        rows = TensorDataset(batch.ids, batch.dense, batch.labels)
        yield from DataLoader(
            rows, batch_size=batch_size, shuffle=True, generator=generator
        )


def loss_of(network: nn.Module, ids: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """The joint loss of a batch."""
    found = network(ids, dense)
    rows = F.binary_cross_entropy_with_logits(found, labels, reduction="none")
    return rows.mean(0).sum()


class Trained:
    """A variant, its optimizer, and how to run an epoch."""

    def __init__(self, start: plain.Plain, tricks: Sequence[str]) -> None:
        self.network = Variant(start, tricks)
        fused = "one pass of Adam" in tricks
        options = {"fused": True} if fused else {"foreach": False}
        parameters = self.network.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, **options)
        self.loss: Any = partial(loss_of, self.network)
        if "torch.compile" in tricks:
            self.loss = torch.compile(self.loss)

    def epoch(self, batch: mtl.Batch, batch_size: int, seed: int = 0) -> int:
        """One pass; how many rows it had."""
        for parts in parts_of(batch, batch_size, self.network.tricks, seed):
            self.optimizer.zero_grad()
            self.loss(*parts).backward()
            self.optimizer.step()
        return len(batch)


def ladder() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each variant's name, and the tricks that it has."""
    yield START, ()
    for number, name in enumerate(TRICKS, 1):
        yield name, TRICKS[:number]
    for name in LEFT_OUT:
        yield name, (*TRICKS, name)


def pieces(variant: Variant, start: plain.Plain) -> Iterator[plain.Piece]:
    """Where each parameter of the plain network is, in the order it has them."""
    tables = [len(table) for table in start.tables.parameters()]
    if "one packed table" in variant.tricks:
        (packed,) = variant.tables.parameters()
        ends = torch.tensor(tables).cumsum(0).tolist()
        for rows, end in zip(tables, ends, strict=True):
            yield packed, slice(end - rows, end)
    else:
        yield from whole(variant.tables)
    (level,) = start.levels
    for part, count, trick in (
        (variant.experts, len(level.experts), "experts side by side"),
        (variant.gates, len(level.gates), "gates side by side"),
        (variant.towers, len(start.towers), "towers side by side"),
    ):
        if trick in variant.tricks:
            yield from plain.stacked_pieces({trick: part}, count)
        else:
            yield from whole(part)


def whole(part: nn.Module) -> Iterator[plain.Piece]:
    """Parameters that hold one piece each."""
    return ((parameter, ...) for parameter in part.parameters())


def check(
    model: mtl.Ranker,
    encoder: mtl.Encoder,
    batch: mtl.Batch,
    names: Collection[str] = (START, *TRICKS, *LEFT_OUT),
) -> dict[str, float]:
    """Every variant's loss and gradients against the plain loop's, number by number.

    The largest gap of each, in double precision. `torch.compile` is left out where it
    cannot run: then it cannot be timed either.
    Raises: AssertionError where a gap is above 1e-10.
    """
    few, model = batch[:321].to(dtype=torch.float64), model.double()
    parts = few.ids, few.dense, few.labels
    start = partial(plain.copy_of, model, "MMoE", SIZES["MMoE"], encoder)
    reference, gaps = start(), {}
    expected = reference.losses(*parts).sum()
    expected.backward()
    for name, tricks in ladder():
        if name not in names:
            continue
        trained = Trained(start(), tricks)
        try:
            loss = trained.loss(*parts)
            loss.backward()
        except Exception:
            if name != "torch.compile":
                raise
            continue
        found = pieces(trained.network, reference)
        gradients = plain.gap_of_pieces(reference, found, "gradients")
        gaps[name] = max(float((loss - expected).detach().abs()), gradients)
        if not gaps[name] <= plain.CLOSE:
            raise AssertionError(
                f"{name}: differs from the plain loop by {gaps[name]}, expected at most"
                f" {plain.CLOSE}"
            )
    return gaps


def run(command: Command, left_out: Sequence[str] = LEFT_OUT) -> None:
    """The suite `tricks`: a line a variant and batch size."""
    names = [START, *TRICKS, *left_out, PACKAGE]
    checked = False
    for batch_size in command.batch_sizes:
        case = {"suite": "tricks", "model": "MMoE", "batch_size": batch_size}
        lines = {name: {**case, "case": name} for name in names}
        if not command.any_wanted(lines.values()):
            continue
        rows = command.rows[False]
        if not checked:
            torch.manual_seed(0)
            check(build("MMoE", rows.encoder), rows.encoder, rows.train, names)
            checked = True
        measure(command, lines, batch_size)


def ways(
    model: mtl.Ranker, encoder: mtl.Encoder, batch: mtl.Batch, batch_size: int
) -> Iterator[tuple[str, Callable[[], int]]]:
    """How each variant, and the package, makes an epoch."""
    for name, tricks in ladder():
        start = plain.copy_of(model, "MMoE", SIZES["MMoE"], encoder)
        yield name, partial(Trained(start, tricks).epoch, batch, batch_size)

    def package() -> int:
        size = {"epochs": 1, "batch_size": batch_size}
        mtl.fit(model, batch, **size, train_metrics=False, progress=False)
        return len(batch)

    yield PACKAGE, package


def measure(command: Command, lines: dict[str, Line], batch_size: int) -> None:
    """Let the variants of one batch size take turns, and put their lines."""
    rows = command.rows[False]
    model = build("MMoE", rows.encoder)
    turns = [
        here(name, way)
        for name, way in ways(model, rows.encoder, rows.train, batch_size)
        if name in lines
    ]
    for turn in turns:
        turn.warm_up()
    found = compare(command, lines, turns)
    first = found.get(START, {}).get("rows_per_second")
    for line in found.values():
        command.put({**line, "over_start": ratio(line["rows_per_second"], first)})
