"""DiffusionGemma's sampler: a canvas of random tokens, of which each pass keeps the sure ones and redraws the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import Renoise

from ..errors import PromptError
from ..model import Model
from .cache import Cache
from .config import GenerationConfig
from .generation import Generation, ask, until_stop
from .loop import Step, check_filled
from .replay import LateFlag
from .settings import NO_LOOP, refuse, seeds_of
from .speculation import up_to

_OPTIONS = {"cold": 0.4, "hot": 0.8, "bound": 0.1, "calm": 0.005}


def check(config: GenerationConfig) -> None:
    """Raises PromptError for settings that a canvas has no use for."""
    refuse(config, (*NO_LOOP, "logit_bias"))
    for name in ("temperature", "guidance", "rank_temperature"):
        if getattr(config, name) != 0:
            raise PromptError(f"{name}: expected 0 with sampler 'canvas'; its temperatures are sampler options")
    for name, value in config.sampler_options.items():
        if name not in _OPTIONS or not 0 <= value < float("inf"):
            raise PromptError(
                f"sampler_options: expected numbers of at least 0 for some of {', '.join(_OPTIONS)}, "
                f"got {name} = {value!r}"
            )


class Canvas:
    """Fills canvases of K tokens behind the known ones, each in at most `steps_per_block` passes (48).

    After transformers' models/diffusion_gemma. With n = N .. 1 passes to go, tokens are drawn at temperature cold +
    (hot - cold) n / N; those of least entropy are kept while the sum of the entropies before them is at most `bound`,
    the others are redrawn uniformly. It ends early where the argmax of all rows repeats and their mean entropy is below
    `calm`; what it writes is that argmax. Known tokens are causal.
    """

    def __init__(self, model: Model, rows: list[list[int]], config: GenerationConfig, options: Mapping[str, Any]):
        for b, row in enumerate(rows):
            if not row:
                raise PromptError(f"prompt {b}: expected a token at least, for a canvas continues the last one")
        self.model, self.config, self.device = model, config, model.device
        self.options = {**_OPTIONS, **options}
        self.length, self.steps = min(config.block_length or 32, config.max_new_tokens), config.steps_per_block or 48
        self.count = -(-config.max_new_tokens // self.length)
        longest = max(map(len, rows))
        self.columns = longest + self.count * self.length
        mask = model.config.mask_id
        table = [row + [mask] * (self.columns - len(row)) for row in rows]
        self.tokens = torch.tensor(table, dtype=torch.int64, device=self.device)
        self.known = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=self.device)
        self.seeds = seeds_of(config.seed, len(rows))
        self.seed_of_row = torch.tensor(self.seeds, dtype=torch.int64, device=self.device)
        self.cache = Cache(model.config, len(rows), self.columns, device=self.device, dtype=model.dtype)
        causal = up_to(torch.arange(1, longest + 1, device=self.device)[None], self.columns)
        model(self.tokens[:, :longest], causal, None, self.cache.at(0))
        self.passes = 1

    def fill(self, index: int, callback: Callable[[Step], object] | None) -> Tensor:
        """Fills canvas `index` of every sequence; returns the passes that each took."""
        batch, k, flag = len(self.seeds), self.length, LateFlag(self.device)
        shown, best = self._uniform(index), torch.full((batch, k), -1, device=self.device)
        calm = torch.zeros(batch, dtype=torch.bool, device=self.device)
        took = torch.zeros(batch, dtype=torch.int64, device=self.device)
        at = self.known[:, None] - 1 + torch.arange(k + 1, device=self.device)  # the last known token and the canvas
        last = self.tokens.gather(1, at[:, :1])
        for step in range(self.steps):
            hidden = self._hidden(torch.cat([last, shown], 1), at)
            kept, argmax, entropy = self._renoise(hidden, shown, index * self.steps + step, self.steps - step)
            repeats = (argmax == best).all(1) & (entropy.mean(1) < self.options["calm"])
            best = torch.where(calm[:, None], best, argmax)
            took += ~calm
            calm = calm | repeats
            self.passes += 1
            self.tokens.scatter_(1, at[:, 1:], best)
            flag.write(calm.all())
            if callback is not None:
                where = (self.tokens, [0] * batch, index, step, at[:, 1:])
                callback(Step(*where, kept, -entropy, self.passes))
            if step + 1 < self.steps and flag.read():
                break
        self.model(best, up_to(at[:, 1:] + 1, self.columns), at[:, 1:], self.cache.at(self.known), shift=False)
        self.passes += 1
        self.known = self.known + k
        return took

    def _hidden(self, window: Tensor, at: Tensor) -> Tensor:
        """Returns the canvas's rows. The last known token goes along, for it predicts the next in a shifted model."""
        high = torch.where(at < self.known[:, None], at + 1, (self.known + self.length)[:, None])
        return self.model(window, up_to(high, self.columns), at, self.cache.at(self.known - 1))[:, 1:]

    def _renoise(self, hidden: Tensor, shown: Tensor, step: int, to_go: int) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the next canvas into shown (B, K); returns what is kept, the argmax and the entropies in nats."""
        cold, hot, c = self.options["cold"], self.options["hot"], self.model.config
        heat = cold + (hot - cold) * to_go / self.steps
        places = torch.arange(self.length, device=self.device).expand(len(hidden), -1)
        options: dict[str, Any] = {"mask_id": c.mask_id, "forbid": self.config.forbid, "step": step}
        options["seed"] = self.seed_of_row
        options |= {"confidence": "neg_entropy", "confidence_temperature": heat or 1.0, "temperature": heat}
        options |= {name: getattr(self.config, name) for name in ("top_k", "top_p", "min_p")}
        rule = Renoise(self.options["bound"])
        out = illada_kernels.unmask(hidden, self.model.head_weight, shown, places, rule, **options)
        argmax = torch.where(out.proposal < 0, c.mask_id, out.proposal)  # a row of NaN has none
        return out.committed, argmax, -out.confidence

    def _uniform(self, index: int) -> Tensor:
        """Returns ids (B, K), uniform without the mask; a sequence's do not depend on the others."""
        c = self.model.config
        noise = [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for seed in self.seeds]
        ids = torch.stack([torch.randint(c.vocab_size - 1, (self.length,), generator=g, device="cpu") for g in noise])
        return (ids + (ids >= c.mask_id)).to(self.device, non_blocking=True)


