"""Many seeds at once: S small models as one batched program, and one after another.

Two sizes: the networks of the synthetic study of Ma et al. (2018), section 3.3, with 100
inputs, 8 experts of 16 units, a gate without hidden layers and a tower of 8 units a
task; and those of the book's chapter on the shared bottom, with 5 inputs, a bottom of 12
units and linear towers. Each model has its own rows and its own start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import mtl_annotated as mtl
from benchmarks.store import Line
from benchmarks.suites import Command, compare, here, ratio
from mtl_annotated.tasks import joint_loss

COPIES, STEPS = 50, 40
AT_ONCE, IN_TURN = "ours", "one after another"
TASKS = (mtl.Task("first", "regression"), mtl.Task("second", "regression"))
LOSS = partial(joint_loss, tasks=TASKS)


@dataclass(frozen=True)
class Study:
    """A network, the inputs that it reads, and the rows of a batch."""

    model: str
    inputs: int
    batch: int
    trunk: Callable[[], nn.Module]
    tower_units: tuple[int, ...]

    def networks(self, copies: int, seed: int = 0) -> list[nn.Module]:
        """Copies of the network, each with a start of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found: list[nn.Module] = []
            for _ in range(copies):
                trunk = self.trunk()
                towers = mtl.Towers(trunk.width, TASKS, self.tower_units)
                found.append(nn.Sequential(trunk, towers))
        return found

    def samples(
        self, copies: int, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Inputs `[copies, rows, inputs]` and labels `[copies, rows, 2]`."""
        recipe = replace(mtl.sine_recipe("recovered"), inputs=self.inputs)
        drawn = [recipe.sample(rows, 0.9, seed=seed)[:2] for seed in range(copies)]
        x, y = (
            torch.stack([torch.as_tensor(each) for each in part]).to(dtype)
            for part in zip(*drawn, strict=True)
        )
        return x, y


STUDIES = (
    Study(
        "MMoE",
        100,
        64,
        partial(mtl.MMoELayer, 100, (16,), tasks=2, experts=8),
        (8,),
    ),
    Study(
        "SharedBottom", 5, 128, partial(mtl.SharedBottomLayer, 5, (12,), tasks=2), ()
    ),
)


def together(
    models: list[nn.Module], x: Tensor, y: Tensor, steps: int, batch: int
) -> mtl.Replicas:
    """Train all as one program."""
    replicas = mtl.Replicas(models)
    optimizer = torch.optim.Adam(replicas.parameters(), lr=1e-3, fused=True)
    loss = torch.func.vmap(LOSS)
    for step in range(steps):
        first = step * batch % x.shape[1]
        rows = slice(first, first + batch)
        optimizer.zero_grad()
        loss(replicas(x[:, rows]), y[:, rows]).sum().backward()
        optimizer.step()
    return replicas


def apart(
    models: list[nn.Module], x: Tensor, y: Tensor, steps: int, batch: int
) -> None:
    """Train one after another, each as somebody would who has only one."""
    for model, inputs, labels in zip(models, x, y, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for step in range(steps):
            first = step * batch % len(inputs)
            rows = slice(first, first + batch)
            optimizer.zero_grad()
            LOSS(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()


def check(study: Study, copies: int = 3, steps: int = 4) -> float:
    """The largest gap between the two ways' weights, in double precision.

    Raises: AssertionError where it is above 1e-10.
    """
    x, y = study.samples(copies, 2 * study.batch, torch.float64)
    alone = [model.double() for model in study.networks(copies)]
    stacked = [model.double() for model in study.networks(copies)]
    replicas = together(stacked, x, y, steps, study.batch)
    apart(alone, x, y, steps, study.batch)
    gaps = [
        float((one - other).detach().abs().max())
        for index, model in enumerate(alone)
        for one, other in zip(
            model.parameters(), replicas.replica(index).parameters(), strict=True
        )
    ]
    if not max(gaps) <= 1e-10:
        raise AssertionError(
            f"replicas: weights differ by {max(gaps)} from those alone"
        )
    return max(gaps)


def run(command: Command, copies: int = COPIES, steps: int = STEPS) -> None:
    """The suite `replicas`: two lines a study, rows a second over all copies."""
    for study in STUDIES:
        case = {"suite": "replicas", "model": study.model, "batch_size": study.batch}
        lines = {name: {**case, "library": name} for name in (AT_ONCE, IN_TURN)}
        if command.any_wanted(lines.values()):
            check(study)
            race(command, study, lines, copies, steps)


def race(
    command: Command, study: Study, lines: dict[str, Line], copies: int, steps: int
) -> None:
    """The two ways in turn, each with models of its own."""
    x, y = study.samples(copies, 4 * study.batch, torch.float32)
    rows = copies * steps * study.batch

    def work(way: Callable[..., object], models: list[nn.Module]) -> int:
        way(models, x, y, steps, study.batch)
        return rows

    turns = [
        here(name, partial(work, way, study.networks(copies)))
        for name, way in ((AT_ONCE, together), (IN_TURN, apart))
    ]
    for turn in turns:
        turn.warm_up()
    found = compare(command, lines, turns)
    rates = {name: line["rows_per_second"] for name, line in found.items()}
    for line in found.values():
        over = ratio(rates.get(AT_ONCE), line["rows_per_second"])
        command.put({**line, "ours_over_this": over, "copies": copies})
