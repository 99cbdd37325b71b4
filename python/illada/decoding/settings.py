"""Checks a GenerationConfig and resolves it for one model into `Sampling`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from illada_kernels import Edit, Remask, TopK
from illada_kernels.rules import CONFIDENCES, ORDERS

from ..config import ModelConfig
from ..errors import PromptError
from . import samplers
from .config import GenerationConfig, Prompts, Sampling
from .schedules import FILLING, Always, Choose, Counts, Evenly, OpenBlocks, Schedule, Table


def checked(config: GenerationConfig | None, model: ModelConfig) -> GenerationConfig:
    """Returns the settings with plain Python numbers and tuples; raises PromptError naming one that is wrong.

    Integers may come as any integer type (numpy, 0-d tensors), ids as any collection of them, logit_bias as a dict.
    """
    config = config or GenerationConfig()
    if config.sampler is not None:
        config = samplers.apply(config, model)
    elif config.sampler_options:
        raise PromptError("sampler_options: expected none without a sampler")
    counts = {"max_new_tokens": 1, "block_length": 1, "steps": 1, "steps_per_block": 1, "revise_steps": 0}
    counts |= {"refresh_every": 0, "vicinity": 0, "top_k": 1}
    plain: dict[str, Any] = {name: _count(config, name, least) for name, least in counts.items()}
    for name in ("temperature", "confidence_temperature", "rank_temperature"):
        plain[name] = _number(name, getattr(config, name))
        if not isinstance(plain[name], Tensor) and plain[name] < 0:
            raise PromptError(f"{name}: expected a number of at least 0, got {plain[name]!r}")
    plain["guidance"] = guidance_of(config.guidance)
    for name, known in (("confidence", CONFIDENCES), ("order", ORDERS)):
        if getattr(config, name) not in known:
            raise PromptError(f"{name}: expected one of {', '.join(known)}, got {getattr(config, name)!r}")
    for name in ("end_early", "variable_length"):
        value = getattr(config, name)
        if value not in (True, False) and not (value is None and name == "variable_length"):
            raise PromptError(f"{name}: expected True or False, got {value!r}")
    for name in ("top_p", "min_p"):
        plain[name] = _share(name, getattr(config, name))
    cold = not isinstance(plain["temperature"], Tensor) and plain["temperature"] == 0
    for name in ("top_k", "top_p", "min_p"):
        if plain[name] is not None and cold and config.sampler != "canvas":  # which has temperatures of its own
            raise PromptError(f"{name}: expected None at temperature 0, where nothing is drawn, got {plain[name]!r}")
    for name, kinds in (("rule", FILLING), ("revise", (Edit, Remask))):
        value = getattr(config, name)
        if value is None or callable(value) or (name == "rule" and isinstance(value, Tensor | Choose)):
            continue
        if not isinstance(value, kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise PromptError(f"{name}: expected None or one of {names}, got {value!r}")
    if config.stop_when is not None and not callable(config.stop_when):
        raise PromptError(f"stop_when: expected a function of a list of ids, or None, got {config.stop_when!r}")
    for name in ("stop_ids", "forbid", "defer"):
        value = getattr(config, name)
        plain[name] = None if value is None else tuple(_ids(name, value, model.vocab_size))
    if model.mask_id < 0:
        if plain["guidance"]:
            expect_mask(model, "guidance")
        plain["forbid"] = plain["forbid"] or ()
    elif plain["forbid"] is not None and model.mask_id not in plain["forbid"]:
        plain["forbid"] = (*plain["forbid"], model.mask_id)  # a mask that is proposed would never be filled
    if config.variable_length is None:
        plain["variable_length"] = model.variable_length
    for name in ("logit_bias", "growing_bias"):
        value = getattr(config, name)
        times = plain["max_new_tokens"] if name == "growing_bias" else 1
        plain[name] = None if value is None else _logit_bias(name, value, model.vocab_size, times)
    return dataclasses.replace(config, **plain)


def resolve(config: GenerationConfig, model: ModelConfig, batch: int, block_length: int, blocks: int) -> Sampling:
    """Resolves settings that `checked` returned; raises PromptError if they contradict each other or the model."""
    if config.steps is not None and config.steps % blocks:
        raise PromptError(
            f"steps: expected a multiple of the {blocks} blocks of {block_length} tokens, got {config.steps}; choose "
            "another number of steps, or another block_length"
        )
    schedule = _schedule(config, block_length, config.steps and config.steps // blocks, batch)
    return Sampling(
        schedule=schedule,
        block_length=block_length,
        revise=config.revise,
        revise_steps=config.revise_steps if config.revise is not None else 0,
        cache=_cache_mode(config, model),
        refresh_every=config.refresh_every,
        vicinity=config.vicinity,
        guidance=config.guidance,
        seeds=seeds_of(config.seed, batch),
        max_passes=max(block_length, getattr(schedule, "passes", 0)) + config.revise_steps,
        growing_bias=config.growing_bias,  # type: ignore[arg-type]  # a pair, says `checked`
        unmask={
            "confidence": config.confidence,
            "order": config.order,
            "rank_temperature": config.rank_temperature,
            "defer": config.defer,
            "temperature": config.temperature,
            "confidence_temperature": config.confidence_temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
            "forbid": config.forbid,
            "logit_bias": config.logit_bias,
        },
        by_sequence=_by_sequence(config.rule) or _by_sequence(config.revise),
        ends=stop_ids_of(config, model) if config.end_early else (),
    )


def _by_sequence(rule: Any) -> bool:
    """Returns whether a rule or revision may hold numbers of each sequence: callables of the user may."""
    if callable(rule) or isinstance(rule, Choose):
        return not getattr(rule, "any_batch", False)
    return has_numbers(rule)


NO_LOOP: tuple[str, ...] = (
    "rule",
    "revise",
    "revise_steps",
    "steps",
    "cache",
    "refresh_every",
    "vicinity",
    "growing_bias",
)
NO_LOOP += ("end_early", "confidence", "confidence_temperature", "order", "defer", "variable_length")


def refuse(config: GenerationConfig, names: Iterable[str]) -> None:
    """Raises PromptError for a setting that `config.sampler`, one with a loop of its own, would not heed."""
    for name in names:
        given, default = getattr(config, name), getattr(GenerationConfig, name)
        if given is not default and (isinstance(given, Tensor) or given != default):
            raise PromptError(f"{name}: expected none with sampler {config.sampler!r}, got {given!r}")


def has_numbers(rule: Any) -> bool:
    """Returns whether a rule or revision holds a number for each sequence."""
    if isinstance(rule, Tensor):
        return rule.dim() > 1
    fields = vars(rule).values() if dataclasses.is_dataclass(rule) and not callable(rule) else ()
    return any(isinstance(value, Tensor) and value.dim() > 0 for value in fields)


def stop_ids_of(config: GenerationConfig, model: ModelConfig) -> tuple[int, ...]:
    """Returns the ids that end a sequence."""
    return model.eos_ids if config.stop_ids is None else tuple(config.stop_ids)  # type: ignore[arg-type]


def _schedule(config: GenerationConfig, block_length: int, steps: int | None, batch: int) -> Schedule:
    """Returns the rule of each pass; `steps` is the number of passes of a block that `config.steps` asks for."""
    rule = config.rule
    if steps is not None and config.steps_per_block is not None:
        raise PromptError("steps: expected None with steps_per_block; one of them is the number of passes")
    if rule is not None and (steps or config.steps_per_block) is not None:
        name = "steps" if steps else "steps_per_block"
        raise PromptError(f"{name}: expected None with a rule, for it is the schedule used without one")
    if rule is None:
        return Evenly(steps or config.steps_per_block or block_length)
    if isinstance(rule, Tensor):
        if rule.dim() not in (1, 2) or not _is_integral(rule) or rule.shape[0] < 1:
            raise PromptError(f"rule: expected integers (passes,) or (passes, B), got {rule.dtype} {tuple(rule.shape)}")
        if rule.dim() == 2 and rule.shape[1] != batch:
            raise PromptError(f"rule: expected counts for each of {batch} sequences, got {tuple(rule.shape)}")
        if rule.numel() and int(rule.min()) < 0:
            raise PromptError(f"rule: expected counts of at least 0, got {int(rule.min())}")
        return Counts(Table(rule.detach()))
    if callable(rule):
        return rule
    if isinstance(rule, TopK) and not isinstance(rule.k, Tensor) and rule.k == 0:
        raise PromptError("rule: expected TopK of at least 1, got 0, which never commits a token")
    return Always(rule)


def resolve_block_length(config: GenerationConfig, model: ModelConfig) -> int:
    """Returns the block length of `generate`; raises PromptError if it does not fit the model."""
    length = samplers.block_length_of(config, model)
    if model.causal_block and length != model.causal_block:
        raise PromptError(f"block_length: expected {model.causal_block}, the model's own blocks, got {length}")
    return length


def expect_mask(config: ModelConfig, what: str) -> None:
    """Raises PromptError for a model without a mask token."""
    if config.mask_id < 0:
        raise PromptError(
            f"model: {what} needs a mask token, and this model's mask_id is -1; give an id of its vocab that no text "
            "holds: load(folder, mask_id=...), illada eval --mask-id, mask_id among the harness's model_args"
        )


def expect_prompts(rows: list[list[int]], config: ModelConfig, what: str = "prompt") -> None:
    """Raises PromptError for a prompt with a mask, and where the model has none, for one that it cannot continue."""
    if not config.autoregressive:
        expect_mask(config, "decoding")
    for b, row in enumerate(rows):
        if config.mask_id in row:
            raise PromptError(f"{what} {b}: expected no mask_id ({config.mask_id}); fill() fills holes in a text")
        if not row and config.mask_id < 0:
            raise PromptError(f"{what} {b}: expected a token at least, because the model has no mask to begin with")


def token_lists(prompts: Prompts, config: ModelConfig, what: str = "prompt") -> list[list[int]]:
    """Returns prompts as lists of ids; raises PromptError naming the prompt that is not ids of the vocab."""
    if isinstance(prompts, Mapping):
        raise PromptError(f"{what}s: expected a list of token lists, got {type(prompts).__name__}; pass its input_ids")
    if isinstance(prompts, (str, bytes)) or not _is_list(prompts):
        raise PromptError(f"{what}s: expected a list of token lists, got {type(prompts).__name__}; encode text first")
    return [token_list(prompt, config, f"{what} {b}") for b, prompt in enumerate(prompts)]


def token_list(prompt: Any, config: ModelConfig, what: str) -> list[int]:
    """Returns a prompt as a list of ids; raises PromptError, which calls it `what`, for other than ids of the vocab."""
    if hasattr(prompt, "tolist"):  # a tensor or array
        if len(prompt.shape) != 1 or not _is_integral(prompt):
            hint = "; put the prompt in a list" if len(prompt.shape) == 0 else ""
            raise PromptError(f"{what}: expected integers (n,), got {prompt.dtype} {tuple(prompt.shape)}{hint}")
        prompt = prompt.tolist()
    if isinstance(prompt, (str, bytes)) or not _is_list(prompt):
        hint = "put the prompt in a list" if hasattr(prompt, "__index__") else "encode text first"
        raise PromptError(f"{what}: expected token ids, got {type(prompt).__name__}; {hint}")
    return _ids(what, prompt, config.vocab_size)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) or hasattr(value, "tolist")


def _is_integral(array: Any) -> bool:
    if isinstance(array, Tensor):
        return not array.is_floating_point() and not array.is_complex() and array.dtype != torch.bool
    return array.dtype.kind in "iu"


def _index(name: str, value: Any, expected: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a float tensor, a tensor of several numbers
        raise PromptError(f"{name}: expected {expected}, got {value!r}") from None


def _ids(name: str, value: Any, vocab_size: int) -> list[int]:
    expected = f"ids in [0, {vocab_size})"
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        values = [values]
    ids = [_index(name, i, expected) for i in values]
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise PromptError(f"{name}: expected {expected}, got {bad[0]}")
    return ids


def _count(config: GenerationConfig, name: str, least: int) -> int | None:
    value = getattr(config, name)
    if value is None and getattr(GenerationConfig, name) is None:
        return None
    count = _index(name, value, f"an integer of at least {least}")
    if count < least:
        raise PromptError(f"{name}: expected at least {least}, got {count}")
    return count


def _number(name: str, value: Any) -> Any:
    """Returns a float, or the 0-d tensor that `unmask` takes as well."""
    return value if isinstance(value, Tensor) and value.dim() == 0 else _float(name, value)


def _float(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, (str, bool)) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise PromptError(f"{name}: expected a finite number, got {value!r}")
    return number


def guidance_of(value: Any) -> float:
    """Returns the weight of classifier-free guidance; raises PromptError for one below 0.

    -1 would be what the model says without the prompt, less would turn away from the prompt; LLaDA's code takes either
    as no guidance.
    """
    weight = _float("guidance", value)
    if weight < 0:
        raise PromptError(f"guidance: expected a number of at least 0, got {value!r}; 0 is no guidance")
    return weight


def _share(name: str, value: Any) -> Any:
    """Returns None, a float from 0 to 1, or a 0-d tensor."""
    share = None if value is None else _number(name, value)
    if isinstance(share, float) and not 0 <= share <= 1:
        raise PromptError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return share


def _logit_bias(name: str, bias: Any, vocab_size: int, times: int) -> tuple[Any, Any]:
    """Returns (ids, values) of a dict or a pair; a value may be added `times` times."""
    if isinstance(bias, Mapping):
        bias = (list(bias), list(bias.values()))
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        raise PromptError(f"{name}: expected {{id: value}} or (ids, values), got {bias!r}")
    ids = _ids(name, bias[0], vocab_size)
    values = bias[1].tolist() if hasattr(bias[1], "tolist") else bias[1]
    values = [_number(name, v) for v in (values if isinstance(values, Iterable) else [values])]
    if bad := [v for v in values if not abs(v) * times <= 3.4e38]:
        grown = f", {times} tokens times over" if times > 1 else ""
        raise PromptError(f"{name}: expected numbers that float32 holds{grown}, got {bad[0]}")
    if len(ids) != len(values):
        raise PromptError(f"{name}: expected a value for each id, got {len(ids)} ids and {len(values)} values")
    return ids, values


APPROXIMATE = ("prefix", "dual", "vicinity", "interval", "delayed")  # caches whose keys grow old


def _cache_mode(config: GenerationConfig, model: ModelConfig) -> str:
    cache = config.cache or ("block_causal" if model.causal_block else "none")
    allowed = ("none", "block_causal") if model.causal_block else ("none", *APPROXIMATE)
    if cache not in allowed:
        kind = "a block-causal model" if model.causal_block else "a model that sees everything"
        raise PromptError(f"cache: expected one of {', '.join(allowed)} for {kind}, got {cache!r}")
    if config.refresh_every and cache not in APPROXIMATE:
        raise PromptError(f"refresh_every: expected 0 with cache {cache!r}, which has nothing to refresh")
    if cache == "delayed" and not isinstance(config.rule, OpenBlocks):
        raise PromptError("cache: expected another than 'delayed', which is for sampler 'd3llm' and rule OpenBlocks")
    if cache == "delayed" and config.revise is not None:
        raise PromptError("revise: expected None with cache 'delayed', which leaves blocks that are full alone")
    if config.vicinity != GenerationConfig.vicinity and cache != "vicinity":
        raise PromptError(f"vicinity: expected none with cache {cache!r}; it is for cache 'vicinity'")
    return cache


def seeds_of(seed: Any, batch: int) -> list[int]:
    """Returns a seed for each sequence, wrapped to int64: s and s - 2**64 are the same key of the noise."""
    expected = "an integer from -2**63 to 2**64 - 1, or one for each sequence"
    values = seed.tolist() if hasattr(seed, "tolist") else seed
    one = isinstance(values, (str, bytes)) or not isinstance(values, Iterable)
    seeds = [_index("seed", s, expected) for s in ([values] if one else values)]
    if bad := [s for s in seeds if not -(2**63) <= s < 2**64]:
        raise PromptError(f"seed: expected {expected}, got {bad[0]}")
    seeds = [seeds[0] + b for b in range(batch)] if one else seeds
    if len(seeds) != batch:
        raise PromptError(f"seed: expected an int or one for each of {batch} sequences, got {len(seeds)}")
    return [(s + 2**63) % 2**64 - 2**63 for s in seeds]
