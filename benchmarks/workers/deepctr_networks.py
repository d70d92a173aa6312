"""The networks of both DeepCTRs, whose constructors take the same arguments."""

from __future__ import annotations

from typing import Any

import protocol


def network(
    models: Any,
    features: Any,
    arrays: protocol.Arrays,
    model: str,
    sizes: dict[str, Any],
    **more: Any,
) -> Any:
    """A network out of the `models` of one of them, on the columns of its `features`.

    `more` are further arguments of every network.
    """
    rows = zip(arrays.sparse, arrays.table_rows, strict=True)
    columns = [features.SparseFeat(name, n, arrays.width) for name, n in rows]
    columns += [features.DenseFeat(name, 1) for name in arrays.dense]
    common = {
        "tower_dnn_hidden_units": tuple(sizes["tower_units"]),
        "l2_reg_embedding": 0,
        "task_types": ("binary", "binary"),
        "task_names": tuple(arrays.tasks),
        **more,
    }
    if "expert_units" in sizes:
        common["expert_dnn_hidden_units"] = tuple(sizes["expert_units"])
        common["gate_dnn_hidden_units"] = tuple(sizes["gate_units"])
    if model == "SharedBottom":
        bottom = tuple(sizes["bottom_units"])
        return models.SharedBottom(columns, bottom_dnn_hidden_units=bottom, **common)
    if model == "ESMM":
        return models.ESMM(columns, **common)
    if model == "MMoE":
        return models.MMOE(columns, num_experts=sizes["experts"], **common)
    return models.PLE(
        columns,
        shared_expert_num=sizes["shared_experts"],
        specific_expert_num=sizes["own_experts"],
        num_levels=sizes.get("levels", 1),
        **common,
    )
