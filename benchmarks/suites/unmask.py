"""One decoding step, from logits and fused with the head, against LLaDA's sampler and smarter plain torch.

The limit of a step from logits is reading them once: `amax` over them is measured beside it; that of a fused step is
its matrix product, or, for up to 64 rows on a GPU, reading the head once at the copy rate. Peers do the whole job:
proposal, confidence, selection, write. On a GPU: D = 4096, bfloat16, replayed as CUDA graphs where that can be, and the
peers of peers/unmask.py after cuBLAS.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops import unmask as room
from illada_kernels.ops.unmask import BACKENDS
from illada_kernels.ops.unmask import cases as shapes

from ..measure import Case, Work, rotating
from ..peers import ours_on
from ..peers import unmask as unmask_peers
from ..peers.unmask import float32_step, llada_step

FROM_LOGITS = getattr(room, "FROM_LOGITS_BACKENDS", BACKENDS)
COMMITTED_PER_STEP = 4
GAMMA = 0.1  # DiffusionGemma's entropy bound
DIM = 4096


# ---- a CPU ----------------------------------------------------------------------------------------------------------
def backends(device: str) -> list[str]:
    fast = [b.name for b in BACKENDS if b.name != "reference" and b.devices and device in b.devices]
    return [b.name for b in BACKENDS if b.name in fast and b.available() is None] or ["reference"]


def fresh_tokens(shape: shapes.Shape, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.full((shape.batch, shape.count), shape.mask_id, device=device)
    return tokens, torch.arange(shape.count, device=device).repeat(shape.batch, 1)


def from_logits(shape: shapes.Shape, dtype: torch.dtype, temperature: float, device: str) -> Work:
    exact = dtype == torch.float32  # torch's own bfloat16 does not limit a CPU
    full = (shape.batch, shape.count, shape.vocab)
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
        flops=4.0 * shape.rows * shape.vocab,
        bytes=shapes.logit_bytes(shape, sets[0][0].element_size()),
        limit={"read_once": rotating(lambda logits: logits.amax(-1), sets)} if exact else {},
    )


def from_hidden(shape: shapes.Shape, dtype: torch.dtype, temperature: float, device: str) -> Work:
    exact = dtype == torch.float32
    weight = torch.randn(shape.vocab, shape.dim, device=device, dtype=dtype)
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


def with_option(kind: str, shape: shapes.Shape, dtype: torch.dtype, name: str, device: str) -> Work:
    """Returns a row at temperature 1 with one more option, a name of cases.TRUNCATIONS, of cases.RANKED, "at_least" or
    "renoise", and beside it the row without. Peers, of two of these, are plain torch: Hugging Face's processors,
    DiffusionGemma's step."""
    size = shape.vocab if kind == "logits" else shape.dim
    sets = [(torch.randn(shape.batch, shape.count, size, device=device).mul_(2).to(dtype),) for _ in range(2)]
    head: tuple[Tensor, ...] = ()
    if kind == "hidden":
        head = (torch.randn(shape.vocab, size, device=device).div_(size**0.5).to(dtype),)
    tokens, positions = fresh_tokens(shape, device)
    renoises = name == "renoise"
    option: dict[str, Any] = {**shapes.TRUNCATIONS, **shapes.RANKED}.get(name, {})
    function: Callable[..., Any] = ik.unmask if head else ik.unmask_from_logits

    def ours(backend: str, rule: Any, option: dict[str, Any]) -> Callable[[Tensor], Any]:
        how = {"mask_id": shape.mask_id, "temperature": 1.0, "backend": backend, **option}
        return lambda x: function(x, *head, tokens.clone(), positions, rule, **how)

    def peer(x: Tensor) -> Tensor:
        logits = x @ head[0].T if head else x
        if renoises:
            return unmask_peers.renoised_step(logits, tokens.clone(), GAMMA, 1.0)
        step = unmask_peers.truncated_step(1.0, **option)
        return step(logits, tokens.clone(), COMMITTED_PER_STEP, shape.mask_id)

    rules: dict[str, tuple[Any, Any]] = {
        "renoise": (ik.Renoise(GAMMA), ik.EntropyBound(GAMMA)),
        "at_least": (ik.Threshold(0.5, COMMITTED_PER_STEP), ik.Threshold(0.5)),
    }
    rule, plain = rules.get(name, (ik.TopK(COMMITTED_PER_STEP),) * 2)
    has_peer = renoises or name in shapes.TRUNCATIONS
    return Work(
        ours={b: rotating(ours(b, rule, option), sets) for b in backends(device)},
        peers={"diffusion_gemma" if renoises else "processors": rotating(peer, sets)} if has_peer else {},
        beside={f"{b} without": rotating(ours(b, plain, {}), sets) for b in backends(device)},
        flops=shapes.flops(shape) if head else 4.0 * shape.rows * shape.vocab,
        bytes=(shapes.head_bytes if head else shapes.logit_bytes)(shape, sets[0][0].element_size()),
    )


