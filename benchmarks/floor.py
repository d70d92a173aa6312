"""The least work of a training step of a network that we know how to lay out.

The matrix products of forward and backward, each gate's mixing of the experts that it
sees, the embedding's gather and scatter, and one fused Adam pass over the parameters:
at the network's shapes, into memory that is there already, with nothing between them.
No activation, bias, softmax, loss, shuffle, copy or Python object of a model. The
numbers in the buffers mean nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Widths = Sequence[int]


@dataclass(frozen=True)
class Product:
    """`copies` linear layers side by side, each from `inputs` to `units`."""

    inputs: int
    units: int
    copies: int = 1

    @property
    def multiply_adds(self) -> int:
        """A row's, forward and backward: output, gradient of weight, of input."""
        return 3 * self.copies * self.inputs * self.units

    def operations(self, rows: int) -> list[Callable[[], Tensor]]:
        """The three products, each from and into buffers of its own."""
        stack = (self.copies,) if self.copies > 1 else ()
        multiply = torch.bmm if stack else torch.mm
        x, y = (
            torch.randn(*stack, rows, self.inputs),
            torch.empty(*stack, rows, self.units),
        )
        weight = torch.randn(*stack, self.inputs, self.units)
        of_weight, of_x = torch.empty_like(weight), torch.empty_like(x)
        return [
            lambda: multiply(x, weight, out=y),
            lambda: multiply(x.mT, y, out=of_weight),
            lambda: multiply(y, weight.mT, out=of_x),
        ]


@dataclass(frozen=True)
class Mixture:
    """`gates` mixtures of the same `experts`, whose outputs have `units` numbers."""

    gates: int
    experts: int
    units: int

    @property
    def multiply_adds(self) -> int:
        """A row's, forward and backward: mixture, gradient of weights, of outputs."""
        return 3 * self.gates * self.experts * self.units

    def operations(self, rows: int) -> list[Callable[[], Tensor]]:
        """The three products, a small matrix a row."""
        weights = torch.randn(rows, self.gates, self.experts)
        outputs = torch.randn(rows, self.experts, self.units)
        mixed = torch.empty(rows, self.gates, self.units)
        of_weights, of_outputs = torch.empty_like(weights), torch.empty_like(outputs)
        return [
            lambda: torch.bmm(weights, outputs, out=mixed),
            lambda: torch.bmm(mixed, outputs.mT, out=of_weights),
            lambda: torch.bmm(weights.mT, mixed, out=of_outputs),
        ]


def side_by_side(inputs: int, streams: Iterable[Sequence[Widths]]) -> list[Product]:
    """The products of MLPs, given by their widths, on streams of `inputs` numbers.

    Those of one stream read the same input: their first layers are one product. All
    other layers of one shape are one batched product.
    """
    first: Counter[int] = Counter()
    later: Counter[tuple[int, int]] = Counter()
    for mlps in streams:
        first[sum(widths[0] for widths in mlps)] += 1
        later.update(pair for widths in mlps for pair in pairwise(widths))
    products = [Product(inputs, units, copies) for units, copies in first.items()]
    return products + [Product(*pair, copies) for pair, copies in later.items()]


def level(
    inputs: int,
    tasks: int,
    own: int,
    shared: int,
    expert: Widths,
    gate: Widths,
    *,
    streams: bool,
    shared_gate: bool,
) -> list[Product | Mixture]:
    """A layer of experts and gates; with `streams` each task reads its own input."""
    seen = own + shared
    every = tasks * own + shared
    task = [expert] * own + [(*gate, seen)]
    common = [expert] * shared + [(*gate, every)] * shared_gate
    parts = [task] * tasks + [common]
    if not streams:
        parts = [[mlp for part in parts for mlp in part]]
    mixtures = [Mixture(1, seen, expert[-1])] * tasks
    if not own:
        # All gates see the same experts: one product mixes for all of them.
        mixtures = [Mixture(tasks, seen, expert[-1])]
    mixtures += [Mixture(1, every, expert[-1])] * shared_gate
    return [*side_by_side(inputs, parts), *mixtures]


def products(
    model: str, sizes: dict[str, Any], inputs: int, tasks: int = 2
) -> list[Product | Mixture]:
    """What a network of these sizes multiplies, as few products as there can be."""
    tower = (*sizes["tower_units"], 1)
    if model in ("SharedBottom", "ESMM"):
        bottom = (inputs, *sizes.get("bottom_units", ()))
        layers = [Product(*pair) for pair in pairwise(bottom)]
        return [*layers, *side_by_side(bottom[-1], [[tower] * tasks])]
    own, shared = sizes.get("own_experts", 0), sizes.get("shared_experts")
    shared = sizes["experts"] if shared is None else shared
    expert, levels = sizes["expert_units"], sizes.get("levels", 1)
    found: list[Product | Mixture] = []
    for number in range(levels):
        found += level(
            inputs,
            tasks,
            own,
            shared,
            expert,
            sizes["gate_units"],
            streams=number > 0,
            shared_gate=number < levels - 1,
        )
        inputs = expert[-1]
    return [*found, *side_by_side(inputs, [[tower]] * tasks)]


def multiply_adds(found: Iterable[Product | Mixture]) -> int:
    """Of a row, forward and backward."""
    return sum(each.multiply_adds for each in found)


class Floor:
    """Steps of bare work at the shapes of a network.

    `shapes` are those of its parameters, `tables` the rows of all embedding tables
    together, `columns` the ids of a row, `width` the length of an embedding.
    """

    def __init__(
        self,
        found: Iterable[Product | Mixture],
        batch_size: int,
        shapes: Iterable[Sequence[int]],
        *,
        tables: int,
        columns: int,
        width: int,
    ) -> None:
        self.batch_size = batch_size
        self.operations = [f for each in found for f in each.operations(batch_size)]
        ids = torch.randint(tables, (batch_size * columns,))
        table, gradient = torch.randn(tables, width), torch.zeros(tables, width)
        looked_up = torch.empty(len(ids), width)
        arrived = torch.randn(len(ids), width)
        self.operations += [
            lambda: torch.index_select(table, 0, ids, out=looked_up),
            lambda: gradient.index_add_(0, ids, arrived),
        ]
        parameters = [torch.randn(*shape, requires_grad=True) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    @torch.no_grad()
    def run(self, rows: int) -> int:
        """As many whole batches as fit into `rows`, at least one; the rows done."""
        steps = max(1, rows // self.batch_size)
        for _ in range(steps):
            for operation in self.operations:
                operation()
            self.optimizer.step()
        return steps * self.batch_size
