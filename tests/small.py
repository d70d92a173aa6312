"""Few rows of every kind of label, and the slope of a loss by finite differences."""

import numpy as np
import pandas as pd
import pytest
import torch

from mtl_annotated.features import Dense, Encoder, Sparse
from mtl_annotated.tasks import Task

BINARY = [Task("click"), Task("purchase")]


def rows(count, seed=0):
    """A table of `count` rows: two inputs, and a label of each kind."""
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "item": generator.integers(0, 13, count),
            "price": generator.normal(size=count),
            "click": generator.integers(0, 2, count),
            "purchase": generator.integers(0, 2, count),
            "stars": generator.integers(0, 3, count),
            "seconds": generator.normal(size=count),
        }
    )


def encoded(tasks, count=5):
    """An encoder of these tasks, and other rows encoded in double precision."""
    columns = [Sparse("item", width=3), Dense("price")]
    encoder = Encoder(columns, tasks).fit(rows(101))
    return encoder, encoder.transform(rows(count, seed=1)).to(dtype=torch.float64)


def by_task(model, tensors=None):
    """Tensors by name, by default those of the state, with the towers task by task.

    What is stacked for all towers of one shape becomes `towers.<task>.hidden.<layer>`
    and, from the stack's last layer, `towers.<task>.output`.
    """
    if tensors is None:
        state = model.state_dict().items()
        tensors = {n: value for n, value in state if isinstance(value, torch.Tensor)}
    tasks = getattr(model, "funnel", model.tasks)
    found = {}
    for name, value in tensors.items():
        if not name.startswith("towers."):
            found[name] = value
            continue
        _, shape, layer, kind = name.split(".")
        members = model.towers.members[shape]
        last = int(layer) == len(model.towers[shape]) - 1
        place = "output" if last else f"hidden.{layer}"
        # Norms keep their copies in one row, linear layers on an axis of their own.
        copies = value.chunk(len(members)) if value.ndim == 1 else value
        if value.ndim == 0:
            copies = [value] * len(members)
        for member, copy in zip(members, copies, strict=True):
            found[f"towers.{tasks[member].name}.{place}.{kind}"] = copy
    return found


def slopes_by_task(model):
    """The gradients that there are, by name, with the towers task by task."""
    parameters = model.named_parameters()
    return by_task(model, {n: p.grad for n, p in parameters if p.grad is not None})


def assert_slopes(model, batch):
    """The gradient of the loss must be its finite differences, in some places."""
    model.loss(batch).backward()
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 5)):
            old, step = flat[i].item(), 1e-6
            flat[i] = old + step
            above = model.loss(batch).item()
            flat[i] = old - step
            below = model.loss(batch).item()
            flat[i] = old
            slope = (above - below) / (2 * step)
            found = parameter.grad.view(-1)[i].item()
            assert found == pytest.approx(slope, abs=1e-8), name