# ---- a GPU ----------------------------------------------------------------------------------------------------------
def gpu_shape(batch: int, count: int, vocab: int) -> shapes.Shape:
    return shapes.Shape(f"{batch}x{count}_v{vocab // 1000}k", batch, count, vocab, DIM, vocab - 1)


def on_gpu(shape: shapes.Shape, temperature: float, kind: str, device: str = "cuda", quick: bool = False) -> Work:
    """Returns a case. kind: "step" (the top-k rule and probabilities), "entropy" (the rule that needs most, for few
    rows), "renoise" (a canvas without masks), "loop" (LLaDA's own shape, peers in as many parts as fit), or one of
    shapes.TRUNCATIONS, which peers leave out."""
    weight = torch.randn(shape.vocab, shape.dim, device=device, dtype=torch.bfloat16)
    full = (shape.batch, shape.count, shape.dim)
    sets = [(torch.randn(full, device=device).div(shape.dim**0.5).bfloat16(),) for _ in range(2)]
    tokens, positions = fresh_tokens(shape, device)
    options: dict[str, Any] = {"mask_id": shape.mask_id, "temperature": temperature}
    options |= {"confidence": "neg_entropy"} if kind in ("entropy", "renoise") else {}
    options |= shapes.TRUNCATIONS.get(kind, {})
    rules = {"entropy": ik.EntropyBound(0.1), "renoise": ik.Renoise(0.1)}
    rule = rules.get(kind, ik.TopK(min(COMMITTED_PER_STEP, shape.count)))

    def ours(backend: str) -> Callable[[Tensor], Any]:
        return lambda hidden: ik.unmask(hidden, weight, tokens.clone(), positions, rule, backend=backend, **options)

    part = unmask_peers.sequences_at_a_time(*full[:2], shape.vocab) if kind == "loop" else shape.batch

    def peer(step: unmask_peers.Step) -> Callable[[Tensor], Any]:
        def run(hidden: Tensor) -> Tensor:
            written, logits = tokens.clone(), hidden @ weight.T
            for b in range(0, shape.batch, part):
                step(
                    logits[b : b + part],
                    written[b : b + part],
                    min(COMMITTED_PER_STEP, shape.count),
                    shape.mask_id,
                    temperature,
                )
            return written

        return run

    compiled = not quick and kind != "loop" and shape.rows in (64, 256)
    steps, missing = unmask_peers.find(temperature, compiled, quick)
    names, absent = ours_on(BACKENDS, device)
    product = {"cuBLAS product alone": rotating(lambda hidden: hidden @ weight.T, sets)}
    work = Work(
        ours={name: rotating(ours(name), sets) for name in names},
        peers={name: rotating(peer(step), sets) for name, step in steps.items()},
        flops=shapes.flops(shape),
        bytes=shapes.head_bytes(shape, 2),
        absent=absent | missing,
        notes=notes(steps, kind, part if part < shape.batch else None),
        replayed=0 if kind == "loop" else len(sets),
    )
    if temperature == 0:
        work.check = lambda name: error_of(ours(name)(sets[0][0]).proposal, sets[0][0], weight, shape.mask_id)
    if shape.rows > 64:
        work.limit = product
    else:
        work.beside = product
    return work


def error_of(proposal: Tensor, hidden: Tensor, weight: Tensor, forbidden: int) -> float:
    """Returns how far below the best the proposed logits of 128 rows lie in float32, of their spread over the
    vocab, the largest; infinite where a proposal is not an id."""
    if bool((proposal < 0).any()):
        return float("inf")
    chosen = proposal.flatten()[-128:, None]
    logits = hidden.flatten(0, 1)[-128:].float() @ weight.float().T
    logits[:, forbidden] = -torch.inf
    spread = logits[logits.isfinite()].std()
    return float(((logits.amax(-1) - logits.gather(-1, chosen)[:, 0]) / spread).max())


def notes(steps: Iterable[str], kind: str, part: int | None) -> dict[str, str]:
    said = [f"{part} sequences at a time, since its float64 logits fill the memory"] if part else []
    said += ["commits by probability, top-k: no peer computes entropies"] if kind in ("entropy", "renoise") else []
    said += ["draws from all ids: no peer truncates"] if kind in shapes.TRUNCATIONS else []
    return dict.fromkeys(steps, "; ".join(said)) if said else {}


