"""Choices of the package and of its user, each beside what it was chosen from.

`rows of the tables`: the embeddings of a batch and the gradient of their table, read by
`index_select` or by `F.embedding`. `rows at once, training` and `rows at once, scoring`:
how many rows of a batch go through the trunk together. `one table`: lookup, backward pass
and Adam step of a table alone, the whole of it or the touched rows, by its size; eight
ids a row, drawn evenly. `one product`: the output of a linear layer, or of eight side by
side, and its two gradients, multiplied by the library that PyTorch was built with
("highest") or by oneDNN ("medium"), and how far these are from double precision.
`memory`: the plain loop where the C library gives freed memory back and where it keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import mtl_annotated as mtl
from benchmarks.networks import SIZES, build
from benchmarks.peers import KEPT, SWITCHED
from benchmarks.store import Line
from benchmarks.suites import Cell, Command, cell_wanted, compare, here, race
from mtl_annotated import training
from mtl_annotated.features import read_rows

LOOKUPS = {
    "index_select": lambda table, rows: table.index_select(0, rows),
    "F.embedding": lambda table, rows: F.embedding(rows, table),
}
AT_ONCE = (256, 512, 1024, 2048, 4096, 8192)
# So many that an epoch is long enough, and a batch far larger than any cache.
MANY_EXPERTS = 64
# An epoch of Adult has four batches of the largest size: too few beside fit's set-up.
EPOCHS = 5
VOCABULARIES = (3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000)
PRECISIONS = ("highest", "medium")
# Layers side by side, inputs and units; the layers of a stack lie row by row, as they
# come out of the layer below, or one after the other.
PRODUCTS = {
    "133 to 128": (1, 133, 128),
    "128 to 64": (1, 128, 64),
    "8 of 128 to 64, by row": (8, 128, 64),
    "8 of 128 to 64, by layer": (8, 128, 64),
}
PRODUCTS_A_PASS = 100
# A dense step of a table larger than this takes longer than anybody waits.
LARGEST_DENSE, WIDTH, READS = 1_000_000, 16, 8


def looked_up(
    read: Callable[[Tensor, Tensor], Tensor],
    table: Tensor,
    batches: list[Tensor],
    gradients: list[Tensor],
) -> int:
    """Forward and backward of a lookup, batch after batch; the rows done."""
    for rows, gradient in zip(batches, gradients, strict=True):
        table.grad = None
        read(table, rows).backward(gradient)
    return sum(map(len, batches))


def check(table: Tensor, rows: Tensor) -> None:
    """Both lookups read the same rows and add up the same gradient.

    Raises: AssertionError.
    """
    found = []
    for read in LOOKUPS.values():
        table.grad = None
        made = read(table, rows)
        made.sin().sum().backward()
        found.append((made.detach(), table.grad))
    torch.testing.assert_close(found[0], found[1])


def in_pieces(work: Callable[[], object], size: int, rows: int) -> int:
    """Do the work with at most `size` rows at once; how many `rows` that were."""
    usual, training.ROWS_AT_ONCE = training.ROWS_AT_ONCE, (size, size)
    try:
        work()
    finally:
        training.ROWS_AT_ONCE = usual
    return rows


def tables_of_a_batch(command: Command, batch_size: int) -> None:
    """A line a lookup. The ids are those of the rows, eight a row."""
    rows = command.rows[False]
    (table,) = build("MMoE", rows.encoder).embedding.weights.values()
    weight = table.detach()
    sizes = [table.rows for table in rows.encoder.tables.values()]
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    ids = [part.flatten() for part in (rows.train.ids + starts).split(batch_size)]
    gradients = [torch.randn(len(part), weight.shape[1]) for part in ids]
    check(weight.double().requires_grad_(), ids[0])
    ways = {
        name: partial(looked_up, read, weight.clone().requires_grad_(), ids, gradients)
        for name, read in LOOKUPS.items()
    }
    case = {"suite": "details", "case": "rows of the tables", "batch_size": batch_size}
    compete(command, case, ways)


def rows_at_once(
    command: Command, name: str, epochs: int = EPOCHS, **sizes: int
) -> None:
    """A line a number of rows, in batches of the largest; each has its own model.

    `sizes` are instead of the usual ones, and stand in the line.
    """
    chosen, batch_size = command.rows[name == "ESMM"], AT_ONCE[-1]
    rows, quiet = chosen.train, {"train_metrics": False, "progress": False}
    work: dict[str, tuple[int, Callable[..., object]]] = {
        "training": (epochs, partial(mtl.fit, epochs=epochs, **quiet)),
        "scoring": (1, mtl.predict),
    }
    for what, (passes, doing) in work.items():
        case = {"suite": "details", "case": f"rows at once, {what}", "model": name}
        case |= sizes
        ways = {}
        for size in AT_ONCE:
            model = build(name, chosen.encoder, {**SIZES[name], **sizes})
            one = partial(doing, model, rows, batch_size=batch_size)
            ways[str(size)] = partial(in_pieces, one, size, passes * len(rows))
        compete(command, case | {"batch_size": batch_size}, ways)


def stepped(
    table: Tensor, optimizer: torch.optim.Optimizer, batches: list[Tensor], sparse: bool
) -> int:
    """Lookup, backward pass and update, batch after batch; the rows done."""
    for ids in batches:
        table.grad = None
        read_rows(table, ids, sparse=sparse).sin().sum().backward()
        optimizer.step()
    return sum(map(len, batches))


def update(weight: Tensor, batches: list[Tensor], sparse: bool) -> Callable[[], int]:
    """A table of its own and its Adam, as a way to run."""
    table = torch.nn.Parameter(weight.clone())
    adam = mtl.RowAdam if sparse else torch.optim.Adam
    optimizer = adam([table], lr=1e-3, fused=True)
    return partial(stepped, table, optimizer, batches, sparse)


def check_updates() -> None:
    """Where each batch reads all rows, both ways end in the same table.

    Raises: AssertionError.
    """
    weight, batches = torch.randn(5, 3).double(), [torch.arange(5).view(1, 5)] * 3
    ways = [update(weight, batches, sparse) for sparse in (False, True)]
    for way in ways:
        way()
    torch.testing.assert_close(*(way.args[0] for way in ways))


def one_table(command: Command, batch_size: int, vocabulary: int) -> None:
    """A line for the whole table, if that can be borne, and one for its rows."""
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (10, batch_size, READS))
    weight, batches = torch.randn(vocabulary, WIDTH), list(ids)
    ways = {"by row": update(weight, batches, True)}
    if vocabulary <= LARGEST_DENSE:
        ways["dense"] = update(weight, batches, False)
    case = {"suite": "details", "case": "one table", "batch_size": batch_size}
    compete(command, case | {"vocabulary": vocabulary}, ways)


def multiplied(
    precision: str, x: Tensor, weight: Tensor, gradient: Tensor, times: int = 1
) -> Tensor:
    """The output and both gradients, so many times over; the weight's gradient."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for _ in range(times):
            x.grad = weight.grad = None
            torch.matmul(x, weight).backward(gradient)
    finally:
        torch.set_float32_matmul_precision(usual)
    assert weight.grad is not None
    return weight.grad