def paint(
    model: Model,
    rows: list[list[int]],
    config: GenerationConfig,
    options: Mapping[str, Any],
    stop_ids: tuple[int, ...],
    callback: Callable[[Step], object] | None,
) -> Generation:
    """Continues prompts canvas by canvas."""
    if not rows:
        return Generation([], [], [], [], 0)
    canvas = Canvas(model, rows, config, options)
    passes = [0] * len(rows)
    running, ended = [True] * len(rows), [False] * len(rows)
    begin = [len(row) for row in rows]
    end = torch.tensor(begin, device=model.device) + config.max_new_tokens
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=model.device)
    filled = [0] * len(rows)
    for index in range(canvas.count):
        took = canvas.fill(index, callback).tolist()
        passes = [p + t if on else p for p, t, on in zip(passes, took, running)]
        filled = [f + canvas.length if on else f for f, on in zip(filled, running)]
        found = torch.isin(canvas.tokens, stops)
        column = torch.arange(canvas.columns, device=model.device)
        new = (column >= (canvas.known - canvas.length)[:, None]) & (column < canvas.known[:, None])
        running = [on and not stop for on, stop in zip(running, (found & new).any(1).tolist())]
        if config.stop_when is not None:
            held = ask(config.stop_when, running, canvas.tokens, begin, torch.minimum(canvas.known, end))
            ended = [a or b for a, b in zip(ended, held)]
            running = [on and not stop for on, stop in zip(running, held)]
        if not any(running):
            break
    filled = [min(f, config.max_new_tokens) for f in filled]
    table = zip(canvas.tokens.tolist(), rows, filled)
    new_tokens = [row[len(prompt) : len(prompt) + count] for row, prompt, count in table]
    texts, stopped = until_stop(new_tokens, stop_ids, ended)
    check_filled(texts, model.config)
    return Generation(texts, stopped, passes, filled, canvas.passes)
