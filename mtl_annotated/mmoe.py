"""MMoE: experts, and a gate for each task

Chapter: book/mmoe.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_annotated.features import Encoder
from mtl_annotated.shared_bottom import (
    MLP,
    MLP_OPTIONS,
    StackedMLP,
    Stacks,
    Towers,
    check_options,
    checked_count,
    checked_units,
    linear_layer,
)
from mtl_annotated.training import Ranker


# Chapter 'MMoE', section 'Experts'
def expert_shapes(
    count: int, units: Sequence[int] | Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """The layer widths of each expert; refuses what cannot be mixed."""
    ordered = isinstance(units, Iterable) and not isinstance(units, (str, Set, Mapping))
    each: Any = list(units) if ordered else units
    if ordered and not all(isinstance(width, Integral) for width in each):
        shapes = [checked_units("expert_units", one) for one in each]
    else:
        shapes = [checked_units("expert_units", each)] * count
    if len(shapes) != count:
        raise ValueError(
            f"expert_units: expected widths for {count} experts, found {len(shapes)}"
        )
    if any(not shape for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(
            "expert_units: expected at least one layer an expert and equal last"
            f" widths, because experts are mixed; found {units!r}"
        )
    return shapes


# Chapter 'MMoE', section 'Experts'
class Experts(Stacks):
    """Experts side by side; those of one shape are computed together.

    `[batch, inputs]`, which all read, or `[batch, experts, inputs]`, to
    `[batch, experts, width]`, in the order in which `units` lists them.

    Args:
        inputs: length of the vector that an expert reads.
        count: how many experts there are.
        units: widths of an expert's layers, or a sequence of such, one an expert,
            which may differ in all but the last width.
        options: of each expert's `MLP`.

    Raises: ValueError for sizes that do not fit; as `MLP` raises.
    """

    place: Tensor

    def __init__(
        self,
        inputs: int,
        count: int,
        units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        **options,
    ) -> None:
        shapes = expert_shapes(checked_count("count", count), units)
        mlps = [MLP(inputs, shape, **options) for shape in shapes]
        super().__init__(mlps, shapes)
        order = [index for members in self.members.values() for index in members]
        place = torch.tensor([order.index(index) for index in range(count)])
        self.register_buffer("place", place, persistent=False)
        self.width: int = mlps[0].width

    def forward(
        self, features: Float[Tensor, "batch *experts inputs"]
    ) -> Float[Tensor, "batch experts width"]:
        """What each expert makes of its input."""
        parts = self.parts(features)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, 1).index_select(1, self.place)


# Chapter 'MMoE', section 'Gates'
def check_gates(
    sees: Sequence[Sequence[int]],
    experts: int,
    learned: Sequence[bool],
    temperature: float,
    dropout: float,
) -> None:
    """Refuse gates that see what is not there, and settings without a meaning."""
    for gate, seen in enumerate(sees):
        known = set(seen) <= set(range(experts))
        if not seen or not known or len(set(seen)) < len(seen):
            raise ValueError(
                f"sees[{gate}]: expected at least one expert, each once, from 0 to"
                f" {experts - 1}; found {list(seen)}"
            )
    if len(learned) != len(sees):
        raise ValueError(
            f"learned: expected one for each of {len(sees)} gates, found {learned!r}"
        )
    if not isinstance(temperature, Real) or not 0 < temperature < torch.inf:
        raise ValueError(f"gate_temperature must be above 0, found {temperature!r}")
    if not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise ValueError(f"gate_dropout must be in [0, 1), found {dropout!r}")


# Chapter 'MMoE', section 'Gates'
def places(
    sees: Sequence[Sequence[int]], choosing: Sequence[int], experts: int
) -> list[int]:
    """Where each logit, gate after gate, comes from: a link, or then 0, or then -inf.

    `choosing` are the positions of the gates that have links to learn.
    """
    links = {
        pair: n for n, pair in enumerate((k, e) for k in choosing for e in sees[k])
    }
    return [
        links.get((k, e), len(links) + (e not in seen))
        for k, seen in enumerate(sees)
        for e in range(experts)
    ]


# Chapter 'MMoE', section 'Gates'
def joined(parts: Sequence[Tensor]) -> nn.Parameter | None:
    """Weights of several layers below one another; None where there are none."""
    return nn.Parameter(torch.cat([x.detach() for x in parts])) if parts else None


# Chapter 'MMoE', section 'Gates'
class Gates(nn.Module):
    """Gates side by side: for each row, how much of each expert a reader takes.

    `[batch, inputs]`, which every gate reads, or `[batch, gates, inputs]`, to
    weights `[batch, gates, experts]`, which sum to 1 over the experts. A gate gives
    exactly 0 to an expert that it may not see. `weight` has a row for each link of
    a gate to an expert, gate after gate, each in the order of `sees`.

    Args:
        inputs: length of the vector that a gate reads.
        sees: for each gate, the positions of the experts that it may use.
        experts: how many experts there are.
        units: widths of each gate's hidden layers.
        bias: whether the gates' layers have biases; in the papers they have none.
        temperature: divides the logits; above 1 mixes more evenly, below 1 less.
        dropout: in training, the chance that a gate loses an expert for a row; what
            it keeps is made to sum to 1 again. If it would lose all, it keeps all.
        learned: for each gate, whether it has parameters. One without takes the
            mean of what it sees; so does one that sees a single expert.
        options: activation and initializer of the gates' layers.

    Raises: ValueError for a temperature that is not positive, a dropout outside
    [0, 1), a gate that sees nothing or what is not there; as `MLP` raises.

    Source: Ma et al. (2018), MMoE, equation 7; dropout: Zhao et al. (2019).
    """

    reads: Tensor
    place: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        sees: Sequence[Sequence[int]],
        experts: int,
        *,
        units: Sequence[int] = (),
        bias: bool = False,
        temperature: float = 1.0,
        dropout: float = 0.0,
        learned: Sequence[bool] | None = None,
        **options,
    ) -> None:
        super().__init__()
        sees = [list(seen) for seen in sees]
        wanted = [True] * len(sees) if learned is None else learned
        check_gates(sees, experts, wanted, temperature, dropout)
        units = checked_units("gate_units", units)
        choosing = [k for k, seen in enumerate(sees) if wanted[k] and len(seen) > 1]
        self.temperature, self.dropout = float(temperature), float(dropout)
        self.learned, self.shape, self.layout = (
            choosing,
            (len(sees), experts),
            str(sees),
        )
        self.counts = [len(sees[k]) for k in choosing]
        place = places(sees, choosing, experts)
        self.in_place = place == list(range(sum(self.counts)))
        self.register_buffer("reads", torch.tensor(choosing).long(), persistent=False)
        self.register_buffer("place", torch.tensor(place), persistent=False)
        mlps = [MLP(inputs, units, bias=bias, **options) for _ in choosing]
        self.hidden = StackedMLP(mlps) if mlps and units else nn.Sequential()
        width, start = (inputs, *units)[-1], options.get("initializer", "default")
        layers = [
            linear_layer(width, count, bias=bias, initializer=start)
            for count in self.counts
        ]
        biases = [layer.bias for layer in layers] if bias else []
        self.register_parameter("weight", joined([layer.weight for layer in layers]))
        self.register_parameter("bias", joined(biases))

    def link_logits(
        self, features: Float[Tensor, "batch *gates inputs"]
    ) -> Float[Tensor, "batch links"]:
        """The logit of each link of a learned gate to an expert."""
        every = features.ndim == 2 or len(self.learned) == self.shape[0]
        hidden = self.hidden(
            features if every else features.index_select(1, self.reads)
        )
        if hidden.ndim == 2:
            return F.linear(hidden, self.weight, self.bias)
        weights = self.weight.split(self.counts)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if self.bias is not None:
            biases = self.bias.split(self.counts)
        parts = zip(hidden.unbind(1), weights, biases, strict=True)
        return torch.cat([F.linear(*part) for part in parts], 1)

    def logits(
        self, features: Float[Tensor, "batch *gates inputs"]
    ) -> Float[Tensor, "batch gates experts"]:
        """The logits, minus infinity where a gate may not see an expert."""
        found = features.new_zeros(features.shape[0], 0)
        if self.learned:
            found = self.link_logits(features) / self.temperature
        if not self.in_place:
            found = F.pad(F.pad(found, (0, 1)), (0, 1), value=-torch.inf)
            found = found.index_select(1, self.place)
        return found.unflatten(1, self.shape)

    def dropped(
        self, logits: Float[Tensor, "batch gates experts"]
    ) -> Float[Tensor, "batch gates experts"]:
        """The logits with some experts out of sight, never all."""
        # In 32 bits at least: bfloat16 has too few numbers to draw a small chance from.
        lost = torch.rand(logits.shape, device=logits.device) < self.dropout
        left = logits.masked_fill(lost, -torch.inf)
        nothing = left.isneginf().all(-1, keepdim=True)
        return logits.where(nothing, left)

    def forward(
        self, features: Float[Tensor, "batch *gates inputs"]
    ) -> Float[Tensor, "batch gates experts"]:
        """The weights, softmax over the experts in sight."""
        logits = self.logits(features)
        if self.training and self.dropout:
            logits = self.dropped(logits)
        return logits.softmax(-1)

    def extra_repr(self) -> str:
        return (
            f"sees={self.layout}, learned={self.learned},"
            f" temperature={self.temperature}, dropout={self.dropout}"
        )


# Chapter 'MMoE', section 'The layer'
def gate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What gates take from the options of a layer: neither norms nor dropout."""
    names = ("activation", "initializer")
    return {name: options[name] for name in names if name in options}


