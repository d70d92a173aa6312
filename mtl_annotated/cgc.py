"""CGC: experts of a task's own

Chapter: book/cgc.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtl_annotated.features import Encoder
from mtl_annotated.mmoe import (
    MIXTURE_OPTIONS,
    Experts,
    Gates,
    gate_options,
    tower_options,
)
from mtl_annotated.shared_bottom import (
    Towers,
    check_names,
    check_options,
    checked_count,
)
from mtl_annotated.tasks import Task
from mtl_annotated.training import Ranker


# Chapter 'CGC', section 'How many experts whom?'
def expert_counts(name: str, counts: int | Sequence[int], tasks: int) -> list[int]:
    """A number of experts for each task: one for all, or one each; 0 is allowed."""
    each: list[Any] = [counts] * tasks
    if isinstance(counts, Iterable) and not isinstance(counts, (str, Set, Mapping)):
        each = list(counts)
    whole = [isinstance(n, Integral) and not isinstance(n, bool) for n in each]
    if len(each) != tasks or not all(whole) or min(each) < 0:
        several = f", or {tasks} of them, one a task" if tasks > 1 else ""
        raise ValueError(
            f"{name}: expected a whole number of at least 0{several}; found {counts!r}"
        )
    return [int(count) for count in each]


# Chapter 'CGC', section 'Who sees whom?'
def sights(owners: Sequence[int], tasks: int, *, shared_gate: bool) -> list[list[int]]:
    """The experts that each gate sees: own and shared ones; the shared gate all.

    `owners` has the task of each expert, or `tasks` for a shared one.
    """
    sees = [
        [e for e, owner in enumerate(owners) if owner in (task, tasks)]
        for task in range(tasks)
    ]
    for task, seen in enumerate(sees):
        if not seen:
            raise ValueError(
                f"own_experts, shared_experts: task {task}, counted from 0, sees no"
                " expert; expected at least one own expert or one shared"
            )
    return [*sees, list(range(len(owners)))] if shared_gate else sees


# Chapter 'CGC', section 'The layer'
class CGCLayer(nn.Module):
    """Experts of each task's own beside shared ones; a gate a task mixes both kinds.

    `[batch, inputs]` to `[batch, tasks, units]`. The experts stand in the order:
    the first task's own, the second's, ..., the shared ones. A task's gate sees its
    own experts and the shared ones.

    `[batch, streams, inputs]` is taken as well. Then the own experts and the gate of
    task k read slice k, the shared experts and the shared gate the slice after the
    tasks'. With `shared_gate` the output has that slice too, a mixture of all
    experts. That is how PLE stacks these layers.

    Args:
        inputs: length of an input vector.
        expert_units: widths of an expert's layers, or a sequence of such, one an
            expert in the order above, equal in the last width.
        tasks: how many tasks read the layer.
        own_experts: experts of a task's own: a number for all tasks, or one each.
        shared_experts: experts that every task sees.
        shared_gate: whether there is a gate that sees all experts.
        learned: for each gate, whether it has parameters; see `Gates`.
        gate_units, gate_bias, gate_temperature, gate_dropout: as `Gates` says.
        expert_bias: whether the experts' layers have biases.
        options: activation and initializer of experts and gates, normalization and
            dropout of the experts.

    Raises: ValueError for a task without any expert, and for sizes and settings that
    do not fit; as `MLP` raises.

    Source: Tang et al. (2020), section 4.1, equations 2 to 5; the shared gate and
    the streams: section 4.2, equation 6.
    """

    reads: Tensor

    def __init__(
        self,
        inputs: int,
        expert_units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        *,
        tasks: int,
        own_experts: int | Sequence[int] = 1,
        shared_experts: int = 1,
        shared_gate: bool = False,
        learned: Sequence[bool] | None = None,
        gate_units: Sequence[int] = (),
        gate_bias: bool = False,
        gate_temperature: float = 1.0,
        gate_dropout: float = 0.0,
        expert_bias: bool = True,
        **options,
    ) -> None:
        super().__init__()
        self.tasks = checked_count("tasks", tasks)
        own = expert_counts("own_experts", own_experts, tasks)
        shared = expert_counts("shared_experts", shared_experts, 1)
        self.owners = [k for k, n in enumerate(own + shared) for _ in range(n)]
        self.register_buffer("reads", torch.tensor(self.owners), persistent=False)
        count = len(self.owners)
        # Before the experts: it refuses a layer that would have none.
        sees = sights(self.owners, tasks, shared_gate=shared_gate)
        self.experts = Experts(inputs, count, expert_units, bias=expert_bias, **options)
        self.gates = Gates(
            inputs,
            sees,
            count,
            units=gate_units,
            bias=gate_bias,
            temperature=gate_temperature,
            dropout=gate_dropout,
            learned=learned,
            **gate_options(options),
        )
        self.width: int = self.experts.width
        self.streams = max([*self.owners, *self.gates.learned]) + 1

    def forward(
        self, features: Float[Tensor, "batch *streams inputs"]
    ) -> Float[Tensor, "batch readers units"]:
        """Each task's own mixture, and that of the shared gate if there is one."""
        if features.ndim == 2:
            return torch.bmm(self.gates(features), self.experts(features))
        if (
            features.ndim != 3
            or not self.streams <= features.shape[1] <= self.tasks + 1
        ):
            raise ValueError(
                "features: expected [batch, inputs] or [batch, streams, inputs] with"
                f" {self.streams} to {self.tasks + 1} streams, found {list(features.shape)}"
            )
        weights = self.gates(features[:, : self.gates.shape[0]])
        own = features.index_select(1, self.reads)
        return torch.bmm(weights, self.experts(own))


