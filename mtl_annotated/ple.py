"""PLE: levels of extraction

Chapter: book/ple.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mtl_annotated.cgc import CGCLayer, counts_by_name, expert_counts
from mtl_annotated.features import Encoder, naming
from mtl_annotated.mmoe import MIXTURE_OPTIONS, tower_options
from mtl_annotated.shared_bottom import Towers, checked_count
from mtl_annotated.training import Ranker

SIZES_OF_A_LEVEL = ("own_experts", "shared_experts", "expert_units", "gate_units")
LEVEL_SETTINGS = (*SIZES_OF_A_LEVEL, *MIXTURE_OPTIONS)


# Chapter 'PLE', section 'The settings of the levels'
def level_settings(
    levels: int | Sequence[Mapping[str, Any]], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The settings of each level: the common ones, and what differs there.

    Raises: ValueError for no level and for what is no mapping; TypeError for a
    setting that is not one of `LEVEL_SETTINGS`.
    """
    each: Any = levels
    if isinstance(each, Integral) and not isinstance(each, bool):
        each = [{}] * int(each)
    listed = isinstance(each, Sequence) and all(isinstance(x, Mapping) for x in each)
    if not listed or not each:
        raise ValueError(
            "levels: expected a number of at least 1, or a mapping of settings for"
            f" each level such as [{{'own_experts': 2}}, {{}}]; found {levels!r}"
        )
    settings = [{**common, **level} for level in each]
    for name in (name for level in settings for name in level):
        if name not in LEVEL_SETTINGS:
            valid = ", ".join(LEVEL_SETTINGS)
            raise TypeError(f"unknown setting {name!r} of a level, choose from {valid}")
    return settings


# Chapter 'PLE', section 'Which gates are needed'
def streams_read(settings: Sequence[Mapping[str, Any]], tasks: int) -> list[list[bool]]:
    """For each level, which streams of its output are read: the tasks', the shared.

    The level above reads a stream with its experts, or with a gate that is itself
    read and has a choice. A gate whose stream nobody reads needs no parameters.

    Raises: ValueError for numbers of experts that do not fit, with the level.
    """
    read = [[True] * tasks + [False]]
    for number in range(len(settings) - 1, 0, -1):
        counts = settings[number]
        with naming(f"levels[{number}]"):
            own = expert_counts("own_experts", counts["own_experts"], tasks)
            shared = expert_counts("shared_experts", counts["shared_experts"], 1)
        owned = own + shared
        seen = [count + shared[0] for count in own] + [sum(owned)]
        chosen = [use and count > 1 for use, count in zip(read[0], seen, strict=True)]
        read.insert(0, [n > 0 or gate for n, gate in zip(owned, chosen, strict=True)])
    return read


# Chapter 'PLE', section 'The layer'
class PLELayer(nn.Module):
    """CGC layers on top of each other, with a stream for each task and a shared one.

    `[batch, inputs]` to `[batch, tasks, units]`. Each level reads what the gates
    below it gave. The last level has no shared gate, because nobody would read it.

    Args:
        inputs: length of the input vector.
        expert_units, own_experts, shared_experts: as `CGCLayer` says.
        tasks: how many tasks read the layer.
        levels: how many levels there are, or a sequence of mappings, one a level
            from the input up, of the settings in which that level differs.
        options: further options of `CGCLayer`; `LEVEL_SETTINGS` lists all.

    Raises: ValueError for no level, and as `CGCLayer` raises; TypeError for an
    unknown setting.

    Source: Tang et al. (2020), section 4.2, equations 6 and 7.
    """

    def __init__(
        self,
        inputs: int,
        expert_units: Sequence[int] | Sequence[Sequence[int]] = (64, 64),
        *,
        tasks: int,
        levels: int | Sequence[Mapping[str, Any]] = 2,
        own_experts: int | Sequence[int] = 1,
        shared_experts: int = 1,
        **options,
    ) -> None:
        super().__init__()
        self.tasks = checked_count("tasks", tasks)
        expert_counts("own_experts", own_experts, tasks)
        expert_counts("shared_experts", shared_experts, 1)
        common = {
            "expert_units": expert_units,
            "own_experts": own_experts,
            "shared_experts": shared_experts,
            **options,
        }
        settings = level_settings(levels, common)
        self.levels = nn.ModuleList()
        for number, read in enumerate(streams_read(settings, tasks)):
            with naming(f"levels[{number}]"):
                layer = CGCLayer(
                    inputs,
                    tasks=tasks,
                    shared_gate=read[-1],
                    learned=read if read[-1] else read[:-1],
                    **settings[number],
                )
            self.levels.append(layer)
            inputs = layer.width
        self.width: int = inputs

    def forward(
        self, features: Float[Tensor, "batch inputs"]
    ) -> Float[Tensor, "batch tasks units"]:
        """The streams of the tasks, after the last level."""
        for level in self.levels:
            features = level(features)
        return features


# Chapter 'PLE', section 'The model'
class PLE(Ranker):
    """Progressive layered extraction: levels of own and shared experts, then towers.

    Args:
        encoder: says which columns there are and which tasks.
        levels: how many levels there are, or a sequence of mappings, one a level
            from the input up, of the settings in which that level differs.
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

    The joint loss of the paper, with sample spaces and weights that change from
    epoch to epoch (equations 8 to 10), is that of every ranker: see `Task`.

    Raises:
        ValueError, TypeError: an unknown task or option, or sizes that do not fit;
            as `PLELayer` and `Towers` raise.

    Source: Tang et al. (2020), section 4.2, equations 6 and 7.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        levels: int | Sequence[Mapping[str, Any]] = 2,
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
        common = {
            "own_experts": own_experts,
            "shared_experts": shared_experts,
            "expert_units": expert_units,
            "gate_units": gate_units,
            **options,
        }
        settings = level_settings(levels, common)
        for number, level in enumerate(settings):
            with naming(f"levels[{number}]"):
                counts = counts_by_name(level["own_experts"], self.tasks)
            level["own_experts"] = counts
        inputs, count = self.embedding.width, len(self.tasks)
        self.trunk = PLELayer(inputs, tasks=count, levels=settings)
        own = {"bias": tower_bias, **tower_options(options)}
        self.towers = Towers(self.trunk.width, self.tasks, tower_units, **own)