def product_pass(precision: str, x: Tensor, weight: Tensor, gradient: Tensor) -> int:
    """Some products; the rows done."""
    multiplied(precision, x, weight, gradient, PRODUCTS_A_PASS)
    return PRODUCTS_A_PASS * x.shape[-2]


def one_product(command: Command, batch_size: int, size: str) -> None:
    """A line a library; `largest_error` is over the largest gradient of the weight."""
    copies, inputs, units = PRODUCTS[size]
    torch.manual_seed(0)
    shapes = ((batch_size, copies, inputs), (batch_size, copies, units))
    x, gradient = (torch.randn(shape).transpose(0, 1) for shape in shapes)
    weight = torch.randn(copies, inputs, units)
    if copies == 1:
        x, weight, gradient = x[0], weight[0], gradient[0]
    elif size.endswith("by layer"):
        x, gradient = x.contiguous(), gradient.contiguous()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    exact = x.detach().double().mT @ gradient.double()
    more: dict[str, Line] = {}
    ways: dict[str, Callable[[], int]] = {}
    for precision in PRECISIONS:
        error = (multiplied(precision, x, weight, gradient) - exact).abs().max()
        more[precision] = {"largest_error": f"{error / exact.abs().max():.0e}"}
        ways[precision] = partial(product_pass, precision, x, weight, gradient)
    case = {"suite": "details", "case": "one product", "batch_size": batch_size}
    compete(command, case | {"size": size}, ways, more)


def memory(command: Command) -> None:
    """The plain loop in two processes, of which one keeps the memory that it frees."""
    ways = {"given back": {}, "kept": KEPT}
    both = [
        replace(SWITCHED, name=name, environments=((variables,),), suites=None)
        for name, variables in ways.items()
    ]
    two = replace(command, competitors=both)
    for name in command.models:
        arrays = two.arrays[name == "ESMM"]
        for batch_size in command.batch_sizes:
            case = {"case": "memory"}
            cell = Cell("details", name, batch_size, SIZES[name], arrays, case)
            if cell_wanted(two, cell):
                race(two, cell)
    command.inconclusive, command.failures = two.inconclusive, two.failures


def compete(
    command: Command,
    case: Line,
    ways: dict[str, Callable[[], int]],
    more: dict[str, Line] | None = None,
) -> None:
    """Let the variants take turns, and put their lines; `more` is added to a line."""
    lines = {name: {**case, "variant": name} for name in ways}
    if not command.any_wanted(lines.values()):
        return
    turns = [here(name, work) for name, work in ways.items()]
    for turn in turns:
        turn.warm_up()
    for name, line in compare(command, lines, turns).items():
        command.put(line | (more or {}).get(name, {}))


def run(command: Command) -> None:
    """The suite `details`."""
    for batch_size in command.batch_sizes:
        tables_of_a_batch(command, batch_size)
    for name in command.models:
        rows_at_once(command, name)
    if "MMoE" in command.models:
        rows_at_once(command, "MMoE", epochs=1, experts=MANY_EXPERTS)
    check_updates()
    for batch_size in command.batch_sizes:
        for vocabulary in VOCABULARIES:
            one_table(command, batch_size, vocabulary)
        for size in PRODUCTS:
            one_product(command, batch_size, size)
    memory(command)
