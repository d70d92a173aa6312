"""The five networks that are timed: those of the Adult lab (book/adult.md)."""

from __future__ import annotations

from typing import Any

import mtl_annotated as mtl

EXTRACTION: dict[str, Any] = {
    "own_experts": 8,
    "shared_experts": 4,
    "expert_units": [64, 64],
    "gate_units": [16, 16],
    "tower_units": [32, 32],
}
# Plain numbers and lists: they travel as JSON to the worker of each library.
SIZES: dict[str, dict[str, Any]] = {
    "SharedBottom": {"bottom_units": [128, 128], "tower_units": [64, 32]},
    "ESMM": {"tower_units": [64, 32]},
    "MMoE": {
        "experts": 8,
        "expert_units": [64, 64],
        "gate_units": [32, 32],
        "tower_units": [32, 32],
    },
    "CGC": EXTRACTION,
    "PLE": {**EXTRACTION, "levels": 2},
}


def build(
    model: str, encoder: mtl.Encoder, sizes: dict[str, Any] | None = None
) -> mtl.Ranker:
    """One of our models, with random weights from torch's own generator.

    ESMM takes the encoder's first task as the click and the second as the conversion.
    """
    options = dict(SIZES[model] if sizes is None else sizes)
    if model == "ESMM":
        options["click"], options["conversion"] = (t.name for t in encoder.tasks)
    return getattr(mtl, model)(encoder, **options)
