"""DeepCTR-Torch, through its models' own `fit` and `predict`."""

from __future__ import annotations

import deepctr_networks
import protocol
import torch
from deepctr_torch import inputs as features
from deepctr_torch.models import multitask
from on_torch import OnTorch


class DeepCTRTorch(OnTorch):
    # Its `fit` makes its own loader, without processes.
    loaders = (0,)

    def build(self, model, sizes, setting):
        self.begin(setting)
        self.model = deepctr_networks.network(
            multitask,
            features,
            self.arrays,
            model,
            sizes,
            l2_reg_linear=0,
            seed=self.seed,
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