def selection(batch: int, count: int, device: str = "cuda") -> Work:
    """Returns a case of 1024 candidates of each sequence, from logits of eight ids: what is left is ranking, committing
    and counting. The selection kernel's own time stands under `kernels`."""
    logits = [(torch.randn(batch, count, 8, device=device),) for _ in range(2)]
    tokens = torch.full((batch, count), 7, device=device)
    positions = torch.arange(count, device=device).repeat(batch, 1)

    def ours(backend: str) -> Callable[[Tensor], Any]:
        options: dict[str, Any] = {"mask_id": 7, "backend": backend}
        return lambda x: ik.unmask_from_logits(x, tokens.clone(), positions, ik.TopK(4), **options)

    def ranked(x: Tensor) -> Tensor:
        return unmask_peers.device_step(x, tokens.clone(), 4, 7, 0.0)

    names, absent = ours_on(FROM_LOGITS, device)
    return Work(
        ours={name: rotating(ours(name), logits) for name in names},
        peers={"float32": rotating(ranked, logits)},
        bytes=float(batch * count * (8 * 4 + 8 + 8 + 8 + 4 + 1)),
        absent=absent,
        replayed=2,
    )


def gpu_cases(quick: bool = False) -> Iterator[Case]:
    def case(name: str, shape: shapes.Shape, temperature: float, kind: str) -> Case:
        known = "truncated" if kind in shapes.TRUNCATIONS else kind
        facts = {"kind": known, "rows": shape.rows, "vocab": shape.vocab, "temperature": temperature}
        facts |= {"flops": shapes.flops(shape), "bytes": shapes.head_bytes(shape, 2)}
        facts["headline"] = kind == "loop" or (shape.vocab == 126464 and shape.rows in (1, 32, 256, 2048))
        return Case("unmask", name, "bfloat16", lambda: on_gpu(shape, temperature, kind, quick=quick), facts)

    for vocab in (126464, 155136):
        for batch, count in ((1, 1), (1, 8), (1, 32), (2, 32)):
            shape = gpu_shape(batch, count, vocab)
            yield case(f"entropy_{shape.name}_t1", shape, 1.0, "entropy")
        for batch in (4, 8, 16, 32, 64):
            shape = gpu_shape(batch, 32, vocab)
            for temperature in (0.0, 1.0):
                yield case(f"hidden_{shape.name}_t{temperature:g}", shape, temperature, "step")
    for kind in shapes.TRUNCATIONS:
        for batch in (2, 64):
            shape = gpu_shape(batch, 32, 126464)
            yield case(f"{kind}_{shape.name}_t1", shape, 1.0, kind)
    shape = gpu_shape(1, 256, 126464)  # DiffusionGemma's canvas
    yield case(f"renoise_{shape.name}_t1", shape, 1.0, "renoise")
    facts = {"kind": "selection", "rows": 32 * 1024, "flops": 0.0, "bytes": 32.0 * 1024 * 61}
    yield Case("unmask", "selection_32x1024", "float32", lambda: selection(32, 1024), facts)
    shape = gpu_shape(32, 1024, 126464)
    yield case(f"llada_loop_{shape.name}_t1", shape, 1.0, "loop")


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if device == "cuda":
        yield from gpu_cases(quick)
        return
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    single = torch.float32

    def case(
        kind: str, build: Callable[..., Work], shape: shapes.Shape, dtype: torch.dtype, temperature: float
    ) -> Case:
        name = f"{kind}_{shape.name}_t{temperature:g}"
        return Case("unmask", name, names[dtype], lambda: build(shape, dtype, temperature, device))

    for shape, temperature in itertools.product((shapes.LLADA, shapes.LLADA_ONE), (1.0, 0.0)):
        yield case("logits", from_logits, shape, single, temperature)
    yield case("logits", from_logits, shapes.LLADA, torch.bfloat16, 1.0)
    for dtype in dict.fromkeys((single, torch.bfloat16)):
        yield case("hidden", from_hidden, shapes.LLADA, dtype, 1.0)
    yield case("hidden", from_hidden, shapes.LLADA, single, 0.0)
    options = [*itertools.product(("logits", "hidden"), (*shapes.TRUNCATIONS, "renoise"))]
    for kind, name in [*options, *(("logits", name) for name in (*shapes.RANKED, "at_least"))]:
        build = functools.partial(with_option, kind, shapes.LLADA, single, name, device)
        yield Case("unmask", f"{kind}_{shapes.LLADA.name}_t1_{name}", "float32", build)
