"""ESMM: a conversion needs a click first

Chapter: book/esmm.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mtl_annotated.features import Batch, Encoder
from mtl_annotated.shared_bottom import SharedBottom
from mtl_annotated.tasks import Task, masked_mean, weighted_sum
from mtl_annotated.training import Ranker, task_positions


# Chapter 'ESMM', section 'Tiny probabilities: stay with logarithms'
def log_conversion(
    click: Float[Tensor, " batch"], conversion: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log(σ(a) σ(b)) of two logits: a click, and a conversion after it."""
    return F.logsigmoid(click) + F.logsigmoid(conversion)


# Chapter 'ESMM', section 'Tiny probabilities: stay with logarithms'
def log_no_conversion(
    click: Float[Tensor, " batch"], conversion: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log(1 - σ(a) σ(b)) of two logits: no click, or a click and no conversion.

    The error is a few roundings of a number of size max(1, |value|) at most, for
    all finite logits, and so is that of the gradient, which is never NaN.
    """
    clicked_only = F.logsigmoid(click) + F.logsigmoid(-conversion)
    return torch.logaddexp(F.logsigmoid(-click), clicked_only)


# Chapter 'ESMM', section 'Tiny probabilities: stay with logarithms'
def conversion_loss(
    click: Float[Tensor, " batch"],
    conversion: Float[Tensor, " batch"],
    labels: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """The cross-entropy of σ(a) σ(b) for labels 0 or 1, row by row, from logits.

    Source: Ma, Zhao, Huang, et al. (2018), equation 3, the second term.
    """
    yes, no = log_conversion(click, conversion), log_no_conversion(click, conversion)
    return -torch.where(labels == 1, yes, no)


# Chapter 'ESMM', section 'The class'
def funnel_task(encoder: Encoder, argument: str, name: str) -> Task:
    """The encoder's binary task of that name; refuses others with the valid names."""
    binary = {task.name: task for task in encoder.tasks if task.kind == "binary"}
    if name not in binary:
        kinds = {task.name: task.kind for task in encoder.tasks}
        found = f"{name!r}, a {kinds[name]} task" if name in kinds else f"{name!r}"
        valid = ", ".join(binary)
        raise ValueError(
            f"{argument}: expected the name of a binary task, found {found};"
            f" choose from {valid or 'none: the encoder has no binary task'}"
        )
    return binary[name]


# Chapter 'ESMM', section 'The class'
def derived_tasks(click: Task, conversion: Task) -> tuple[Task, Task, Task]:
    """CTR, CVR and CTCVR, with the weights of the tasks that they come from."""
    return (
        Task("ctr", weight=click.weight, weight_ratio=click.weight_ratio),
        Task("cvr", weight=0.0),
        Task("ctcvr", weight=conversion.weight, weight_ratio=conversion.weight_ratio),
    )


# Chapter 'ESMM', section 'The class'
class ESMM(Ranker):
    """Entire space multi-task model: CTR, and CVR learned through CTR · CVR.

    The logits are [batch, 2], of the click and of the conversion after a click.
    Tasks and outputs are "ctr" (all impressions), "cvr" (clicked ones, reported
    and never trained) and "ctcvr" (all impressions). Rows with a conversion and
    no click are refused: see `check`.

    Args:
        encoder: says which columns there are and which tasks.
        click, conversion: names of two binary tasks of the encoder. Their weights
            are those of ctr and ctcvr.
        ranker: what builds embedding, trunk and towers, such as `MMoE`. The
            default is the paper's: a `SharedBottom` whose `bottom_units` are ()
            unless given, so that the towers share the embedding alone.
        options: go to the ranker.

    Raises:
        ValueError: a task that is unknown, not binary, or named twice.
        TypeError: what is no encoder, or a `ranker` that builds no Ranker.

    Source: Ma, Zhao, Huang, et al. (2018), section 2.2 and equation 3.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        click: str = "click",
        conversion: str = "purchase",
        ranker: Callable[..., Any] = SharedBottom,
        **options,
    ) -> None:
        super().__init__(encoder)
        funnel = {"click": click, "conversion": conversion}
        self.funnel = tuple(funnel_task(encoder, *item) for item in funnel.items())
        if click == conversion:
            raise ValueError(f"conversion: expected another task than click={click!r}")
        if ranker is SharedBottom:
            options = {"bottom_units": ()} | options
        built = ranker(encoder, tasks=[click, conversion], **options)
        if not isinstance(built, Ranker):
            kind = type(built).__name__
            raise TypeError(f"ranker: expected one that builds a Ranker, found {kind}")
        self.embedding, self.trunk = built.embedding, built.trunk
        self.towers = built.towers
        self.label_index = task_positions(encoder.tasks, [click, conversion])
        self.tasks = derived_tasks(*self.funnel)
        self.outputs = tuple(task.name for task in self.tasks)

    def labels(self, batch: Batch) -> Float[Tensor, "batch 3"]:
        """Labels of ctr, cvr and ctcvr; NaN where missing.

        Without a click there is no cvr, and ctcvr is 0. Where the click is missing,
        so are all three.
        """
        click, conversion = (batch.labels[:, index] for index in self.label_index)
        clicked = click == 1
        cvr = conversion.where(clicked, torch.nan)
        ctcvr = conversion.where(clicked, click)
        return torch.stack([click, cvr, ctcvr], dim=1)

    def losses(
        self, batch: Batch, logits: Float[Tensor, "batch 2"] | None = None
    ) -> Float[Tensor, " 3"]:
        """Mean losses of ctr, cvr and ctcvr over the rows with their label, 0 if none.

        Computed in 32 bits at least. Source: Ma, Zhao, Huang, et al. (2018),
        equation 3, as means; the second entry is no part of it.
        """
        logits = self(batch) if logits is None else logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = self.labels(batch)
        valid = ~labels.isnan()
        click, cvr, ctcvr = labels.where(valid, 0).to(logits.dtype).unbind(1)
        a, b = logits.unbind(1)
        rows = [
            F.binary_cross_entropy_with_logits(a, click, reduction="none"),
            F.binary_cross_entropy_with_logits(b, cvr, reduction="none"),
            conversion_loss(a, b, ctcvr),
        ]
        return masked_mean(torch.stack(rows, dim=1), valid, batch.weights)

    def joint(self, losses: Float[Tensor, " 3"], epoch: int = 0) -> Float[Tensor, ""]:
        """The losses of ctr and ctcvr, weighted and added; cvr's does not enter."""
        ctr, _, ctcvr = losses.unbind()
        trained = self.tasks[0], self.tasks[2]
        return weighted_sum(torch.stack([ctr, ctcvr]), trained, epoch)

    def predictions(
        self, batch: Batch, logits: Float[Tensor, "batch 2"] | None = None
    ) -> Float[Tensor, "batch 3"]:
        """The probabilities CTR, CVR and CTCVR of each row; CTCVR = CTR · CVR."""
        logits = self(batch) if logits is None else logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ctr, cvr = logits.sigmoid().unbind(1)
        return torch.stack([ctr, cvr, ctr * cvr], dim=1)

    def check(self, batch: Batch) -> None:
        """Refuse rows with a conversion and no click; rows of weight 0 do not count.

        Raises: ValueError with their number and share, and the two columns' names.
        """
        click, conversion = (batch.labels[:, index] for index in self.label_index)
        converted = conversion == 1
        if batch.weights is not None:
            converted = converted & (batch.weights > 0)
        without, total = int((converted & (click == 0)).sum()), int(converted.sum())
        if without:
            y, z = (repr(task.column) for task in self.funnel)
            raise ValueError(
                f"{without} rows have {z} = 1 and {y} = 0: {without / len(batch):.1%} of"
                f" {len(batch)} rows, {without / total:.1%} of {total} conversions. ESMM"
                " predicts a conversion as a click and then a conversion, and cannot"
                " represent these rows. Correct the labels, leave the rows out, or name"
                " two tasks of which the second needs the first (click=, conversion=)"
            )
