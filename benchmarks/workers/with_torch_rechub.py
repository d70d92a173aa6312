"""torch-rechub, through `MTLTrainer` and its own loaders.

`MTLTrainer.fit` always ends an epoch with a scored validation set and always writes a
file; it is given the training loader and `train_one_epoch` is called, which is what
`fit` calls for the training rows.
"""

from __future__ import annotations

import numpy as np
import protocol
from on_torch import OnTorch
from torch.utils.data import DataLoader
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import ESMM, MMOE, PLE, SharedBottom
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator, PredictDataset


class TorchRechub(OnTorch):
    def build(self, model, sizes, setting):
        self.begin(setting)
        rows = zip(self.arrays.sparse, self.arrays.table_rows, strict=True)
        sparse = [SparseFeature(name, n, self.arrays.width) for name, n in rows]
        dense = [DenseFeature(name) for name in self.arrays.dense]
        # A dictionary each: the library keeps and reads the ones that it is given.
        towers = [{"dims": sizes["tower_units"]} for _ in self.arrays.tasks]
        kinds = ["classification"] * 2
        self.inputs = self.arrays.columns("train")
        self.both = self.arrays.columns("train", "test")
        self.labels = self.arrays.labels()
        self.esmm = model == "ESMM"
        if self.esmm:
            # Its ESMM takes columns of ids alone, in two groups, and three labels:
            # the first, of the conversion after a click, does not enter the loss.
            network = ESMM(sparse[:4], sparse[4:], *towers)
            kinds = ["classification"] * 3
            self.labels = self.labels[:, [1, 0, 1]]
            for columns in (self.inputs, self.both):
                for name in self.arrays.dense:
                    del columns[name]
        elif model == "SharedBottom":
            bottom = {"dims": sizes["bottom_units"]}
            network = SharedBottom(sparse + dense, kinds, bottom, towers)
        elif model == "MMoE":
            expert = {"dims": sizes["expert_units"]}
            network = MMOE(sparse + dense, kinds, sizes["experts"], expert, towers)
        else:
            network = PLE(
                sparse + dense,
                kinds,
                sizes.get("levels", 1),
                sizes["own_experts"],
                sizes["shared_experts"],
                {"dims": sizes["expert_units"]},
                towers,
            )
        adam = {"lr": 1e-3, "fused": setting.get("fused", False)}
        self.trainer = MTLTrainer(network, kinds, optimizer_params=adam, n_epoch=1)

    def train(self, epochs, rows):
        inputs = {name: values[:rows] for name, values in self.inputs.items()}
        labels = self.labels[:rows]
        # Rows of validation and test are asked for and not read.
        loader, *_ = DataGenerator(inputs, labels).generate_dataloader(
            x_val=inputs,
            y_val=labels,
            x_test=inputs,
            y_test=labels,
            batch_size=self.batch_size,
            num_workers=self.workers,
        )
        for _ in range(epochs):
            self.trainer.train_one_epoch(loader)
        return epochs * len(labels)

    def predict(self, halves, rows):
        inputs = self.both
        if len(halves) == 1:
            inputs = self.arrays.columns(*halves)
            inputs = {name: inputs[name] for name in self.both}
        inputs = {name: values[:rows] for name, values in inputs.items()}
        loader = DataLoader(
            PredictDataset(inputs),
            batch_size=self.batch_size,
            num_workers=self.workers,
        )
        found = np.array(self.trainer.predict(self.trainer.model, loader))
        return found[:, [1, 2]] if self.esmm else found


if __name__ == "__main__":
    protocol.serve(TorchRechub)
