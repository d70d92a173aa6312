"""DeepCTR on TensorFlow, through Keras' own `fit` and `predict`."""

from __future__ import annotations

import os

import numpy as np
import protocol

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf
from deepctr.feature_column import DenseFeat, SparseFeat
from deepctr.models import ESMM, MMOE, PLE, SharedBottom


class DeepCTR(protocol.Library):
    def __init__(self, arrays, threads):
        super().__init__(arrays, threads)
        # Fixed once TensorFlow runs: other numbers need another process.
        threads = int(os.environ.get("TF_NUM_INTRAOP_THREADS", threads))
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)

    def settings(self, suite):
        # How many batches a call of the compiled function goes through.
        return [[{"steps_per_execution": n} for n in (1, 16)]]

    def build(self, model, sizes, setting):
        tf.keras.utils.set_random_seed(self.seed)
        rows = zip(self.arrays.sparse, self.arrays.table_rows, strict=True)
        columns = [SparseFeat(name, count, self.arrays.width) for name, count in rows]
        columns += [DenseFeat(name, 1) for name in self.arrays.dense]
        common = {
            "tower_dnn_hidden_units": tuple(sizes["tower_units"]),
            "l2_reg_embedding": 0,
            # Its layers take their start from this number, all experts the same one.
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
        adam = tf.keras.optimizers.Adam(learning_rate=1e-3)
        self.model.compile(
            adam,
            loss=["binary_crossentropy"] * 2,
            steps_per_execution=setting.get("steps_per_execution", 1),
        )
        # Its inputs are declared as int32; others are converted in every batch.
        self.inputs = self.arrays.columns("train", ids=np.int32)
        labels = self.arrays.labels()
        self.labels = [np.ascontiguousarray(labels[:, n]) for n in range(2)]
        self.both = self.arrays.columns("train", "test", ids=np.int32)

    def train(self, epochs, rows):
        inputs = {name: values[:rows] for name, values in self.inputs.items()}
        labels = [each[:rows] for each in self.labels]
        self.model.fit(
            inputs, labels, batch_size=self.batch_size, epochs=epochs, verbose=0
        )
        return epochs * len(labels[0])

    def predict(self, halves, rows):
        inputs = (
            self.both
            if len(halves) == 2
            else self.arrays.columns(*halves, ids=np.int32)
        )
        inputs = {name: values[:rows] for name, values in inputs.items()}
        found = self.model.predict(inputs, batch_size=self.batch_size, verbose=0)
        return np.concatenate(found, axis=1)


if __name__ == "__main__":
    protocol.serve(DeepCTR)
