"""Big tables: pay for the rows you touch

Chapter: book/big_tables.md
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_annotated.features import FeatureEmbedding


# Chapter 'Big tables', section 'The code'
def sum_rows(
    gradient: Tensor,
) -> tuple[Int[Tensor, " touched"], Float[Tensor, "touched width"]]:
    """The rows of a sparse gradient, ascending and each once, and their sums.

    Raises: ValueError for a gradient that is sparse in more than its rows.
    """
    if gradient.sparse_dim() != 1:
        raise ValueError(
            "gradient: expected one that is sparse in its rows alone, found"
            f" {gradient.sparse_dim()} sparse dimensions"
        )
    (ids,), values = gradient._indices(), gradient._values()
    if gradient.is_coalesced():
        return ids, values
    rows, place = ids.unique(return_inverse=True)
    sums = values.new_zeros(len(rows), values.shape[1])
    return rows, sums.index_add_(0, place, values)


# Chapter 'Big tables', section 'The code'
def take_state(
    state: dict[str, Any], table: Tensor, rows: Int[Tensor, " touched"]
) -> dict[str, Any]:
    """A table's state, of these rows alone."""
    return {
        name: value.index_select(0, rows) if value.shape == table.shape else value
        for name, value in state.items()
    }


# Chapter 'Big tables', section 'The code'
def put_state(
    state: dict[str, Any],
    table: Tensor,
    rows: Int[Tensor, " touched"],
    part: dict[str, Any],
) -> None:
    """Write the state of these rows back; what is new starts at zero elsewhere."""
    for name, value in part.items():
        if value.shape == (len(rows), *table.shape[1:]):
            if name not in state:
                state[name] = torch.zeros_like(table)
            state[name].index_copy_(0, rows, value)
        else:
            state[name] = value


# Chapter 'Big tables', section 'The code'
class Part(NamedTuple):
    """The touched rows of a table, and a small parameter that stands in for it."""

    rows: Tensor
    stand_in: nn.Parameter


# Chapter 'Big tables', section 'The code'
class ByRow(Optimizer):
    """Mixed into an optimizer of torch's: of a table it updates the touched rows.

    A parameter with a sparse gradient `[rows, width]`, as `F.embedding` gives with
    `sparse=True`, is updated as if its touched rows were all there is of it. The
    other rows keep their weights and their state, which has the names and shapes of
    torch's. Decay reaches touched rows only. The step count is the table's, so the
    correction of Adam's bias reckons with all steps. Other parameters are
    updated as torch does it. A hook on the step may run twice, once with the touched
    rows in place of the tables.

    Raises: ValueError at the first step with `capturable` or `differentiable`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters, or rows of them, that have a gradient."""
        loss = loss_of(closure)
        groups = [(group, group["params"]) for group in self.param_groups]
        parts = self.take_parts()
        try:
            for table, (rows, stand_in) in parts.items():
                self.state[stand_in] = take_state(self.state[table], table, rows)
            for group, whole in groups:
                group["params"] = [
                    parts[p].stand_in if p in parts else p for p in whole
                ]
            super().step()
            self.put_parts(parts)
        finally:
            for group, whole in groups:
                group["params"] = whole
            for part in parts.values():
                self.state.pop(part.stand_in, None)
        return loss

    def take_parts(self) -> dict[Tensor, Part]:
        """For each table with a sparse gradient a copy of the rows that it touches."""
        parts = {}
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None and table.grad.is_sparse:
                    refuse(self, group, ("capturable", "differentiable"))
                    rows, gradient = sum_rows(table.grad)
                    part = nn.Parameter(table.index_select(0, rows))
                    part.grad = gradient
                    parts[table] = Part(rows, part)
        return parts

    def put_parts(self, parts: dict[Tensor, Part]) -> None:
        """Write updated rows and their state back to where they came from."""
        for table, (rows, part) in parts.items():
            table.index_copy_(0, rows, part)
            put_state(self.state[table], table, rows, self.state[part])


# Chapter 'Big tables', section 'The code'
def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The result of a closure, which may want gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# Chapter 'Big tables', section 'The code'
def refuse(optimizer: Optimizer, group: dict[str, Any], options: Iterable[str]) -> None:
    """Refuse what an update by rows cannot do."""
    for name in options:
        if group.get(name):
            raise ValueError(
                f"{type(optimizer).__name__} updates tables by row, expected"
                f" {name}=False, found {group[name]!r}"
            )


# Chapter 'Big tables', section 'The code'
class RowSGD(ByRow, torch.optim.SGD):
    """`torch.optim.SGD`, by row as `ByRow` says; momentum and decay wait for a touch."""


# Chapter 'Big tables', section 'The code'
class RowAdam(ByRow, torch.optim.Adam):
    """`torch.optim.Adam`, which of a table with a sparse gradient moves touched rows.

    It is not dense Adam: that moves a row on after its last gradient, by momentum,
    and lets its moments fade. Here both wait until the row is touched again.
    """


# Chapter 'Big tables', section 'The code'
class RowAdamW(ByRow, torch.optim.AdamW):
    """`torch.optim.AdamW`, by row as `RowAdam`; decay too waits for a touch."""