# Chapter 'CGC', section 'The model'
def counts_by_name(
    counts: int | Sequence[int] | Mapping[str, int], tasks: Sequence[Task]
) -> int | Sequence[int]:
    """Numbers by a task's name, as numbers in the order of the tasks."""
    if not isinstance(counts, Mapping):
        return counts
    check_names("own_experts names", counts, tasks)
    return [counts[task.name] for task in tasks]


# Chapter 'CGC', section 'The model'
class CGC(Ranker):
    """Customized gate control: own and shared experts, a gate and a tower a task.

    Args:
        encoder: says which columns there are and which tasks.
        own_experts: experts of a task's own: for all tasks, by position or by name.
        shared_experts: experts that every task sees.
        expert_units: widths of an expert's layers, or a sequence of such, one an
            expert: the tasks' own in order, then the shared ones.
        gate_units: widths of each gate's hidden layers; the paper's gates have none.
        tower_units: widths of each tower's hidden layers, for all tasks or by name.
        tower_bias: whether the towers' layers have biases.
        tasks: names of the encoder's tasks that this model learns; all if None.
        options: gate_bias, gate_temperature, gate_dropout and expert_bias, as
            `CGCLayer` says; activation, normalization, dropout and initializer of
            experts and towers (gates take the first and the last).

    Raises:
        ValueError, TypeError: an unknown task or option, or sizes that do not fit;
            as `CGCLayer` and `Towers` raise.

    Source: Tang et al. (2020), section 4.1, equations 2 to 5.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        own_experts: int | Sequence[int] | Mapping[str, int] = 1,
        shared_experts: int = 1,
        expert_units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        gate_units: Sequence[int] = (),
        tower_units: Sequence[int] | Mapping[str, Sequence[int]] = (64, 32),
        tower_bias: bool = True,
        tasks: Sequence[str] | None = None,
        **options,
    ) -> None:
        super().__init__(encoder, tasks=tasks)
        check_options("CGC", options, MIXTURE_OPTIONS)
        self.trunk = CGCLayer(
            self.embedding.width,
            expert_units,
            tasks=len(self.tasks),
            own_experts=counts_by_name(own_experts, self.tasks),
            shared_experts=shared_experts,
            gate_units=gate_units,
            **options,
        )
        own = {"bias": tower_bias, **tower_options(options)}
        self.towers = Towers(self.trunk.width, self.tasks, tower_units, **own)
