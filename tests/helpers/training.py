"""A tiny trainer on a repeated text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from illada.config import ModelConfig
from illada.model import Model
from illada.training.config import TrainConfig
from illada.training.data import Windows
from illada.training.trainer import Trainer

STREAM = np.frombuffer(("def f(x):\n    return x + 1\n" * 40).encode(), np.uint8).astype(np.int64)


def trainer(folder: Path | None = None, steps: int = 12, identity: str = "", **changes) -> Trainer:
    more = {name: changes.pop(name) for name in ("held_out", "workers", "tensorboard") if name in changes}
    config = TrainConfig(**{"objective": "block", "steps": steps, "length": 16, "batch_size": 2, **changes})
    shape = ModelConfig.preset(
        "demo",
        dim=16,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=32,
        vocab_size=259,
        mask_id=256,
        eos_id=257,
        pad_id=258,
        causal_block=4 if config.objective == "block" else 0,
    )
    torch.manual_seed(0)
    source = Windows(STREAM, config.length, config.batch_size, config.seed)
    return Trainer(Model(shape), source, config, folder, identity, **more)
