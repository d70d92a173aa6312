"""DeepCTR on TensorFlow, through Keras' own `fit` and `predict`."""

from __future__ import annotations

import os

import deepctr_networks
import numpy as np
import protocol

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf
from deepctr import feature_column, models


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
        self.model = deepctr_networks.network(
            models,
            feature_column,
            self.arrays,
            model,
            sizes,
            # Its layers take their start from this number, all experts the same one.
            seed=self.seed,
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
