"""LoRA (arXiv 2106.09685) through `peft`: adapters beside the layers' matrices, saved by the published names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import DataError
from ..model import Model
from ..tensor_names import entries
from .state import replace_file

_MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_FOLDER = "adapter"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DataError(f"lora: it needs the package peft ({error}); pip install peft, or leave --lora out") from None
    return peft


def check() -> None:
    """Raises DataError where peft is missing."""
    _peft()


def add(model: Model, rank: int) -> None:
    """Puts an adapter of `rank` beside every matrix of the layers, in place; nothing else is trained from then on.

    The scale is 2 (alpha = 2 * rank). A matrix that holds several, q with k and v, shares its adapter's A among them.
    """
    peft = _peft()
    model.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_MATRICES))
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=next(model.layers.parameters()).is_meta)
    for parameter in model.parameters():
        if parameter.requires_grad:  # master weights, whatever the model's dtype is
            parameter.data = parameter.data.float()


def drawn(config: ModelConfig, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of each adapter that `add` would draw for a model of this dtype, a layer at a time."""
    for index in range(config.n_layers):
        one = Model(dataclasses.replace(config, n_layers=1), device="meta", dtype=dtype)
        one.layers.to_empty(device="cpu")
        add(one, rank)
        for name, weight in one.named_parameters():
            if weight.requires_grad:
                yield name.replace("layers.0.", f"layers.{index}.", 1), weight.detach()


def merge(model: Model) -> None:
    """Adds the adapters to the matrices and removes them, in place."""
    for layer in model.layers:
        for name in _MATRICES:
            adapted = getattr(layer, name)
            adapted.merge()
            base: nn.Linear = adapted.get_base_layer()
            setattr(layer, name, base)
    model.requires_grad_(True)


def save(model: Model, folder: Path, base: str | None) -> None:
    """Writes the adapters to folder/adapter as peft does, by the names of the published model's tensors.

    There q, k and v, gate and up are matrices of their own: each has the shared A and its rows of B.
    """
    tensors: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    rank = 0
    patterns: set[str] = set()
    for entry in entries(model.config):
        path = entry.parameter.removesuffix(".weight")
        if path.rpartition(".")[2] not in _MATRICES or path == entry.parameter:
            continue
        a, b = (getattr(modules[path], f"lora_{side}")["default"].weight.detach() for side in "AB")
        rank, name = a.shape[0], entry.name.removesuffix(".weight")
        patterns.add(re.sub(r"\d+", r"\\d+", re.escape(name)))
        name = f"base_model.model.{name}"
        tensors[f"{name}.lora_A.weight"] = a.cpu().clone()
        tensors[f"{name}.lora_B.weight"] = b[entry.start : entry.stop].cpu().clone()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "|".join(sorted(patterns)),  # a pattern, because LLaDA's head has a layer's name
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    from safetensors.torch import save as to_bytes

    (folder / _FOLDER).mkdir(exist_ok=True)
    replace_file(folder / _FOLDER / "adapter_model.safetensors", to_bytes(tensors, {"format": "pt"}))
    replace_file(folder / _FOLDER / "adapter_config.json", (json.dumps(settings, indent=2) + "\n").encode())
