"""Training: a loop you can believe

Chapter: book/training.md
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import ceil, inf, isfinite, isnan, nan, prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import UndefinedMetricWarning
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from mtl_annotated.big_tables import (
    BIG_TABLE,
    big_widths,
    by_row,
    clip_norm_,
    row_optimizer,
)
from mtl_annotated.features import Batch, Encoder, FeatureEmbedding, naming
from mtl_annotated.tasks import (
    METRICS,
    Task,
    check_metrics,
    measure,
    predictions,
    task_losses,
    weighted_sum,
)


# Chapter 'Training', section 'The smallest model'
def task_positions(
    tasks: Sequence[Task], names: Iterable[str] | None
) -> tuple[int, ...]:
    """Where the named tasks stand among `tasks`, in the order of the names."""
    found = [task.name for task in tasks]
    if names is None:
        return tuple(range(len(found)))
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in found]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"tasks: expected different names out of {', '.join(found)}; found {names}"
        )
    return tuple(found.index(name) for name in names)


# Chapter 'Training', section 'The smallest model'
def check_encoder(encoder: object) -> None:
    """Refuse what is no encoder."""
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: expected an Encoder, found {type(encoder).__name__}")


# Chapter 'Training', section 'The smallest model'
class Ranker(nn.Module):
    """A model of an encoder's tasks: embedding, then trunk, then towers.

    A subclass sets `trunk` and `towers` in its `__init__`. One that reads its
    logits in another way overrides `losses` and `predictions`; one that adds up
    the tasks in another way overrides `joint`; one that cannot represent all
    labels overrides `check`. One whose trunk or towers must see a batch as a whole
    sets `whole_batches`; batch normalization needs no word. `tasks` chooses tasks
    by name. `embedding` is used in place of a new one.

    Raises: TypeError for what is no encoder; ValueError where a name is not a
    task of the encoder.
    """

    trunk: nn.Module
    towers: nn.Module
    whole_batches = False

    def __init__(
        self,
        encoder: Encoder,
        *,
        tasks: Iterable[str] | None = None,
        embedding: FeatureEmbedding | None = None,
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        self.label_index = task_positions(encoder.tasks, tasks)
        self.tasks = tuple(encoder.tasks[index] for index in self.label_index)
        self.outputs = tuple(name for task in self.tasks for name in task.outputs)
        self.embedding = embedding or FeatureEmbedding(encoder)

    def forward(self, batch: Batch) -> Float[Tensor, "batch outputs"]:
        """The logits of every task, in the order of `outputs`."""
        features = self.embedding(batch)
        logits = [self.towers(self.trunk(rows)) for rows in self.split_rows(features)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def split_rows(
        self, features: Float[Tensor, "batch width"]
    ) -> Sequence[Float[Tensor, "_ width"]]:
        """The rows, on a CPU as many at once as it caches, where that changes nothing."""
        # Asked first: a traced program must not learn how many rows there are.
        if torch.compiler.is_compiling() or features.device.type != "cpu":
            return [features]
        least, most = ROWS_AT_ONCE
        if len(features) <= least or torch.is_autocast_enabled("cpu"):
            return [features]
        if self.whole_batches or any(map(normalizes_rows, self.modules())):
            return [features]
        fitting = CACHED_NUMBERS // widest_layer(self.trunk, self.towers)
        return features.chunk(-(-len(features) // min(max(fitting, least), most)))

    def labels(self, batch: Batch) -> Float[Tensor, "batch tasks"]:
        """The label columns of the model's own tasks."""
        if self.label_index == tuple(range(batch.labels.shape[1])):
            return batch.labels
        return torch.stack([batch.labels[:, index] for index in self.label_index], 1)

    def losses(
        self, batch: Batch, logits: Float[Tensor, "batch outputs"] | None = None
    ) -> Float[Tensor, " tasks"]:
        """Each task's mean loss over its valid labels; `logits` saves a forward."""
        logits = self(batch) if logits is None else logits
        labels = self.labels(batch)
        # A subclass's own labels may have gaps where the batch has none.
        complete = batch.clean and type(self).labels is Ranker.labels
        return task_losses(logits, labels, self.tasks, batch.weights, complete=complete)

    def joint(
        self, losses: Float[Tensor, " tasks"], epoch: int = 0
    ) -> Float[Tensor, ""]:
        """The number that training lowers: the losses, weighted and added.

        `epoch` counts the finished epochs, which a task's `weight_ratio` reads.
        """
        return weighted_sum(losses, self.tasks, epoch)

    @final
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """`joint(losses(batch))`; override one of those two, not this."""
        return self.joint(self.losses(batch))

    def check(self, batch: Batch) -> None:
        """Refuse rows whose labels this model cannot represent; here, none.

        `fit` and `evaluate` call it for each set of rows and put the set's name in
        front of the message. Raises: a subclass raises ValueError, and says which labels.
        """

    def predictions(
        self, batch: Batch, logits: Float[Tensor, "batch outputs"] | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Probabilities and values, a column for each name in `outputs`.

        `logits` may be float64 on the CPU whatever the batch is: `predict` and
        `fit` ask so, in order that a large logit does not become a plain 0 or 1.
        """
        return predictions(self(batch) if logits is None else logits, self.tasks)

    def get_extra_state(self) -> str:
        """The layout of the weights, to be stored with them."""
        return layouts(self)

    def set_extra_state(self, state: str) -> None:
        """Refuse weights that lie in another order."""
        if state != layouts(self):
            raise ValueError(
                f"these weights are of a model laid out as {state!r}; this model is"
                f" laid out as {layouts(self)!r}"
            )


# `python -m benchmarks details` measures them.
ROWS_AT_ONCE = (512, 4096)
CACHED_NUMBERS = 2**21


# Chapter 'Training', section 'The smallest model'
def widest_layer(*parts: nn.Module) -> int:
    """The most numbers that one matrix of these parts makes of a row."""
    parameters = (each for part in parts for each in part.parameters())
    matrices = (each for each in parameters if not is_lazy(each) and each.ndim > 1)
    return max((prod(matrix.shape[:-1]) for matrix in matrices), default=1)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# Chapter 'Training', section 'The smallest model'
def normalizes_rows(part: nn.Module) -> bool:
    """Whether a layer normalizes by the rows that it is given."""
    norm = isinstance(part, BATCH_NORMS)
    return norm and (part.training or part.running_mean is None)


# Chapter 'Training', section 'The smallest model'
def layouts(model: Ranker) -> str:
    """The order of the tasks, and the layout of each part that has one."""
    parts = [
        f"{name or 'model'}: {part.layout}"
        for name, part in model.named_modules()
        if hasattr(part, "layout")
    ]
    order = "tasks: " + ", ".join(task.name for task in model.tasks)
    return "; ".join([order, *parts])


BLOCK = 64


# Chapter 'Training', section 'Batches are slices'
def slices(rows: Batch, size: int) -> Iterator[Batch]:
    """The rows in their own order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# Chapter 'Training', section 'Batches are slices'
def batches(
    rows: Batch, order: Int[Tensor, " rows"], batch_size: int
) -> Iterator[Batch]:
    """The rows in the given order, in batches; the last one may be smaller."""
    for chosen in order.split(BLOCK * batch_size):
        yield from slices(rows[chosen], batch_size)


# Chapter 'Training', section 'The same numbers twice'
def epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Two seeds of an epoch: for its shuffle, and for its noise (dropout)."""
    shuffle, noise = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
    return int(shuffle), int(noise)


# Chapter 'Training', section 'The same numbers twice'
def shuffled_order(rows: int, seed: int) -> Int[Tensor, " rows"]:
    """A permutation of the row numbers, the same on every device."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


# Chapter 'Training', section 'The same numbers twice'
@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's own randomness in the block, and give it back after it."""
    used = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=used, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        for each in used:
            state = torch.Generator(device=each).manual_seed(seed).get_state()
            torch.get_device_module(each).set_rng_state(state, each)
        yield


# Chapter 'Training', section 'Looking must not touch'
@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Give every submodule, after the block, the train or eval mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Chapter 'Training', section 'Looking must not touch'
@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients in the block; modes are restored after it."""
    with restored_modes(model), torch.no_grad():
        model.eval()
        yield


# Chapter 'Training', section 'Looking must not touch'
def frozen_parts(model: nn.Module) -> list[nn.Module]:
    """Submodules in eval mode in a model in train mode: frozen on purpose."""
    return [part for part in model.modules() if model.training and not part.training]


# Chapter 'Training', section 'Looking must not touch'
def train_mode(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Train mode for the whole model, except for what its owner froze."""
    model.train()
    for part in frozen:
        part.training = False


# Chapter 'Training', section 'Predict and evaluate'
def check_number(
    name: str, value: Any, *, whole: bool = False, zero: bool = False
) -> None:
    """Refuse what is no finite number above zero, or from zero on if asked."""
    fits = isinstance(value, Integral if whole else Real)
    fits = fits and not isinstance(value, bool) and isfinite(value)
    if not (fits and (value > 0 or (zero and value == 0))):
        kind = "a whole number" if whole else "a number"
        least = "of at least 0" if zero else "above 0"
        raise ValueError(f"{name}: expected {kind} {least}, found {value!r}")


# Chapter 'Training', section 'Predict and evaluate'
def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not among the choices."""
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: unknown {value!r}, choose from {listed}")


# Chapter 'Training', section 'Predict and evaluate'
def check_ranker(model: Any) -> None:
    """Refuse what has no losses and outputs of its own."""
    if not isinstance(model, Ranker):
        raise TypeError(
            f"model: expected a Ranker, found {type(model).__name__}; to"
            " compile a model in place, call model.compile()"
        )


# Chapter 'Training', section 'Predict and evaluate'
def check_batch(name: str, rows: Any) -> None:
    """Refuse rows that are not encoded, and a batch without rows."""
    if not isinstance(rows, Batch):
        raise TypeError(
            f"{name}: expected a Batch, which encoder.transform(table) gives;"
            f" found {type(rows).__name__}"
        )
    if not len(rows):
        raise ValueError(f"{name}: expected at least one row, found none")


# Chapter 'Training', section 'Predict and evaluate'
def check_rows(model: Ranker, rows: Mapping[str, Batch]) -> None:
    """Ask the model to `check` each set of rows; its name goes into the error."""
    for name, each in rows.items():
        with naming(name):
            model.check(each)


# Chapter 'Training', section 'Predict and evaluate'
def placed(model: Ranker, device: torch.device | str | None) -> Ranker:
    """The model, on the device if one is given; ValueError if not here."""
    if device is None:
        return model
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from error
    return model.to(device)


SCORING_ROWS = 8192


# Chapter 'Training', section 'Predict and evaluate'
def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model lives, and in which floating-point type."""
    first = next(each for each in model.parameters() if each.is_floating_point())
    return first.device, first.dtype


# Chapter 'Training', section 'Predict and evaluate'
def double_predictions(model: Ranker, batch: Batch, logits: Tensor) -> np.ndarray:
    """A model's predictions from its logits, computed in float64."""
    return model.predictions(batch, logits.cpu().double()).cpu().numpy()


# Chapter 'Training', section 'Predict and evaluate'
def predict(
    model: Ranker,
    batch: Batch,
    *,
    index: Any = None,
    batch_size: int = SCORING_ROWS,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Probabilities and values: a row for each row, a column for each output.

    The rows keep the batch's order and get the `index`, such as `table.index`,
    or are numbered from 0. All columns are float64, whatever the model's type.
    `device` moves the model there, as `model.to(device)` does. `batch_size` is the
    most rows that are scored at once.
    Raises: TypeError, ValueError for what is no model, no batch, no size or no
    device, and for an index of another length.
    """
    check_ranker(model)
    check_batch("batch", batch)
    check_number("batch_size", batch_size, whole=True)
    if index is not None and len(index) != len(batch):
        raise ValueError(
            f"index: expected {len(batch)} values, one for each row, found {len(index)}"
        )
    place = home(placed(model, device))
    parts = slices(batch, batch_size)
    keep_memory()
    with scoring(model):
        found = [
            double_predictions(model, part, model(part))
            for part in (each.to(*place) for each in parts)
        ]
    return pd.DataFrame(np.concatenate(found), index=index, columns=list(model.outputs))


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT, LARGEST_KEPT = 2**30, 2**25


# Chapter 'Training', section 'Predict and evaluate'
def keep_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory, from now on.

    Not where the environment variable MALLOC_TRIM_THRESHOLD_ says how much.
    """
    mallopt = getattr(ctypes.pythonapi, "mallopt", None)
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, KEPT)


# Chapter 'Training', section 'Predict and evaluate'
def measured(
    model: Ranker,
    batch: Batch,
    predicted: np.ndarray,
    groups: Any,
    metrics: Iterable[str] | None,
) -> pd.DataFrame:
    """`measure` for the model's own tasks."""
    return measure(
        model.labels(batch).cpu().numpy(),
        predicted,
        model.tasks,
        weights=None if batch.weights is None else batch.weights.cpu().numpy(),
        groups=groups,
        metrics=metrics,
    )


# Chapter 'Training', section 'Predict and evaluate'
def evaluate(
    model: Ranker,
    batch: Batch,
    *,
    groups: Any = None,
    metrics: Iterable[str] | None = None,
    batch_size: int = SCORING_ROWS,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Metrics on labeled rows: a row for each task.

    `rows` counts the rows with a label. All else, `mean_label` included, is
    weighted by the batch's row weights, and computed from float64 predictions.
    `groups` holds an id for each row and adds `grouped_auc`; `metrics` names a
    choice of metrics, all if None. NaN where a metric does not fit the task.
    Raises: as `predict`, `measure` and the model's own `check` do.
    """
    check_ranker(model)
    check_batch("batch", batch)
    check_rows(model, {"batch": batch})
    predicted = predict(model, batch, batch_size=batch_size, device=device)
    return measured(model, batch, predicted.to_numpy(), groups, metrics)


# Chapter 'Training', section 'Which epoch was best?'
@dataclass(frozen=True)
class Monitor:
    """The number that says which epoch was best, and which way is better."""

    name: str
    tasks: tuple[str, ...]
    metric: str | None
    higher_is_better: bool

    def score(self, joint: float, figures: pd.DataFrame) -> float:
        """The number of one epoch; NaN as soon as one of its tasks has NaN."""
        if self.metric is None:
            return joint
        return float(figures.loc[list(self.tasks), self.metric].mean(skipna=False))

    def best(self, scores: Sequence[float]) -> int:
        """Position of the best score, the first of equals; NaN is never better."""
        worst = -inf if self.higher_is_better else inf
        known = [worst if isnan(score) else score for score in scores]
        return known.index(max(known) if self.higher_is_better else min(known))


# Chapter 'Training', section 'Which epoch was best?'
def monitors(tasks: Sequence[Task], metrics: Iterable[str]) -> dict[str, Monitor]:
    """Every monitor that these tasks and metrics allow, by its name."""
    found = {"loss": Monitor("loss", (), None, False)}
    for metric in metrics:
        higher = METRICS[metric].higher_is_better
        names = [task.name for task in tasks if task.kind in METRICS[metric].kinds]
        if higher is None or not names:
            continue
        for label, members in [
            ("mean", names),
            *((name, [name]) for name in names),
        ]:
            name = f"{label}/{metric}"
            found[name] = Monitor(name, tuple(members), metric, higher)
    return found


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}


# Chapter 'Training', section 'Settings'
def named_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    tables: Collection[Tensor] = (),
    **options: Any,
) -> Optimizer:
    """An optimizer by its name; all but Adagrad take the fused step.

    The `tables` get sparse gradients and are updated by row.
    """
    here = {each.device.type for group in groups for each in group["params"]}
    if name != "adagrad" and here <= {"cpu", "cuda"}:
        options["fused"] = True
    if tables:
        return row_optimizer(name, groups, tables, **options)
    return OPTIMIZERS[name](groups, **options)


# Chapter 'Training', section 'Settings'
@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a run; `fit` says what each means."""

    _: KW_ONLY
    epochs: int
    batch_size: int = 256
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    embedding_decay: float = 0.0
    scheduler: Callable[[Optimizer], Any] | None = None
    schedule: str = "epoch"
    monitor: str = "loss"
    patience: int | None = None
    train_metrics: bool = True
    metrics: tuple[str, ...] | None = None
    clip_norm: float | None = None
    precision: str | None = None
    big_table: int | None = BIG_TABLE
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)


WHOLE = ("epochs", "batch_size", "patience", "big_table", "seed")
DECAYS = ("weight_decay", "embedding_decay")
NUMBERS = (*WHOLE, *DECAYS, "learning_rate", "clip_norm")


# Chapter 'Training', section 'Settings'
def check_settings(settings: Settings) -> None:
    """Refuse sizes and rates that cannot be, and words that mean nothing."""
    for name in NUMBERS:
        value, whole = getattr(settings, name), name in WHOLE
        if value is None and name in ("patience", "clip_norm", "big_table"):
            continue
        zero = name in (*DECAYS, "big_table", "seed")
        check_number(name, value, whole=whole, zero=zero)
        object.__setattr__(settings, name, (int if whole else float)(value))
    one_of("schedule", settings.schedule, ("epoch", "batch"))
    one_of("precision", settings.precision, (None, "bf16"))
    if not callable(settings.optimizer):
        one_of("optimizer", settings.optimizer, OPTIMIZERS)
    if not (settings.scheduler is None or callable(settings.scheduler)):
        raise TypeError(
            "scheduler: expected a callable from an optimizer to a scheduler,"
            f" found {type(settings.scheduler).__name__}"
        )


# Chapter 'Training', section 'Settings'
def decays(name: str, parameter: Tensor) -> bool:
    """Whether a network's parameter is a matrix, and no stack of biases."""
    return parameter.ndim > 1 and name.rpartition(".")[2] != "bias"


# Chapter 'Training', section 'Settings'
def decay_groups(model: Ranker, settings: Settings) -> list[dict[str, Any]]:
    """The parameters that want a gradient, put together by their decay."""
    tables = {id(table) for table in model.embedding.parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = settings.weight_decay if decays(name, parameter) else 0.0
        if id(parameter) in tables:
            decay = settings.embedding_decay
        if parameter.requires_grad:
            groups.setdefault(decay, []).append(parameter)
    return [{"params": each, "weight_decay": decay} for decay, each in groups.items()]


# Chapter 'Training', section 'Settings'
def row_widths(model: Ranker, settings: Settings) -> frozenset[int]:
    """The widths whose tables are updated by row.

    A callable knows best what its optimizer can do; with one they are those that
    the embedding names already.
    """
    if isinstance(settings.optimizer, str):
        return big_widths(model.embedding, settings.big_table)
    return model.embedding.by_row


# Chapter 'Training', section 'Settings'
def build_optimizer(model: Ranker, settings: Settings) -> Optimizer:
    """The optimizer of the parameters that want a gradient.

    Raises: ValueError, TypeError for no parameters, and where a callable is
    combined with a learning rate, a decay or a `big_table`, or returns something
    else.
    """
    groups = decay_groups(model, settings)
    if not groups:
        raise ValueError(
            "model: expected a parameter that wants a gradient, found all"
            " frozen; see requires_grad_"
        )
    if isinstance(settings.optimizer, str):
        widths = row_widths(model, settings)
        tables = [model.embedding.weights[str(width)] for width in widths]
        rate = settings.learning_rate
        return named_optimizer(settings.optimizer, groups, tables, lr=rate)
    for name in ("learning_rate", "big_table", *DECAYS):
        if getattr(settings, name) != getattr(Settings, name):
            instead = "set it inside your callable"
            if name == "big_table":
                instead = "name the widths in model.embedding.by_row"
            raise ValueError(
                f"{name} belongs to an optimizer chosen by name; {instead}"
            )
    (group,) = groups
    optimizer = settings.optimizer(group["params"])
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer: expected a callable that returns a torch Optimizer, it"
            f" returned {type(optimizer).__name__}"
        )
    return optimizer


# Chapter 'Training', section 'Settings'
def build_scheduler(optimizer: Optimizer, settings: Settings) -> Any:
    """The scheduler that was asked for, or None; TypeError if it is none."""
    if settings.scheduler is None:
        return None
    scheduler = settings.scheduler(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            "scheduler: expected a callable that returns a torch LRScheduler,"
            f" it returned {type(scheduler).__name__}"
        )
    return scheduler


# Chapter 'Training', section 'A record'
class History(pd.DataFrame):
    """A run's figures: a row for each epoch, set of rows and task.

    Columns: `epoch` (from 1), `split`, `task`, `loss`, `learning_rate` (at the
    epoch's first step), then metrics. `split` is "train", "valid" or a name
    from `also`, scored after the epoch; "batches" is the mean of the losses
    seen while training. `attrs` holds `monitor`, its `scores` and `best_epoch`.
    """

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        return History

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights the model got; None without valid rows."""
        return self.attrs.get("best_epoch")

    def curves(self, metric: str = "loss") -> Any:
        """A matplotlib Figure: a color for each task, a dash for each split."""
        import matplotlib.pyplot as plt

        one_of("metric", metric, [name for name in self.columns if name not in KEYS])
        figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        colors = {task: f"C{k}" for k, task in enumerate(self["task"].unique())}
        for (task, name), part in self.groupby(["task", "split"], sort=False):
            if part[metric].notna().any():
                dashes = DASHES.get(str(name), "-.")
                (line,) = axes.plot(part["epoch"], part[metric], dashes)
                line.set(color=colors[task], label=f"{task}, {name}")
        axes.set(xlabel="epoch", ylabel=metric.replace("_", " "))
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


KEYS = ("epoch", "split", "task", "learning_rate")
DASHES = {"batches": ":", "train": "--", "valid": "-"}


REDRAW_SECONDS = 0.5


# Chapter 'Training', section 'A record'
class Progress:
    """A bar that is redrawn by the clock: a step costs a look at the time."""

    def __init__(self, names: Sequence[str], total: int, done: int, shown: bool):
        self.names, self.waiting = names, 0
        self.due = 0.0 if shown else inf
        self.bar = tqdm(total=total, initial=done, unit="batch", disable=not shown)

    def step(self, losses: Float[Tensor, " tasks"]) -> None:
        """Count a batch; now and then show its losses, and wait for them."""
        self.waiting += 1
        if time.monotonic() >= self.due:
            self.show("batch", losses.tolist())

    def show(self, title: str, losses: Iterable[float]) -> None:
        """Show each task's loss under the title, and all batches counted so far."""
        figures = zip(self.names, losses, strict=True)
        self.bar.set_description(title, refresh=False)
        self.bar.set_postfix(
            {name: f"{loss:.4f}" for name, loss in figures}, refresh=False
        )
        self.bar.update(self.waiting)
        self.waiting, self.due = 0, max(self.due, time.monotonic() + REDRAW_SECONDS)


# Chapter 'Training', section 'One epoch'
def label_mask(model: Ranker, rows: Batch) -> Float[Tensor, "rows tasks"]:
    """1 for each label that counts; 0 if it is missing or its row weighs 0."""
    valid = ~model.labels(rows).isnan()
    if rows.weights is not None:
        valid = valid & (rows.weights > 0).unsqueeze(1)
    return valid.to(rows.dense.dtype)


# Chapter 'Training', section 'One epoch'
def epoch_means(
    losses: Float[Tensor, "steps tasks"],
    mask: Float[Tensor, "rows tasks"],
    batch_size: int,
) -> Float[Tensor, " tasks"]:
    """An epoch's mean losses, each batch counted by the labels that it held."""
    missing = len(losses) * batch_size - len(mask)
    padded = nn.functional.pad(mask, (0, 0, 0, missing))
    counts = padded.view(len(losses), batch_size, -1).sum(1)
    return (losses * counts).sum(0) / counts.sum(0)


# Chapter 'Training', section 'One epoch'
def check_finite(
    tasks: Sequence[Task], losses: Float[Tensor, "parts tasks"], where: str
) -> None:
    """Refuse the first loss that is not finite; `where` has a {} for a part.

    A task of weight 0 is reported and not trained; it may be what it is.
    """
    counts = losses.new_tensor([task.weight > 0 for task in tasks], dtype=torch.bool)
    broken = (~losses.isfinite() & counts).nonzero()
    if len(broken):
        part, task = broken[0].tolist()
        raise FloatingPointError(
            f"task {tasks[task].name!r}: the loss became"
            f" {losses[part, task].item()} {where.format(part + 1)}; try a"
            " smaller learning_rate, a clip_norm, or labels on a smaller scale"
        )


# Chapter 'Training', section 'One epoch'
class Run:
    """One call of `fit`: what it carries from epoch to epoch."""

    def __init__(
        self,
        model: Ranker,
        rows: Mapping[str, Batch],
        settings: Settings,
        groups: Mapping[str, Any],
    ) -> None:
        self.model, self.settings, self.groups = model, settings, groups
        self.device, dtype = home(model)
        self.rows = {}
        for name, each in rows.items():
            with naming(name):
                moved = each.to(self.device, dtype)
                self.rows[name] = model.embedding.inspected(moved)
        self.steps = ceil(len(rows["train"]) / settings.batch_size)
        self.frozen = frozen_parts(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, settings)
        self.scheduler = build_scheduler(self.optimizer, settings)
        self.by_row = row_widths(model, settings)
        self.facts = settings_facts(settings, self.optimizer, self.scheduler)
        self.facts["widths updated by row"] = str(sorted(self.by_row))
        self.monitor = self.named_monitor()
        self.epoch, self.rate, self.start = 0, nan, ""
        self.records: list[dict[Any, Any]] = []
        self.latest: tuple[str, list[float]] = ("", [])
        self.scores: list[float] = []
        self.best: dict[str, Any] | None = None

    def autocast(self) -> Any:
        """The context in which a forward may use bfloat16, if that was asked."""
        if self.settings.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(self, batch: Batch) -> Float[Tensor, " tasks"]:
        """Forward, backward, update. The losses stay on the device."""
        with self.autocast():
            losses = self.model.losses(batch)
            joint = self.model.joint(losses, self.epoch)
        for parameter in self.parameters:
            parameter.grad = None
        joint.backward()
        if self.settings.clip_norm is not None:
            clip_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None and self.settings.schedule == "batch":
            self.scheduler.step()
        return losses.detach()

    def train_epoch(self, progress: Progress) -> None:
        """One pass over the training rows, in an order that is the epoch's own."""
        rows, size = self.rows["train"], self.settings.batch_size
        shuffle, noise = epoch_seeds(self.settings.seed, self.epoch)
        order = shuffled_order(len(rows), shuffle).to(self.device)
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        losses = []
        train_mode(self.model, self.frozen)
        with by_row(self.model.embedding, self.by_row), seeded(self.device, noise):
            for batch in batches(rows, order, size):
                losses.append(self.step(batch))
                progress.step(losses[-1])
        self.epoch += 1
        found = torch.stack(losses)
        where = f"in epoch {self.epoch}, batch {{}} of {self.steps}"
        check_finite(self.model.tasks, found, where)
        means = epoch_means(found, label_mask(self.model, rows)[order], size)
        self.record("batches", means)

    def record(
        self,
        name: str,
        losses: Float[Tensor, " tasks"],
        figures: pd.DataFrame | None = None,
    ) -> None:
        """Note the losses and metrics of one set of rows after an epoch."""
        for task, loss in zip(self.model.tasks, losses.tolist(), strict=True):
            row = {
                "epoch": self.epoch,
                "split": name,
                "task": task.name,
                "loss": loss,
                "learning_rate": self.rate,
            }
            more = {} if figures is None else figures.loc[task.name].to_dict()
            self.records.append({**row, **more})
        if name in RESERVED:
            self.latest = name, losses.tolist()

    def score(self, name: str) -> tuple[float, Tensor, pd.DataFrame]:
        """A set of rows as the model sees it now: joint loss, losses, metrics."""
        rows, names = self.rows[name], list(self.metrics(name))
        with scoring(self.model):
            parts = slices(rows, SCORING_ROWS)
            logits = torch.cat([self.model(part) for part in parts])
            losses = self.model.losses(rows, logits)
            joint = float(self.model.joint(losses))
            predicted = double_predictions(self.model, rows, logits)
        where = f"on the rows {name!r} after epoch {self.epoch}"
        check_finite(self.model.tasks, losses.unsqueeze(0), where)
        losses = losses.where(label_mask(self.model, rows).sum(0) > 0, nan)
        figures = measured(self.model, rows, predicted, self.groups.get(name), names)
        return joint, losses, figures[names]

    def metrics(self, name: str) -> tuple[str, ...]:
        """The metrics of a set of rows; those of groups only if it has groups."""
        grouped, names = name in self.groups, self.settings.metrics
        if names is not None and not grouped:
            names = tuple(each for each in names if not METRICS[each].needs_groups)
        return check_metrics(names, self.model.tasks, grouped=grouped)

    def score_epoch(self) -> None:
        """Score every set of rows; keep the weights if they are the best so far."""
        for name in self.rows:
            if name == "train" and not self.settings.train_metrics:
                continue
            joint, losses, figures = self.score(name)
            self.record(name, losses, figures)
            if name == "valid":
                self.scores.append(self.monitor.score(joint, figures))
                if self.best_epoch == self.epoch:
                    self.best = copy.deepcopy(self.model.state_dict())

    @property
    def best_epoch(self) -> int | None:
        """The best epoch so far; None without validation rows."""
        return self.monitor.best(self.scores) + 1 if self.scores else None

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done, or patience has run out."""
        patience, best = self.settings.patience, self.best_epoch
        if patience is not None and best is not None and self.epoch - best >= patience:
            return True
        return self.epoch >= self.settings.epochs

    def restore_best(self) -> None:
        """Give the model the weights of its best epoch, if there is one."""
        if self.best is not None:
            self.model.load_state_dict(self.best)

    def schedule_epoch(self) -> None:
        """Step a scheduler that counts epochs; tell one of plateaus the score."""
        if self.scheduler is None or self.settings.schedule == "batch":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(self.scores[-1])
        else:
            self.scheduler.step()

    def history(self) -> History:
        """The figures noted so far."""
        history = History(self.records)
        history.attrs["monitor"] = self.settings.monitor
        history.attrs["scores"] = list(self.scores)
        history.attrs["best_epoch"] = self.best_epoch
        return history

    def named_monitor(self) -> Monitor:
        """The monitor that the settings name; refuses one that no task has."""
        choices = monitors(self.model.tasks, self.metrics("valid"))
        one_of("monitor", self.settings.monitor, choices)
        return choices[self.settings.monitor]

    def try_monitor(self) -> None:
        """Refuse a monitor that has no number on these validation rows."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UndefinedMetricWarning)
            joint, losses, figures = self.score("valid")
        why = list(dict.fromkeys(str(each.message) for each in caught))
        if self.monitor.metric is None:
            absent = zip(self.model.tasks, losses.isnan().tolist(), strict=True)
            why = [
                f"no label for task {task.name!r}"
                for task, none in absent
                if none and task.weight > 0
            ]
            joint = nan if why else joint
        if isnan(self.monitor.score(joint, figures)):
            raise ValueError(
                f"monitor: {self.monitor.name!r} is undefined on the valid rows"
                f" ({'; '.join(why)})"
            )

    def check_plateau(self) -> None:
        """Refuse a plateau scheduler that looks the other way, or at batches."""
        mode = "max" if self.monitor.higher_is_better else "min"
        found = self.scheduler.mode, self.settings.schedule
        if found != (mode, "epoch"):
            raise ValueError(
                f"scheduler: with monitor={self.monitor.name!r}, ReduceLROnPlateau"
                f" needs mode={mode!r} and schedule='epoch', found {found[0]!r}"
                f" and {found[1]!r}"
            )

    def check_monitor(self) -> None:
        """Refuse what waits for a score that never comes."""
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        monitored = self.monitor.name != "loss"
        if "valid" in self.rows:
            if plateau:
                self.check_plateau()
            self.try_monitor()
        elif plateau or monitored or self.settings.patience is not None:
            asked = {
                "ReduceLROnPlateau": plateau,
                "a monitor": monitored,
                "patience": True,
            }
            name = next(name for name, wanted in asked.items() if wanted)
            raise ValueError(f"{name} needs valid rows, found valid=None")

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What may not differ between a file and the run that resumes from it."""
        deciding = [name for name in ("train", "valid") if name in self.rows]
        rows = {f"rows {name}": rows_fact(self.rows[name]) for name in deciding}
        metric = self.monitor.metric
        if metric is not None and METRICS[metric].needs_groups:
            codes, _ = pd.factorize(pd.Series(self.groups["valid"]))
            rows["groups valid"] = digest([torch.from_numpy(codes)])
        return model_facts(self.model) | self.facts | rows

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to carry on from here."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "start": self.start,
            "epoch": self.epoch,
            "records": self.records,
            "scores": self.scores,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": plain(self.optimizer.state_dict()),
            "scheduler": self.scheduler and plain(self.scheduler.state_dict()),
        }

    def resume(self, path: Path) -> None:
        """Carry on from the file, if there is one; ValueError if of another run.

        Warns where the model's weights are not those that the run began with.
        """
        self.start = digest([*self.model.parameters(), *self.model.buffers()])
        if not path.exists():
            return
        state = load_checkpoint(path, self.device)
        check_same(path, state["fingerprint"], self.fingerprint)
        if state["epoch"] > self.settings.epochs:
            raise ValueError(
                f"checkpoint {path} holds {state['epoch']} epochs already; expected"
                f" at most epochs={self.settings.epochs}"
            )
        if state["start"] != self.start:
            warnings.warn(
                f"resuming {path} after epoch {state['epoch']}: this model's"
                " starting weights are replaced",
                stacklevel=4,
            )
            self.start = state["start"]
        self.epoch, self.best = state["epoch"], state["best"]
        self.records, self.scores = state["records"], state["scores"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


# Chapter 'Training', section 'Refused before the first step'
def check_mapping(name: str, value: Any, example: str) -> None:
    """Refuse what is no mapping by name; None is an empty one."""
    if not (value is None or isinstance(value, Mapping)):
        raise TypeError(
            f"{name}: expected a mapping such as {example}, found"
            f" {type(value).__name__}"
        )


RESERVED = ("batches", "train", "valid")


# Chapter 'Training', section 'Refused before the first step'
def named_rows(
    train: Batch, valid: Batch | None, also: Mapping[str, Batch] | None
) -> dict[str, Batch]:
    """All sets of rows by name; refuses taken names and what is no batch."""
    check_mapping("also", also, '{"test": batch}')
    rows = {"train": train} | ({} if valid is None else {"valid": valid})
    for name, each in (also or {}).items():
        if not isinstance(name, str) or not name or name in RESERVED:
            raise ValueError(
                f"also: {name!r} cannot name rows; expected a text other than"
                f" {', '.join(RESERVED)}"
            )
        rows[name] = each
    for name, each in rows.items():
        check_batch(name, each)
    return rows


# Chapter 'Training', section 'Refused before the first step'
def check_labels(model: Ranker, train: Batch) -> None:
    """Refuse training rows in which a task that has weight has no label."""
    seen = (label_mask(model, train).sum(0) > 0).tolist()
    names = [
        task.name
        for task, some in zip(model.tasks, seen, strict=True)
        if task.weight > 0 and not some
    ]
    if not any(task.weight for task in model.tasks):
        raise ValueError("tasks: all have weight 0, expected one above 0 to train")
    if names:
        raise ValueError(
            f"train: no label for task {', '.join(map(repr, names))} in"
            f" {len(train)} rows; leave the task out with tasks=, or add rows"
        )


# Chapter 'Training', section 'Refused before the first step'
def check_groups(groups: Mapping[str, Any], rows: Mapping[str, Batch]) -> None:
    """Refuse groups of unknown rows, or another number of them than rows."""
    for name, values in groups.items():
        one_of("groups", name, rows)
        if len(values) != len(rows[name]):
            raise ValueError(
                f"groups[{name!r}]: expected {len(rows[name])} values, one for"
                f" each row, found {len(values)}"
            )


# Chapter 'Training', section 'Refused before the first step'
def check_last_batch(model: Ranker, rows: int, batch_size: int) -> None:
    """Refuse a last batch of one row where a layer normalizes over batches."""
    frozen = frozen_parts(model)
    normalized = any(
        isinstance(part, BATCH_NORMS) and part not in frozen for part in model.modules()
    )
    if normalized and (rows - 1) % batch_size == 0:
        raise ValueError(
            f"batch_size: {rows} rows in batches of {batch_size} leave a batch"
            " of one row, over which batch normalization is undefined; choose"
            f" another batch_size, or train on train[:{rows - 1}]"
        )


# Chapter 'Training', section 'Refused before the first step'
def check_precision(model: Ranker, precision: str | None) -> None:
    """Refuse weights below 32 bits, and autocast where it would do nothing."""
    found = home(model)[1]
    fits = (torch.float32,) if precision else (torch.float32, torch.float64)
    if found not in fits:
        raise ValueError(
            f"model: with precision={precision!r} expected weights of"
            f" {' or '.join(map(str, fits))}, found {found}"
        )


# Chapter 'Training', section 'A file to resume from'
def digest(values: Iterable[Tensor | None]) -> str:
    """A short text that any other value, order or shape would change."""
    found = hashlib.blake2b(digest_size=8)
    for each in values:
        if each is not None:
            found.update(repr(each.shape).encode())
            found.update(each.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


# Chapter 'Training', section 'A file to resume from'
def rows_fact(rows: Batch) -> str:
    """Rows in words to compare: how many, and the digest of their tensors."""
    found = digest((rows.ids, rows.dense, rows.labels, rows.weights))
    return f"{len(rows)} rows, digest {found}"


# Chapter 'Training', section 'A file to resume from'
def plain_text(value: Any) -> str:
    """`repr` without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


# Chapter 'Training', section 'A file to resume from'
def model_facts(model: Ranker) -> dict[str, str]:
    """Class, tasks, modules and parameters of a model, in words to compare."""
    found = {"model class": type(model).__qualname__}
    found["encoder"] = model.embedding.encoder
    found["layout"] = layouts(model)
    found |= {f"task {task.name}": plain_text(task) for task in model.tasks}
    for name, module in model.named_modules():
        found[f"module {name}"] = f"{type(module).__name__}({module.extra_repr()})"
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = f"{parameter.dtype} {list(parameter.shape)}"
    return found


DECISIVE = (
    "batch_size",
    "weight_decay",
    "embedding_decay",
    "schedule",
    "monitor",
    "clip_norm",
    "precision",
    "seed",
)


# Chapter 'Training', section 'A file to resume from'
def settings_facts(
    settings: Settings, optimizer: Optimizer, scheduler: Any
) -> dict[str, str]:
    """The settings that decide weights, in words to compare."""
    found = {
        f"setting {name}": plain_text(getattr(settings, name)) for name in DECISIVE
    }
    found["optimizer"] = type(optimizer).__name__
    for place, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                found[f"optimizer {name}, group {place}"] = plain_text(value)
    if scheduler is not None:
        found["scheduler"] = type(scheduler).__name__
        for name, value in scheduler.state_dict().items():
            found[f"scheduler {name}"] = plain_text(value)
    return found


# Chapter 'Training', section 'A file to resume from'
def check_same(
    path: Path, found: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    """Refuse a file of another model, other rows or other settings."""
    lines = []
    for name in {**expected, **found}:
        there, here = found.get(name, "none"), expected.get(name, "none")
        if there != here:
            lines.append(f"{name}: {there} in the file, {here} here")
    if lines:
        raise ValueError(
            f"checkpoint {path} is of another run; delete it or choose another"
            f" path. Differences: {len(lines)}, at most five shown:\n"
            + "\n".join(lines[:5])
        )


# Chapter 'Training', section 'A file to resume from'
def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new.

    Raises: OSError where it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        raise OSError(
            f"checkpoint {path} could not be written: {error}; a file that was"
            " there before is as it was"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


FORMAT = "mtl_annotated checkpoint 2"


# Chapter 'Training', section 'A file to resume from'
def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; nothing in the file is executed.

    Raises: ValueError where the file is no whole checkpoint of `fit`.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(
            f"checkpoint {path}: not readable as one, or cut short ({error})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path}: expected a file that fit wrote")
    return state


# Chapter 'Training', section 'A file to resume from'
def plain(value: Any) -> Any:
    """The same with NumPy's numbers as Python's, however deep they lie."""
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update((name, plain(each)) for name, each in value.items())
        return found
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


# Chapter 'Training', section '`fit`'
def prepare(
    model: Ranker,
    rows: Mapping[str, Batch],
    settings: Settings,
    groups: Mapping[str, Any],
    device: torch.device | str | None,
) -> Run:
    """A run about to start; what would spoil it later is refused here."""
    check_ranker(model)
    check_labels(model, rows["train"])
    check_rows(model, rows)
    check_groups(groups, rows)
    check_metrics(settings.metrics, model.tasks, grouped=bool(groups))
    check_precision(model, settings.precision)
    check_last_batch(model, len(rows["train"]), settings.batch_size)
    keep_memory()
    run = Run(placed(model, device), rows, settings, groups)
    run.check_monitor()
    return run


# Chapter 'Training', section '`fit`'
def carry_out(run: Run, path: Path | None, shown: bool) -> History:
    """Carry a run to its end, from its file if there is one."""
    if path is not None:
        run.resume(path)
    names = [task.name for task in run.model.tasks]
    total, done = run.settings.epochs * run.steps, run.epoch * run.steps
    progress = Progress(names, total, done, shown)
    with restored_modes(run.model), closing(progress.bar):
        try:
            while not run.finished:
                run.train_epoch(progress)
                run.score_epoch()
                run.schedule_epoch()
                if path is not None:
                    save_checkpoint(path, run.state())
                name, losses = run.latest
                progress.show(f"epoch {run.epoch}, {name}", losses)
        finally:
            run.restore_best()
    return run.history()


# Chapter 'Training', section '`fit`'
def checkpoint_path(checkpoint: str | Path | None) -> Path | None:
    """The path of a file; refuses a folder, and a folder that is not there."""
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"checkpoint: expected a file in a folder, found {path}")
    return path


# Chapter 'Training', section '`fit`'
def fit(
    model: Ranker,
    train: Batch,
    valid: Batch | None = None,
    *,
    epochs: int,
    batch_size: int = 256,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adam",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    embedding_decay: float = 0.0,
    scheduler: Callable[[Optimizer], Any] | None = None,
    schedule: str = "epoch",
    monitor: str = "loss",
    patience: int | None = None,
    also: Mapping[str, Batch] | None = None,
    train_metrics: bool = True,
    metrics: str | Iterable[str] | None = None,
    groups: Mapping[str, Any] | None = None,
    clip_norm: float | None = None,
    precision: str | None = None,
    big_table: int | None = BIG_TABLE,
    device: torch.device | str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train the model in place; it ends with its best weights on valid rows.

    All rows are held on the model's device at once. A row's weight multiplies
    its losses, which are divided by the number of labels: weights with mean 1
    keep the meaning of the learning rate, and a row of weight 0 is left out.
    Metrics are weighted means.

    Args:
        model: any `Ranker`; a layer that is in eval mode stays so.
        train: the rows to learn from, with a label for every task.
        valid: rows that choose the best epoch; without them the last one stays.
        epochs: passes over the training rows, at most.
        batch_size: rows a step; the last step of an epoch may have fewer.
        optimizer: "adam", "adamw", "sgd" or "adagrad", or a callable from a
            list of parameters to an optimizer.
        learning_rate: of an optimizer by name, as are the two decays.
        weight_decay: of the networks' matrices, not of their biases, as torch's
            optimizer of that name understands it: with "adam" and "sgd" the L2
            penalty weight_decay / 2 times the sum of squares.
        embedding_decay: the same for the embedding's tables: all rows at every
            step, or of a big table those that the batch reads.
        scheduler: a callable from the optimizer to a scheduler.
        schedule: whether that is stepped after each "epoch" or each "batch".
        monitor: what says which epoch is best on the validation rows: "loss"
            (the joint one), "task/metric" or "mean/metric" (mean over tasks).
        patience: stop after so many epochs without a better one, if given.
        also: further rows by name, scored after each epoch, never chosen by.
        train_metrics: score the training rows too after each epoch.
        metrics: names of metrics; all that fit the tasks if None.
        groups: a mapping from "train", "valid" or a name in `also` to an id for
            each of its rows, for `grouped_auc`.
        clip_norm: largest norm of the gradient of all parameters together.
        precision: "bf16" computes the forward pass in bfloat16.
        big_table: with an optimizer by name, tables packed into more rows than
            this are updated by row, only those rows that a batch reads; None for
            never. See `mtl_annotated.big_tables`.
        device: moves the model there first; else it is trained where it is.
        seed: decides shuffles and noise, not the weights to start from.
        checkpoint: a file, written after each epoch, resumed from if it exists.
        progress: show a bar.

    Returns:
        A History: a row for each epoch, split and task, and `best_epoch`.

    Raises: TypeError, ValueError for input that does not fit; OSError for a
        file that cannot be written; FloatingPointError for a loss that is not
        finite. After an error the model has its best weights so far, if there
        are valid rows and a finished epoch; else it is left as it broke, NaN
        included.

    Warns: UserWarning where a checkpoint replaces other starting weights.
    """
    names = (metrics,) if isinstance(metrics, str) else metrics
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        embedding_decay=embedding_decay,
        scheduler=scheduler,
        schedule=schedule,
        monitor=monitor,
        patience=patience,
        train_metrics=train_metrics,
        metrics=None if names is None else tuple(names),
        clip_norm=clip_norm,
        precision=precision,
        big_table=big_table,
        seed=seed,
    )
    path = checkpoint_path(checkpoint)
    check_mapping("groups", groups, '{"valid": ids}')
    rows = named_rows(train, valid, also)
    run = prepare(model, rows, settings, groups or {}, device)
    return carry_out(run, path, progress)


# Chapter 'Training', section 'Many copies at once'
def check_replicas(models: Sequence[nn.Module]) -> None:
    """Refuse models that are not copies of one architecture in one mode."""
    if not models:
        raise ValueError("replicas: expected at least one model, found none")
    if any(isinstance(model, Ranker) for model in models):
        raise TypeError(
            "replicas: expected models that take tensors; a Ranker takes a"
            " Batch, so replicate its trunk or its towers"
        )
    found = [
        (
            repr(model),
            [(k, v.shape) for k, v in model.named_parameters()],
            [(k, v.shape) for k, v in model.named_buffers()],
        )
        for model in models
    ]
    for index, (each, model) in enumerate(zip(found, models, strict=True)):
        if each != found[0] or model.training != models[0].training:
            raise ValueError(
                f"replicas: model {index} differs from model 0 in modules,"
                " sizes or mode; expected copies of one architecture"
            )


# Chapter 'Training', section 'Many copies at once'
def flat(name: str) -> str:
    """A parameter's name without dots, which torch does not accept in one."""
    return name.replace(".", "__")


# Chapter 'Training', section 'Many copies at once'
class Replicas(nn.Module):
    """S models of one architecture, run as one batched program.

    The models take plain tensors: a trunk or a tower, not a Ranker. Parameters
    and buffers get a leading axis S. Train the sum of the S losses
    with an elementwise optimizer, and each replica learns as it would alone.
    What mixes all parameters, such as clipping by their norm, breaks that.

    Raises: ValueError for no models, or models that differ; TypeError for a
    Ranker.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        models = list(models)
        check_replicas(models)
        self.size, self.template = len(models), (copy.deepcopy(models[0]),)
        parameters, buffers = torch.func.stack_module_state(models)
        self.names = [*parameters, *buffers]
        for name, values in parameters.items():
            stacked = nn.Parameter(values.detach(), values.requires_grad)
            self.register_parameter(flat(name), stacked)
        for name, values in buffers.items():
            self.register_buffer(flat(name), values)
        self.train(models[0].training)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        self.template[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        self.template[0].train(mode)
        return super().train(mode)

    def stacked(self) -> dict[str, Tensor]:
        """Weights and buffers by their names in one replica, each `[S, ...]`."""
        return {name: getattr(self, flat(name)) for name in self.names}

    def forward(self, *inputs: Tensor) -> Any:
        """Inputs `[S, ...]` to outputs `[S, ...]`; replica s sees slice s alone."""
        for values in inputs:
            if values.shape[:1] != (self.size,):
                raise ValueError(
                    f"replicas: expected inputs [{self.size}, ...], found"
                    f" {list(values.shape)}; x.expand({self.size}, *x.shape)"
                    " shares one x"
                )

        def one(weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
            return torch.func.functional_call(self.template[0], weights, inputs)

        return torch.vmap(one, randomness="different")(self.stacked(), inputs)

    def replica(self, index: int) -> nn.Module:
        """An ordinary module with a copy of one replica's weights."""
        module = copy.deepcopy(self.template[0])
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, values in self.stacked().items():
                named[name].copy_(values[index])
        return module
