"""Reads what lm-evaluation-harness asks of generation, in the words of many tasks, as a GenerationConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import ModelConfig
from ..decoding.config import GenerationConfig
from ..decoding.samplers import ALONE, of_model

_NEUTRAL: dict[str, tuple[int | None, ...]] = {"num_beams": (None, 1), "repetition_penalty": (None, 1)}
_TRUNCATIONS: dict[str, tuple[int | None, ...]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
}  # with what truncates nothing
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # most important first
_SETTINGS = {field.name for field in dataclasses.fields(GenerationConfig)} - {"max_new_tokens", "stop_ids", "stop_when"}


def expect_known(where: str, settings: Iterable[str]) -> None:
    """Raises ValueError for names that are not settings of generation."""
    if unknown := sorted(set(settings) - _SETTINGS):
        raise ValueError(f"{where}: {', '.join(unknown)} is not known; expected {', '.join(sorted(_SETTINGS))}")


def runs_alone(config: GenerationConfig, model: ModelConfig) -> bool:
    """Returns whether the sampler, be it the model's by default, has a loop of its own."""
    return of_model(config, model).sampler in ALONE


def generation(
    asked: Mapping[str, Any], defaults: Mapping[str, Any], model: ModelConfig, max_gen_toks: int
) -> tuple[GenerationConfig, list[str], int]:
    """Returns the settings, the strings that end an answer, and the tokens of an answer.

    asked: of a task, and of --gen_kwargs. defaults: of all tasks. Raises ValueError for what is not known.
    """
    asked = dict(asked)
    until = asked.pop("until", None) or []
    size = int(next((asked[n] for n in _LENGTHS if asked.get(n) is not None), max_gen_toks))
    sampled = asked.pop("do_sample", None)
    if sampled is not None:
        asked["temperature"] = float(asked.get("temperature", 1.0)) if sampled else 0.0
    for name, values in _NEUTRAL.items():
        value = asked.pop(name, None)
        if value not in values:
            raise ValueError(f"gen_kwargs: {name} = {value!r} is not supported; expected {values[1]}")
    settings = {**defaults, **{name: asked[name] for name in asked if name not in _LENGTHS}}
    for name, values in _TRUNCATIONS.items():  # nothing is drawn without a temperature
        if name in settings and (settings[name] in values or not float(settings.get("temperature") or 0) > 0):
            del settings[name]
    expect_known("gen_kwargs", settings)
    block = settings.get("block_length") or model.causal_block or min(32, size)
    config = GenerationConfig(max_new_tokens=size, **settings)
    if not runs_alone(config, model):  # whose block_length is its draft's, by default its own
        config = GenerationConfig(max_new_tokens=-(-size // block) * block, **{**settings, "block_length": block})
    return config, [until] if isinstance(until, str) else [text for text in until if text], size


def cut(text: str, until: Sequence[str]) -> str:
    """Returns the text before the first of the strings."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]