# Chapter 'MMoE', section 'The layer'
class MMoELayer(nn.Module):
    """Experts that all tasks share, and a gate a task that mixes them.

    `[batch, inputs]` to `[batch, tasks, units]`. `gates(features)` are the weights,
    `[batch, tasks, experts]`, or `[batch, 1, experts]` with `one_gate`.

    Args:
        inputs: length of the input vector.
        expert_units: widths of an expert's layers, or a sequence of such, one an
            expert, equal in the last width.
        tasks: how many tasks read the layer.
        experts: how many experts there are.
        one_gate: one gate for all tasks (OMoE) instead of a gate a task.
        gate_units, gate_bias, gate_temperature, gate_dropout: as `Gates` says.
        expert_bias: whether the experts' layers have biases.
        options: activation and initializer of experts and gates, normalization and
            dropout of the experts.

    Raises: ValueError for sizes and settings that do not fit; as `MLP` raises.

    Source: Ma et al. (2018), section 4.2, equations 6 and 7; OMoE: section 4.1,
    equation 5.
    """

    def __init__(
        self,
        inputs: int,
        expert_units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        *,
        tasks: int,
        experts: int = 8,
        one_gate: bool = False,
        gate_units: Sequence[int] = (),
        gate_bias: bool = False,
        gate_temperature: float = 1.0,
        gate_dropout: float = 0.0,
        expert_bias: bool = True,
        **options,
    ) -> None:
        super().__init__()
        self.tasks = checked_count("tasks", tasks)
        count = checked_count("experts", experts)
        self.experts = Experts(inputs, count, expert_units, bias=expert_bias, **options)
        self.gates = Gates(
            inputs,
            [range(count)] * (1 if one_gate else tasks),
            count,
            units=gate_units,
            bias=gate_bias,
            temperature=gate_temperature,
            dropout=gate_dropout,
            **gate_options(options),
        )
        self.width: int = self.experts.width

    def forward(
        self, features: Float[Tensor, "batch inputs"]
    ) -> Float[Tensor, "batch tasks units"]:
        """Each task's own mixture of the experts."""
        if features.ndim != 2:
            found = list(features.shape)
            raise ValueError(f"features: expected [batch, inputs], found {found}")
        mixed = torch.bmm(self.gates(features), self.experts(features))
        return mixed.expand(-1, self.tasks, -1)


