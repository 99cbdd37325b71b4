"""One decoding step, from logits and fused with the head, against LLaDA's sampler and smarter plain torch.

The limit of a step from logits is reading them once: `amax` over them is measured beside it; that of a fused step is
its matrix product. Peers do the whole job: proposal, confidence, selection, write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops.unmask import BACKENDS
from illada_kernels.ops.unmask import cases as shapes

from .measure import Case, Work, rotating

COMMITTED_PER_STEP = 4


# ---- peers ----------------------------------------------------------------------------------------------------------
def llada_step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, temperature: float) -> Tensor:
    """LLaDA's generate.py, one step with low_confidence remasking: float64 Gumbel noise over all logits, argmax,
    softmax in the logits' dtype, gather, and a top-k for each sequence."""
    if temperature > 0:
        wide = logits.to(torch.float64)
        noise = (-torch.log(torch.rand_like(wide, dtype=torch.float64))) ** temperature
        proposal = (wide.exp() / noise).argmax(-1)
    else:
        proposal = logits.argmax(-1)
    confidence = torch.softmax(logits, -1).gather(-1, proposal[..., None])[..., 0]
    masked = tokens == mask_id
    proposal, confidence = torch.where(masked, proposal, tokens), torch.where(masked, confidence, -torch.inf)
    for b in range(tokens.shape[0]):
        chosen = confidence[b].topk(k).indices
        tokens[b, chosen] = proposal[b, chosen]
    return tokens


def float32_step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, temperature: float) -> Tensor:
    """What a careful user writes: masked rows only, exponential race in float32, log-sum-exp instead of softmax, one
    batched top-k."""
    masked = tokens == mask_id
    rows = logits[masked] if not bool(masked.all()) else logits.reshape(-1, logits.shape[-1])
    if temperature > 0:
        race = torch.empty_like(rows).exponential_().log_()
        proposal = torch.sub(rows, race, alpha=temperature, out=race).argmax(-1)
    else:
        proposal = rows.argmax(-1)
    probability = (rows.gather(-1, proposal[:, None])[:, 0] - rows.logsumexp(-1)).exp().float()
    confidence = torch.full(tokens.shape, -torch.inf, device=logits.device).masked_scatter_(masked, probability)
    proposed = tokens.masked_scatter(masked, proposal)
    chosen = confidence.topk(k, -1).indices
    return tokens.scatter_(1, chosen, proposed.gather(1, chosen))


# ---- cases ----------------------------------------------------------------------------------------------------------
def backends(device: str) -> list[str]:
    fast = [b.name for b in BACKENDS if b.name != "reference" and b.devices and device in b.devices]
    return [b.name for b in BACKENDS if b.name in fast and b.available() is None] or ["reference"]


def fresh_tokens(shape: shapes.Shape, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.full((shape.batch, shape.count), shape.mask_id, device=device)
    return tokens, torch.arange(shape.count, device=device).repeat(shape.batch, 1)


def from_logits(shape: shapes.Shape, dtype: torch.dtype, temperature: float, device: str) -> Work:
    exact = dtype == torch.float32 or device == "cuda"  # torch's own bfloat16 is no limit on a CPU
    full = (shape.batch, shape.count, shape.vocabulary)
    sets = [(torch.randn(full, device=device).mul_(2).to(dtype),) for _ in range(2)]
    tokens, positions = fresh_tokens(shape, device)
    rule = ik.TopK(COMMITTED_PER_STEP)
    options: dict[str, Any] = {"mask_id": shape.mask_id, "temperature": temperature}

    def ours(backend: str) -> Callable[[Tensor], Any]:
        return lambda logits: ik.unmask_from_logits(logits, tokens.clone(), positions, rule, backend=backend, **options)

    def peer(step: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
        return lambda logits: step(logits, tokens.clone(), COMMITTED_PER_STEP, shape.mask_id, temperature)

    contenders = {"llada_torch": peer(llada_step), "float32_torch": peer(float32_step)}
    return Work(
        ours={name: rotating(ours(name), sets) for name in backends(device)},
        peers={name: rotating(fn, sets) for name, fn in contenders.items()},
        flops=4.0 * shape.rows * shape.vocabulary,
        bytes=shapes.logit_bytes(shape, sets[0][0].element_size()),
        limit={"read_once": rotating(lambda logits: logits.amax(-1), sets)} if exact else {},
    )


def from_hidden(shape: shapes.Shape, dtype: torch.dtype, temperature: float, device: str) -> Work:
    exact = dtype == torch.float32 or device == "cuda"
    weight = torch.randn(shape.vocabulary, shape.dim, device=device, dtype=dtype)
    full = (shape.batch, shape.count, shape.dim)
    sets = [(torch.randn(full, device=device).div(shape.dim**0.5).to(dtype),) for _ in range(3)]
    tokens, positions = fresh_tokens(shape, device)
    rule = ik.TopK(COMMITTED_PER_STEP)
    options: dict[str, Any] = {"mask_id": shape.mask_id, "temperature": temperature}

    def ours(backend: str) -> Callable[[Tensor], Any]:
        return lambda hidden: ik.unmask(hidden, weight, tokens.clone(), positions, rule, backend=backend, **options)

    def peer(step: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
        return lambda hidden: step(hidden @ weight.T, tokens.clone(), COMMITTED_PER_STEP, shape.mask_id, temperature)

    return Work(
        ours={name: rotating(ours(name), sets) for name in backends(device)},
        peers={
            "full_logits_llada": rotating(peer(llada_step), sets),
            "full_logits_float32": rotating(peer(float32_step), sets),
        },
        flops=shapes.flops(shape),
        bytes=shapes.head_bytes(shape, weight.element_size()),
        limit={"product": rotating(lambda hidden: hidden @ weight.T, sets)} if exact else {},
    )


def cases(device: str) -> Iterator[Case]:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    single = torch.float32 if device == "cpu" else torch.bfloat16

    def case(
        kind: str, build: Callable[..., Work], shape: shapes.Shape, dtype: torch.dtype, temperature: float
    ) -> Case:
        name = f"{kind}_{shape.name}_t{temperature:g}"
        return Case("unmask", name, names[dtype], lambda: build(shape, dtype, temperature, device))

    for shape, temperature in itertools.product((shapes.LLADA, shapes.LLADA_ONE), (1.0, 0.0)):
        yield case("logits", from_logits, shape, single, temperature)
    other = torch.bfloat16 if device == "cpu" else torch.float32
    yield case("logits", from_logits, shapes.LLADA, other, 1.0)
    for dtype in dict.fromkeys((single, torch.bfloat16)):
        yield case("hidden", from_hidden, shapes.LLADA, dtype, 1.0)
    yield case("hidden", from_hidden, shapes.LLADA, single, 0.0)
