"""Published samplers by name. Each gives the settings that make it; what it does not name stays the user's.

Compared with the published codes, each sequence of a batch has its own counts, ties go to the lowest position, and a
schedule never overwrites prompt tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illada_kernels import Edit, EntropyBound, Factor, Remask, Threshold, TopK

from ..config import ModelConfig
from ..errors import PromptError
from .config import GenerationConfig
from .schedules import Choose, OpenBlocks, Pass, Table

Settings = dict[str, Any]


def apply(config: GenerationConfig, model: ModelConfig) -> GenerationConfig:
    """Returns the settings of `config.sampler`; raises PromptError for a field or option that contradicts it."""
    name = config.sampler
    if name not in SAMPLERS:
        raise PromptError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}")
    options = list(inspect.signature(SAMPLERS[name]).parameters)[2:]
    for option, value in config.sampler_options.items():
        if option not in options:
            wanted = f"among {', '.join(options)}" if options else "none"
            raise PromptError(f"sampler_options: expected {wanted} for {name}, got {option!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise PromptError(f"sampler_options: expected a number of at least 0 for {option}, got {value!r}")
    settings = SAMPLERS[name](config, model, **config.sampler_options)
    for key, value in settings.items():
        given, default = getattr(config, key), getattr(GenerationConfig, key)
        if key in ("steps", "steps_per_block"):  # it has gone into the rule
            continue
        if given is not default and given != default and given != value:
            to = "" if callable(value) else f" to {value!r}"
            raise PromptError(f"{key}: expected none with sampler {name!r}, which sets it{to}; leave out one")
    return dataclasses.replace(config, sampler=None, sampler_options={}, **settings)


def llada(config: GenerationConfig, model: ModelConfig) -> Settings:
    """LLaDA's generate.py: all masks are there from the start, blocks are filled in turn, counts are even."""
    return {"variable_length": False, "block_length": config.block_length or config.max_new_tokens}


def illada(config: GenerationConfig, model: ModelConfig) -> Settings:
    """iLLaDA (arXiv 2606.25331): a block of masks is appended when the text before it is full, until a stop token."""
    return {"variable_length": True, "block_length": config.block_length or min(32, config.max_new_tokens)}


# ---- Dream (DreamLM/Dream, generation_utils.py) ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DreamCounts:
    """k = int(masks left * (1 - s / t)), in float32; all in the last pass. A pass may commit none."""

    any_batch = True

    share: Table  # 1 - s / t of each pass

    @property
    def passes(self) -> int:
        return len(self.share)

    def __call__(self, now: Pass) -> TopK:
        k = (now.left.float() * self.share.at(now)).long()
        return TopK(torch.where(now.step + 1 < self.passes, k, now.left))


@dataclass(frozen=True, eq=False)
class DreamOrigin:
    """Each mask falls with probability 1 - s / t, in the last pass with 1."""

    any_batch = True

    share: Table

    @property
    def passes(self) -> int:
        return len(self.share)

    def __call__(self, now: Pass) -> Threshold:
        return falls(now, self.share, self.passes)


def falls(now: Pass, share: Table, passes: int) -> Threshold:
    """Commits each candidate with probability `share`, under confidence="random"; all in the last pass."""
    return Threshold(torch.where(now.step + 1 < passes, 1 - share.at(now), 0.0), at_least=0)


def _dream(config: GenerationConfig, eps: float, confidence: str, schedule: Callable[[Table], Any]) -> Settings:
    steps = config.steps or 512
    t = torch.linspace(1, eps, steps + 1, device="cpu", dtype=torch.float32)
    hot = isinstance(config.temperature, Tensor) or config.temperature > 0
    return {
        "rule": schedule(Table(1 - t[1:] / t[:-1])),
        "confidence": confidence,
        "confidence_temperature": config.temperature if hot else 1.0,
        "variable_length": False,
        "block_length": config.max_new_tokens,
        "steps": None,
    }


