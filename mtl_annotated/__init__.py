"""Multi-task ranking models whose source is a book.

Rows go in, named scores come out:
rows → `Encoder` → `Batch` → embedding → trunk → towers → tasks.
"""

from mtl_annotated.datasets import load_adult
from mtl_annotated.features import (
    Batch,
    Dense,
    Encoder,
    FeatureEmbedding,
    Sequence,
    Sparse,
)
from mtl_annotated.shared_bottom import (
    MLP,
    SharedBottom,
    SharedBottomLayer,
    Towers,
)
from mtl_annotated.simulation import shop_log, sine_recipe
from mtl_annotated.tasks import METRICS, Task, measure
from mtl_annotated.training import History, Ranker, Replicas, evaluate, fit, predict

__version__ = "0.1.0"
__all__ = [
    "METRICS",
    "MLP",
    "Batch",
    "Dense",
    "Encoder",
    "FeatureEmbedding",
    "History",
    "Ranker",
    "Replicas",
    "Sequence",
    "SharedBottom",
    "SharedBottomLayer",
    "Sparse",
    "Task",
    "Towers",
    "evaluate",
    "fit",
    "load_adult",
    "measure",
    "predict",
    "shop_log",
    "sine_recipe",
]