GATE_OPTIONS = ("gate_bias", "gate_temperature", "gate_dropout", "expert_bias")
MIXTURE_OPTIONS = (*GATE_OPTIONS, *MLP_OPTIONS)


# Chapter 'MMoE', section 'The model'
def tower_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What towers take from the options of a model: all that is of an `MLP`."""
    return {name: options[name] for name in MLP_OPTIONS if name in options}


# Chapter 'MMoE', section 'The model'
class MMoE(Ranker):
    """Multi-gate mixture-of-experts: shared experts, a gate and a tower a task.

    Args:
        encoder: says which columns there are and which tasks.
        experts: how many experts there are.
        expert_units: widths of an expert's layers, or a sequence of such, one an
            expert, equal in the last width.
        gate_units: widths of each gate's hidden layers; the paper's gates have none.
        one_gate: one gate for all tasks (OMoE) instead of a gate a task.
        tower_units: widths of each tower's hidden layers, for all tasks or by name.
        tower_bias: whether the towers' layers have biases.
        tasks: names of the encoder's tasks that this model learns; all if None.
        options: gate_bias, gate_temperature, gate_dropout and expert_bias, as
            `MMoELayer` says; activation, normalization, dropout and initializer of
            experts and towers (gates take the first and the last).

    Raises:
        ValueError, TypeError: an unknown task or option, or sizes that do not fit;
            as `MMoELayer` and `Towers` raise.

    Source: Ma et al. (2018), section 4.2, equations 6 and 7.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        experts: int = 8,
        expert_units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        gate_units: Sequence[int] = (),
        one_gate: bool = False,
        tower_units: Sequence[int] | Mapping[str, Sequence[int]] = (64, 32),
        tower_bias: bool = True,
        tasks: Sequence[str] | None = None,
        **options,
    ) -> None:
        super().__init__(encoder, tasks=tasks)
        check_options("MMoE", options, MIXTURE_OPTIONS)
        self.trunk = MMoELayer(
            self.embedding.width,
            expert_units,
            tasks=len(self.tasks),
            experts=experts,
            one_gate=one_gate,
            gate_units=gate_units,
            **options,
        )
        own = {"bias": tower_bias, **tower_options(options)}
        self.towers = Towers(self.trunk.width, self.tasks, tower_units, **own)
