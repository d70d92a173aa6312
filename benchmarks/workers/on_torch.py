"""What the workers of all peers on PyTorch share: what to try, and how threads are set."""

from __future__ import annotations

from typing import Any

import protocol
import torch


class OnTorch(protocol.Library):
    """A library on PyTorch. `loaders` are the numbers of loader processes to try."""

    loaders: tuple[int, ...] = (0, 2)

    def settings(self, suite: str) -> list[list[dict[str, Any]]]:
        counts = sorted({self.threads, 1}, reverse=True)
        first = [{"threads": n, "workers": w} for n in counts for w in self.loaders]
        adam = [{"fused": False}, {"fused": True}]
        return [first, adam] if suite == "train" else [first]

    def ready(self) -> None:
        torch.set_num_threads(self.own_threads)

    def begin(self, setting: dict[str, Any]) -> None:
        """What a setting decides beside the optimizer; then the seed."""
        self.own_threads = setting.get("threads", self.threads)
        self.workers = setting.get("workers", 0)
        torch.manual_seed(self.seed)
