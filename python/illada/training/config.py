"""TrainConfig: how to train, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import registry


@dataclass(frozen=True)
class TrainConfig:
    """Says how to train. Raises ValueError for settings that contradict each other.

    Parameters
    ----------
    objective : str
        A name in `registry.OBJECTIVES`.
    options : mapping
        Of the objective, as its entry there lists them; those that are left out have its defaults. "block" is the
        model's causal_block where it is left out.
    pairs : bool
        The data are prompts with answers, of which answers alone are learned. Objective "sft" needs them.
    cut : bool
        Of `pairs` and trajectories: an answer that is too long for the window is cut at its end, otherwise refused.
    steps, seconds : int, float
        Length of the run and of its learning-rate schedule; exactly one of them.
    length, batch_size : int
        Tokens in a window, windows in a step.
    accumulate : int
        Micro-batches a step, at most batch_size. The loss is divided by the whole step's tokens, so this changes the
        memory, and a sum's rounding, alone.
    lora : int, optional
        Rank of adapters (`lora.add`), which alone are trained.
    eval_every : int, optional
        Steps between two measurements of the loss on held-out data, `eval_batches` batches that stay the same.
    eval_batches : int
    compile : bool
        Compile the layers (`optim.compile_layers`).
    checkpoint_activations : bool
        Keep only the layers' inputs for the backward, which computes the rest again.
    optimizer : str
        "muon": lr for matrices, adamw_lr for the rest. "adamw": lr for all.
    lr, adamw_lr, weight_decay : float
    warmup : float
        Share of the run in which the learning rate rises linearly; then it falls linearly to zero.
    clip : float
        Largest norm of the gradient of the parameters that AdamW updates.
    dtype : str
        "float32", or "bfloat16" to compute under autocast; weights stay float32.
    seed : int
    """

    objective: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: bool = False
    cut: bool = False
    steps: int | None = None
    seconds: float | None = None
    length: int = 128
    batch_size: int = 8
    accumulate: int = 1
    lora: int | None = None
    eval_every: int | None = None
    eval_batches: int = 8
    compile: bool = False
    checkpoint_activations: bool = False
    optimizer: str = "muon"
    lr: float = 0.02
    adamw_lr: float = 0.004
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", registry.checked(self.objective, self.options))
        answers = registry.OBJECTIVES[self.objective].answers
        if self.pairs and answers == "recorded":
            raise ValueError(f"pairs: {self.objective} reads trajectories, which hold prompts; leave out --pairs")
        object.__setattr__(self, "pairs", self.pairs or answers == "must")
        if self.pairs and (answers == "no" or self.options.get("hole_fraction")):
            others = ", ".join(name for name, entry in registry.OBJECTIVES.items() if entry.answers in ("may", "must"))
            raise ValueError(
                f"pairs: expected an objective among {others}, without hole_fraction, got {self.objective}"
            )
        if self.cut and not (self.pairs or answers == "recorded"):
            raise ValueError("cut: it is for pairs of prompt and response, and trajectories, only; leave out --cut")
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"steps, seconds: expected one of them, got {self.steps} and {self.seconds}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        for name in ("steps", "length", "batch_size", "accumulate", "seed", "lora", "eval_every", "eval_batches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
        numbers = ("steps", "seconds", "length", "batch_size", "accumulate", "lr", "adamw_lr", "clip")
        for name in (*numbers, "lora", "eval_every", "eval_batches"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 3.4e38:  # float32's largest
                raise ValueError(f"{name}: expected a positive number up to 3.4e38, got {value}")
        if self.lora is not None and self.optimizer != "adamw":
            raise ValueError(f"lora: expected optimizer 'adamw', got {self.optimizer!r}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: expected at most batch_size = {self.batch_size}, got {self.accumulate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a number from 0 to below 1, got {self.warmup}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: expected a finite number of at least 0, got {self.weight_decay}")
        if "edits_from" in self.options and self.steps is None:
            raise ValueError(f"seconds: expected steps for {self.objective}, whose edits begin at a share of the run")

    def flat(self) -> dict[str, Any]:
        """Returns all settings by name, those of the objective among them."""
        settings = dataclasses.asdict(self)
        return {**settings, **settings.pop("options")}

    def rate(self, done: float) -> float:
        """Returns the factor on the learning rates when `done` (0 .. 1) of the run is over."""
        return min(1.0, done / self.warmup if self.warmup > 0 else 1.0, max(0.0, (1 - done) / (1 - self.warmup)))
