"""Small tasks with answers that can be checked, and a tiny model that learns one from generated examples in a minute.

sort    eight digits -> the same digits in order. The prompt decides every token, so many can be written at once.
either  eight digits -> the same digits, rising or falling. Either is right, but tokens written in one pass do not know
        of each other: a rule that writes several before the direction is settled mixes the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from illada.config import ModelConfig
from illada.model import Model
from illada.training.objectives import sft
from illada.training.optim import optimizers
from torch import Tensor

# Ids 0 .. 9 are digits.
ARROW, END, MASK = range(10, 13)


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    n_layers: int
    steps: int  # of training, after which at least 95% of the answers are right
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # -> prompts (n, P), one right answer each (n, A)
    right: Callable[[Tensor, Tensor], Tensor]  # prompts, answers -> bool (n,)


def _draw_digits(n: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    digits = torch.randint(0, 10, (n, count), generator=generator)
    return torch.cat([digits, torch.full((n, 1), ARROW)], 1), digits


def sort(count: int, steps: int) -> Task:
    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        prompts, digits = _draw_digits(n, count, generator)
        return prompts, digits.sort(1).values

    def right(prompts: Tensor, answers: Tensor) -> Tensor:
        return (answers == prompts[:, :-1].sort(1).values).all(1)

    return Task("sort", f"{count} digits in order", 2, steps, draw, right)


def either(count: int, steps: int) -> Task:
    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        prompts, digits = _draw_digits(n, count, generator)
        up, falling = digits.sort(1).values, torch.rand(n, 1, generator=generator) < 0.5
        return prompts, torch.where(falling, up.flip(1), up)

    def right(prompts: Tensor, answers: Tensor) -> Tensor:
        up = prompts[:, :-1].sort(1).values
        return (answers == up).all(1) | (answers == up.flip(1)).all(1)

    return Task("either", f"{count} digits, rising or falling", 3, steps, draw, right)


TASKS = {"sort": sort(8, steps=500), "either": either(8, steps=800)}


def config(task: Task, ffn_dim: int = 240) -> ModelConfig:
    return ModelConfig(
        dim=96,
        n_layers=task.n_layers,
        n_heads=4,
        n_kv_heads=4,
        head_dim=24,
        ffn_dim=ffn_dim,
        vocab_size=16,
        tie_embeddings=True,
        rope_theta=100.0,
        max_seq_len=64,
        mask_id=MASK,
        eos_id=END,
    )


def train(
    task: Task,
    *,
    steps: int | None = None,
    batch: int = 128,
    seed: int = 0,
    ffn_dim: int = 240,
    report: Callable[[int, float], object] | None = None,
) -> Model:
    """Trains: the same seed gives the same model on the same machine. Muon, with a linear warm-up and, from half way,
    decay."""
    steps = task.steps if steps is None else steps
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(config(task, ffn_dim)).train()
    steppers = optimizers(model, "muon", lr=0.03, adamw_lr=0.01)
    groups = [group for stepper in steppers for group in stepper.param_groups]
    rates = [group["lr"] for group in groups]
    for step in range(steps):
        prompts, answers = task.draw(batch, generator)
        lengths = torch.full((batch,), prompts.shape[1])
        loss = sft(torch.cat([prompts, answers], 1), lengths, MASK, generator).loss(model)
        loss.backward()
        scale = min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        for group, rate in zip(groups, rates):
            group["lr"] = rate * scale
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if report is not None:
            report(step, loss.item())
    return model.eval()
