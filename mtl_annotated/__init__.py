"""Multi-task ranking models whose source is a book.

Rows go in, named scores come out:
rows → `Encoder` → `Batch` → embedding → trunk → towers → tasks.
"""

from mtl_annotated.big_tables import RowAdagrad, RowAdam
from mtl_annotated.cgc import CGC, CGCLayer
from mtl_annotated.datasets import load_adult
from mtl_annotated.esmm import ESMM
from mtl_annotated.features import (
    Batch,
    Dense,
    Encoder,
    FeatureEmbedding,
    Sequence,
    Sparse,
)
from mtl_annotated.mmoe import Experts, Gates, MMoE, MMoELayer
from mtl_annotated.ple import PLE, PLELayer
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
    "CGC",
    "ESMM",
    "METRICS",
    "MLP",
    "PLE",
    "Batch",
    "CGCLayer",
    "Dense",
    "Encoder",
    "Experts",
    "FeatureEmbedding",
    "Gates",
    "History",
    "MMoE",
    "MMoELayer",
    "PLELayer",
    "Ranker",
    "Replicas",
    "RowAdagrad",
    "RowAdam",
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
