"""The same networks written plainly, trained by a plain loop; see benchmarks/plain.py."""

from __future__ import annotations

import ours
import protocol

from benchmarks import plain


class Loop(ours.Ours):
    def build(self, model, sizes, setting):
        super().build(model, sizes, setting)
        self.fused = setting.get("fused", False)
        self.plain = plain.copy_of(self.model, model, sizes, self.encoder)

    def train(self, epochs, rows):
        batch = self.rows(("train",), rows)
        options = {"epochs": epochs, "seed": self.seed, "fused": self.fused}
        plain.fit(self.plain, batch, self.batch_size, **options)
        return epochs * len(batch)

    def predict(self, halves, rows):
        batch = self.both[:rows] if len(halves) == 2 else self.rows(halves, rows)
        return plain.predict(self.plain, batch, self.batch_size).numpy()


if __name__ == "__main__":
    protocol.serve(Loop)
