"""DeepCTR-Torch, through its models' own `fit` and `predict`."""

from __future__ import annotations

import protocol
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models.multitask import ESMM, MMOE, PLE, SharedBottom


class DeepCTRTorch(protocol.Library):
    def settings(self, suite):
        # Its `fit` makes its own loader, without processes.
        return protocol.on_torch(self.threads, suite, workers=(0,))

    def ready(self):
        torch.set_num_threads(self.own_threads)

    def build(self, model, sizes, setting):
        self.own_threads = setting.get("threads", self.threads)
        rows = zip(self.arrays.sparse, self.arrays.table_rows, strict=True)
        columns = [SparseFeat(name, count, self.arrays.width) for name, count in rows]
        columns += [DenseFeat(name, 1) for name in self.arrays.dense]
        common = {
            "tower_dnn_hidden_units": tuple(sizes["tower_units"]),
            "l2_reg_linear": 0,
            "l2_reg_embedding": 0,
            "seed": self.seed,
            "task_types": ("binary", "binary"),
            "task_names": tuple(self.arrays.tasks),
        }
        if "expert_units" in sizes:
            common["expert_dnn_hidden_units"] = tuple(sizes["expert_units"])
            common["gate_dnn_hidden_units"] = tuple(sizes["gate_units"])
        if model == "SharedBottom":
            bottom = tuple(sizes["bottom_units"])
            self.model = SharedBottom(columns, bottom_dnn_hidden_units=bottom, **common)
        elif model == "ESMM":
            self.model = ESMM(columns, **common)
        elif model == "MMoE":
            self.model = MMOE(columns, num_experts=sizes["experts"], **common)
        else:
            self.model = PLE(
                columns,
                shared_expert_num=sizes["shared_experts"],
                specific_expert_num=sizes["own_experts"],
                num_levels=sizes.get("levels", 1),
                **common,
            )
        fused = setting.get("fused", False)
        adam = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=fused)
        self.model.compile(adam, loss=["binary_crossentropy"] * 2, metrics=[])
        self.inputs, self.labels = self.arrays.columns("train"), self.arrays.labels()
        self.both = self.arrays.columns("train", "test")

    def train(self, epochs, rows):
        inputs = {name: values[:rows] for name, values in self.inputs.items()}
        labels = self.labels[:rows]
        self.model.fit(
            inputs, labels, batch_size=self.batch_size, epochs=epochs, verbose=0
        )
        return epochs * len(labels)

    def predict(self, halves, rows):
        inputs = self.both if len(halves) == 2 else self.arrays.columns(*halves)
        inputs = {name: values[:rows] for name, values in inputs.items()}
        return self.model.predict(inputs, batch_size=self.batch_size)


if __name__ == "__main__":
    protocol.serve(DeepCTRTorch)
