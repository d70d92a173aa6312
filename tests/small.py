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