# Chapter 'Big tables', section 'The code'
def listed(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as groups that can be read more than once."""
    each = list(params)
    groups = each if each and isinstance(each[0], dict) else [{"params": each}]
    return [group | {"params": list(group["params"])} for group in groups]


# Chapter 'Big tables', section 'The code'
def split(
    groups: list[dict[str, Any]], tables: Collection[Tensor], *, tabled: bool
) -> list[dict[str, Any]]:
    """Groups as they are given, of the tables alone or of all but the tables."""
    known = {id(table) for table in tables}
    return [
        group
        | {"params": [p for p in group["params"] if (id(p) in known) == tabled]}
        | {"by_row": tabled}
        for group in groups
    ]


# Chapter 'Big tables', section 'The code'
class RowAdagrad(torch.optim.Adagrad):
    """`torch.optim.Adagrad`, with one sum for each row of the `tables`.

    The sum is that of the mean squared gradient over the row. `tables` are those of
    `params` that are to be treated so, and they must get sparse gradients. Decay
    is an L2 penalty that reaches touched rows only. Other parameters are
    updated as torch does it.

    Raises: ValueError for a table that is not among `params` or has a dense gradient,
    and at the first step with `maximize` or `differentiable`.

    Source: Duchi et al. (2011); one sum a row as in FBGEMM's exact row-wise Adagrad,
    which trains the models of Mudigere et al. (2022).
    """

    def __init__(
        self, params: Iterable[Any], *, tables: Iterable[Tensor], **options: Any
    ) -> None:
        groups, tables = listed(params), list(tables)
        given = {id(each) for group in groups for each in group["params"]}
        if not given.issuperset(map(id, tables)):
            raise ValueError("RowAdagrad: expected tables that are among the params")
        super().__init__(split(groups, tables, tabled=False), **options)
        # What a group that is added later has, such as a layer that thaws.
        self.defaults["by_row"] = False
        for group in split(groups, tables, tabled=True):
            if group["params"]:
                self.add_param_group(group)
        for group, table in self.tables():
            start = group["initial_accumulator_value"]
            total = table.new_full((len(table), 1), start)
            self.state[table] = {"step": torch.tensor(0.0), "sum": total}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters, or rows of them, that have a gradient."""
        loss, groups = loss_of(closure), self.param_groups
        for group, table in self.tables():
            if table.grad is not None:
                self.update(table, group)
        try:
            self.param_groups = [group for group in groups if not group["by_row"]]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def tables(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The tables, each with its group."""
        groups = [group for group in self.param_groups if group["by_row"]]
        return [(group, table) for group in groups for table in group["params"]]

    def update(self, table: Tensor, group: dict[str, Any]) -> None:
        """Move the touched rows of one table."""
        refuse(self, group, ("maximize", "differentiable"))
        if table.grad is None or not table.grad.is_sparse:
            raise ValueError(
                f"RowAdagrad: a table of shape {list(table.shape)} has a dense gradient,"
                " expected a sparse one; see by_row"
            )
        rows, gradient = sum_rows(table.grad)
        state, part = self.state[table], table.index_select(0, rows)
        gradient = gradient.add(part, alpha=group["weight_decay"])
        total = state["sum"].index_select(0, rows)
        total += gradient.square().mean(1, keepdim=True)
        rate = group["lr"] / (1 + state["step"].item() * group["lr_decay"])
        part.addcdiv_(gradient, total.sqrt() + group["eps"], value=-rate)
        table.index_copy_(0, rows, part)
        state["sum"].index_copy_(0, rows, total)
        state["step"] += 1


ROW_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": RowAdam,
    "adamw": RowAdamW,
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
}


# Chapter 'Big tables', section 'The code'
def row_optimizer(
    name: str, groups: list[dict[str, Any]], tables: Collection[Tensor], **options: Any
) -> Optimizer:
    """An optimizer by its name in `ROW_OPTIMIZERS` that updates `tables` by row."""
    if name == "adagrad":
        options["tables"] = tables
    return ROW_OPTIMIZERS[name](groups, **options)


# Rows of a packed table above which its touched rows alone are updated.
BIG_TABLE = 100_000


# Chapter 'Big tables', section 'The code'
def big_widths(embedding: FeatureEmbedding, rows: int | None) -> frozenset[int]:
    """The widths whose packed table learns and has more than `rows` rows.

    With `rows=None` there are none.
    """
    return frozenset(
        int(width)
        for width, weight in embedding.weights.items()
        if rows is not None and len(weight) > rows and weight.requires_grad
    )


# Chapter 'Big tables', section 'The code'
@contextmanager
def by_row(embedding: FeatureEmbedding, widths: Iterable[int]) -> Iterator[None]:
    """Within it, the tables of these widths get sparse gradients.

    Raises: ValueError for a width that the embedding does not have.
    """
    before, wanted = embedding.by_row, frozenset(widths)
    if unknown := wanted - set(embedding.counts):
        raise ValueError(
            f"by_row: found widths {sorted(unknown)}, expected some of"
            f" {sorted(embedding.counts)}"
        )
    embedding.by_row = wanted
    try:
        yield
    finally:
        embedding.by_row = before


# Chapter 'Big tables', section 'The code'
def clip_norm_(parameters: Iterable[Tensor], norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `norm`.

    `nn.utils.clip_grad_norm_` for gradients of which some are sparse. Those are
    summed up row by row first, and stay so. Returns the norm before.
    """
    clipped = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            rows, sums = sum_rows(parameter.grad)
            parameter.grad = torch.sparse_coo_tensor(
                rows[None],
                sums,
                parameter.shape,
                is_coalesced=True,
                check_invariants=False,
            )
            parameter = torch.empty_like(sums)
            parameter.grad = sums
        clipped.append(parameter)
    return nn.utils.clip_grad_norm_(clipped, norm)