def dream_origin(config: GenerationConfig, model: ModelConfig, eps: float = 1e-3) -> Settings:
    """Dream's alg="origin": positions fall at random."""
    return _dream(config, eps, "random", DreamOrigin)


def dream_maskgit_plus(config: GenerationConfig, model: ModelConfig, eps: float = 1e-3) -> Settings:
    """Dream's alg="maskgit_plus": by the probability of the proposal, under the distribution it is drawn from."""
    return _dream(config, eps, "probability", DreamCounts)


def dream_topk_margin(config: GenerationConfig, model: ModelConfig, eps: float = 1e-3) -> Settings:
    """Dream's alg="topk_margin"."""
    return _dream(config, eps, "margin", DreamCounts)


def dream_entropy(config: GenerationConfig, model: ModelConfig, eps: float = 1e-3) -> Settings:
    """Dream's alg="entropy"."""
    return _dream(config, eps, "neg_entropy", DreamCounts)


# ---- SDAR (JetAstra/SDAR, generate.py) ------------------------------------------------------------------------------


def _sdar(config: GenerationConfig, model: ModelConfig, schedule: Callable[[Pass, Tensor], Any]) -> Settings:
    """Counts are spread over the block's length, whatever part of it the prompt fills."""
    block = config.block_length or model.causal_block or 4
    steps = config.steps_per_block or block
    counts = Table(torch.tensor([block // steps + (s < block % steps) for s in range(steps)], device="cpu"))
    rule = Scheduled(steps, lambda now: schedule(now, torch.where(now.step + 1 < steps, counts.at(now), now.left)))
    return {"rule": rule, "block_length": block, "steps_per_block": None}


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A schedule, or a revision, of at most `passes` passes."""

    any_batch = True

    passes: int
    rule: Callable[[Pass], Any]

    def __call__(self, now: Pass) -> Any:
        return self.rule(now)


def sdar_sequential(config: GenerationConfig, model: ModelConfig) -> Settings:
    """SDAR's remasking_strategy="sequential": from the left."""
    return {**_sdar(config, model, lambda now, k: TopK(k)), "order": "left"}


def sdar_static(config: GenerationConfig, model: ModelConfig) -> Settings:
    """SDAR's "low_confidence_static": the most confident, by count."""
    return _sdar(config, model, lambda now, k: TopK(k))


def sdar_dynamic(config: GenerationConfig, model: ModelConfig, tau: float = 0.85) -> Settings:
    """SDAR's "low_confidence_dynamic": all above tau, and by count if those are fewer."""
    return _sdar(config, model, lambda now, k: Threshold(tau, at_least=k))


def sdar_entropy_bounded(config: GenerationConfig, model: ModelConfig, bound: float = 0.35) -> Settings:
    """SDAR's "entropy_bounded": by rising entropy, while the sum is at most `bound`."""
    return {"rule": EntropyBound(bound, inclusive=True)}


# ---- Fast-dLLM, LLaDA2.1, ReMDM, d3LLM ------------------------------------------------------------------------------


def fast_dllm_threshold(config: GenerationConfig, model: ModelConfig, tau: float = 0.9) -> Settings:
    """Fast-dLLM (arXiv 2505.22618): all with a probability of at least tau, in blocks; see `cache` for its caches."""
    return {**_canvas(config, model), "rule": Threshold(tau)}


def fast_dllm_factor(config: GenerationConfig, model: ModelConfig, factor: float = 1.0) -> Settings:
    """Fast-dLLM's factor: the longest prefix of ranks with a probability of at least 1 - factor / (rank + 1)."""
    return {**_canvas(config, model), "rule": Factor(factor)}


def block_length_of(config: GenerationConfig, model: ModelConfig) -> int:
    """Returns the block length that is set, the model's, or 32."""
    return config.block_length or model.causal_block or min(32, config.max_new_tokens)


def _canvas(config: GenerationConfig, model: ModelConfig) -> Settings:
    return {"variable_length": False, "block_length": block_length_of(config, model)}


def llada21(config: GenerationConfig, model: ModelConfig, tau: float = 0.95, edit: float = 0.9) -> Settings:
    """LLaDA2.1: all above tau; committed tokens are replaced above `edit`, until 16 passes after the block is full."""
    return {"rule": Threshold(tau), "revise": Edit(edit), "block_length": block_length_of(config, model)}


def remdm(config: GenerationConfig, model: ModelConfig, eta: float = 0.02) -> Settings:
    """ReMDM-cap (arXiv 2503.00307): sigma = min(eta, (1 - a_s) / a_t), a = 1 - t. See `_remdm`."""
    shown = _even(config.steps or config.max_new_tokens)
    return _remdm(config, shown, torch.full_like(shown[1:], eta))


def remdm_rescale(config: GenerationConfig, model: ModelConfig, eta: float = 0.02) -> Settings:
    """ReMDM-rescale: sigma = eta min(1, (1 - a_s) / a_t)."""
    shown = _even(config.steps or config.max_new_tokens)
    return _remdm(config, shown, eta * _most_sigma(shown).clamp(max=1))


def remdm_loop(
    config: GenerationConfig,
    model: ModelConfig,
    eta: float = 0.02,
    begin: float = 0.55,
    end: float = 0.05,
    shown: float = 0.9,
) -> Settings:
    """ReMDM-loop: MDLM until the share `shown` is there at time t = `begin`, then sigma = eta and that share is kept,
    from t = `end` on MDLM again. A pass across `begin` or `end` goes to the share of its end by MDLM; in the authors'
    code it would go on as it began, and with few passes show all tokens at once."""
    if not 0 <= end < begin <= 1 or not shown <= 1:
        raise PromptError(
            f"sampler_options: expected 0 <= end < begin <= 1 and shown <= 1, got {end}, {begin}, {shown}"
        )
    time = 1 - _even(config.steps or config.max_new_tokens)
    first, last = shown * (1 - time) / max(1 - begin, 1e-9), 1 - (1 - shown) * time / max(end, 1e-9)
    share = torch.where(time >= begin, first, torch.where(time > end, shown, last))
    loop = (time[1:] >= end) & (time[:-1] <= begin)
    return _remdm(config, share, torch.where(loop, eta, 0.0))


def _even(steps: int) -> Tensor:
    return torch.arange(steps + 1, device="cpu", dtype=torch.float64) / steps


def _most_sigma(a: Tensor) -> Tensor:
    """Returns (1 - a_s) / a_t: with more, masks would fall with a probability above 1."""
    return (1 - a[1:]) / a[:-1]


def _remdm(config: GenerationConfig, a: Tensor, sigma: Tensor) -> Settings:
    """Goes from a share `a` of shown tokens to the next, in as many passes: tokens go back with probability sigma,
    masks fall with probability (a_s - (1 - sigma) a_t) / (1 - a_t). `a` begins with 0 and ends with 1."""
    sigma, steps = torch.minimum(sigma, _most_sigma(a)), len(sigma)
    back, fall = Table(sigma.float()), Table(((a[1:] - (1 - sigma) * a[:-1]) / (1 - a[:-1])).float())
    return {
        "rule": Scheduled(steps, lambda now: falls(now, fall, steps)),
        "confidence": "random",
        **_taking_back(config, steps, back.at),
    }


def _taking_back(config: GenerationConfig, steps: int, probability: Callable[[Pass], Tensor]) -> Settings:
    """Takes tokens back with `probability`, () or (B, K), in all passes but the last."""

    def revision(now: Pass) -> Remask:
        scores = torch.where(now.uniform() < probability(now), 0.0, torch.nan)
        return Remask(now.candidates.shape[1], scores)

    return {
        "revise": Scheduled(steps, revision),
        "revise_steps": steps - 1,
        "variable_length": False,
        "block_length": config.max_new_tokens,
        "steps": None,
    }


def remdm_conf(config: GenerationConfig, model: ModelConfig) -> Settings:
    """ReMDM-conf: tokens go back with probability sigma_i = eta_i min(1, (1 - a_s) / a_t), where eta is the softmax,
    over the tokens that are there, of minus the probability that each had when it was committed."""
    shown = _even(config.steps or config.max_new_tokens)
    steps, most = len(shown) - 1, Table(_most_sigma(shown).clamp(max=1).float())
    fall = Table(((shown[1:] - shown[:-1]) / (1 - shown[:-1])).float())

    def sigma(now: Pass) -> Tensor:
        there = (now.candidates >= 0) & ~now.is_masked
        eta = torch.where(there, -now.sure, -torch.inf).softmax(1)
        return torch.where(there, eta * most.at(now), 0.0)

    def falling(now: Pass) -> Choose:
        u, least = now.uniform(0), torch.where(now.step + 1 < steps, 1 - fall.at(now), 0.0)
        return Choose(lambda proposal, confidence: u >= least)

    return {"rule": Scheduled(steps, falling), **_taking_back(config, steps, sigma)}


def d3llm(
    config: GenerationConfig,
    model: ModelConfig,
    length: int = 32,
    open_at: float = 0.1,
    entropy: float = 0.4,
    early: float = 1,
    delay: float = 2,
) -> Settings:
    """d3LLM: the next block opens when `open_at` of the one before is decoded. All proposals of open blocks with an
    entropy of at most `entropy` nats are committed, always the surest of all, and one of the first block that is not
    full. Unless `early` is 0, a stop token covers what follows it. With `cache="delayed"` a pass computes what is not
    cached: the prompt and then each block are, in turn, `delay` passes after they are seen full; passes in which one
    waits for that compute all. Every `refresh_every`-th pass does, too."""
    if length != int(length) or not 1 <= length <= 2**31 or open_at > 1:
        raise PromptError(f"sampler_options: expected a whole length and open_at of at most 1, got {length}, {open_at}")
    if delay != int(delay) or delay >= 2**31:
        raise PromptError(f"sampler_options: expected a whole number of passes for delay, got {delay}")
    return {
        "rule": OpenBlocks(min(int(length), config.max_new_tokens), open_at, -entropy, int(delay)),
        "end_early": early > 0,
        "confidence": "neg_entropy",
        "variable_length": False,
        "block_length": config.max_new_tokens,
    }


def alone(config: GenerationConfig, model: ModelConfig) -> Settings:
    """Refuses a sampler with a loop of its own: see `ALONE`."""
    default = "; it is what models with next_token have by default, name another" if model.next_token else ""
    raise PromptError(f"sampler: {config.sampler!r} runs in generate() alone, whose prompts begin together{default}")


# Drafts of masks, which the model's causal mode verifies or not (speculation.py); DiffusionGemma's (canvas.py).
ALONE = ("self-speculation", "draft", "canvas")


def of_model(config: GenerationConfig, model: ModelConfig) -> GenerationConfig:
    """Returns the settings, with self-speculation where none is named for a model whose clean rows predict."""
    if config.sampler is None and model.next_token:
        return dataclasses.replace(config, sampler="self-speculation")
    return config


SAMPLERS: dict[str, Callable[..., Settings]] = {
    "llada": llada,
    "illada": illada,
    "dream-origin": dream_origin,
    "dream-maskgit_plus": dream_maskgit_plus,
    "dream-topk_margin": dream_topk_margin,
    "dream-entropy": dream_entropy,
    "sdar-sequential": sdar_sequential,
    "sdar-static": sdar_static,
    "sdar-dynamic": sdar_dynamic,
    "sdar-entropy_bounded": sdar_entropy_bounded,
    "fast-dllm-threshold": fast_dllm_threshold,
    "fast-dllm-factor": fast_dllm_factor,
    "llada2.1": llada21,
    "remdm": remdm,
    "remdm-rescale": remdm_rescale,
    "remdm-loop": remdm_loop,
    "remdm-conf": remdm_conf,
    "d3llm": d3llm,
    **dict.fromkeys(ALONE, alone),
}
