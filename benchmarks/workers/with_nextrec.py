"""NextRec, through its models' own `fit` and `predict`."""

from __future__ import annotations

import os

import protocol

# It writes a log in every call of `fit`: into the working folder.
os.environ["NEXTREC_LOG_DIR"] = "logs"

from nextrec.basic.callback import CheckpointSaver
from nextrec.basic.features import DenseFeature, SparseFeature
from nextrec.models.multitask import ESMM, MMOE, PLE, ShareBottom
from on_torch import OnTorch

# A number of epochs that no training has.
NEVER = 10**9


class NextRec(OnTorch):
    def build(self, model, sizes, setting):
        self.begin(setting)
        rows = zip(self.arrays.sparse, self.arrays.table_rows, strict=True)
        tower = {"hidden_dims": sizes["tower_units"]}
        common = {
            "sparse_features": [
                SparseFeature(name, vocab_size=n, embedding_dim=self.arrays.width)
                for name, n in rows
            ],
            "dense_features": [DenseFeature(name) for name in self.arrays.dense],
            "sequence_features": [],
            "target": self.arrays.tasks,
            "task": ["binary", "binary"],
        }
        if model == "ESMM":
            self.model = ESMM(ctr_mlp_params=tower, cvr_mlp_params=tower, **common)
        else:
            common["tower_mlp_params_list"] = [tower, tower]
        if model == "SharedBottom":
            bottom = {"hidden_dims": sizes["bottom_units"]}
            self.model = ShareBottom(bottom_mlp_params=bottom, **common)
        elif model == "MMoE":
            expert = {"hidden_dims": sizes["expert_units"]}
            self.model = MMOE(
                expert_mlp_params=expert, num_experts=sizes["experts"], **common
            )
        elif model in ("CGC", "PLE"):
            expert = {"hidden_dims": sizes["expert_units"]}
            self.model = PLE(
                shared_expert_mlp_params=expert,
                specific_expert_mlp_params=[expert, expert],
                num_shared_experts=sizes["shared_experts"],
                num_specific_experts=sizes["own_experts"],
                num_levels=sizes.get("levels", 1),
                **common,
            )
        self.model.compile(
            optimizer="adam",
            optimizer_params={"lr": 1e-3, "fused": setting.get("fused", False)},
            loss=["bce", "bce"],
            ignore_label=None,
        )
        # It clips the norm of all gradients at 1, unless there is no such number.
        self.model.max_gradient_norm = None
        # It writes two files an epoch, unless there is a saver that has other plans.
        saver = CheckpointSaver(
            self.model.best_path, self.model.checkpoint_path, save_freq=NEVER
        )
        self.model.callbacks.append(saver)
        labels = self.arrays.labels().T
        self.inputs = self.arrays.columns("train")
        self.inputs |= dict(zip(self.arrays.tasks, labels, strict=True))
        self.both = self.arrays.columns("train", "test")

    def train(self, epochs, rows):
        inputs = {name: values[:rows] for name, values in self.inputs.items()}
        self.model.fit(
            inputs,
            # Metrics of the training rows cannot be turned off; this one is cheap.
            metrics=["accuracy"],
            epochs=epochs,
            batch_size=self.batch_size,
            early_stop_patience=0,
            num_workers=self.workers,
            use_tensorboard=False,
            summary_sections=[],
        )
        return epochs * len(inputs[self.arrays.tasks[0]])

    def predict(self, halves, rows):
        inputs = self.both if len(halves) == 2 else self.arrays.columns(*halves)
        return self.model.predict(
            {name: values[:rows] for name, values in inputs.items()},
            batch_size=self.batch_size,
            return_dataframe=False,
            num_workers=self.workers,
        )


if __name__ == "__main__":
    protocol.serve(NextRec)
