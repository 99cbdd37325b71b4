"""Who else computes an attention case: each backend of SDPA, FlexAttention compiled, the flash-attn packages.

Every peer gets its favourite layout and whatever it needs made outside the timing: contiguous inputs, additive dense
masks in the inputs' dtype, block masks, repeated key heads where it does not take grouped ones.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases as shapes

from ..machine import gpu_limits
from ..measure import why

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Layout = Callable[[Tensor], Tensor]
DOCUMENTS = (256, 2048, 512, 1024, 384, 1792, 768, 1536, 640, 1280, 896, 1152, 320, 1920, 448, 1408)  # 16384 tokens


@dataclass(frozen=True)
class GpuCase(shapes.Case):
    kind: str = "full"  # full, block_diffusion, packed, cached
    block: int = 0  # of block_diffusion
    flex: bool = False  # FlexAttention too: it compiles anew for each shape, so where its number matters


@dataclass
class Peers:
    """Holds, by name, how a (B, S, H, D) tensor is laid out for it (q, k, v and dout alike), and the call."""

    calls: dict[str, tuple[Layout, Attend]] = field(default_factory=dict)
    beside: dict[str, tuple[Layout, Attend]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@functools.cache
def heads_first(heads: int) -> Layout:
    """Turns (B, S, H, D) into contiguous (B, heads, S, D), each head repeated for its group."""
    return lambda x: x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1).contiguous()


def grouped(x: Tensor) -> Tensor:
    """Turns (B, S, H, D) into contiguous (B, H, S, D)."""
    return x.transpose(1, 2).contiguous()


def as_it_is(x: Tensor) -> Tensor:
    return x


def tokens_only(x: Tensor) -> Tensor:
    """Turns (1, T, H, D) into (T, H, D)."""
    return x[0]


def find(case: GpuCase, inputs: tuple[Tensor, ...], quick: bool = False) -> Peers:
    """Returns the peers of a case on the device of `inputs` (q, k, v, dout); `quick`: the fast ones that hardly
    compile."""
    found = Peers()
    sdpa_backends(found, case, inputs, ("cudnn", "flash") if quick else ("cudnn", "flash", "efficient", "math"))
    if case.kind == "packed":
        torch_varlen(found, case, inputs[0].device)
    if case.flex and not quick:
        flex(found, case, inputs[0].device)
    else:
        found.absent["flex, compiled"] = (
            "not measured here: it compiles anew, and for long, for each shape and direction"
        )
    flash_packages(found, case, inputs[0].device)
    return found


# ---- scaled_dot_product_attention -----------------------------------------------------------------------------------
def sdpa(backend: Any, mask: Tensor | None, enable_gqa: bool) -> Attend:
    from torch.nn.attention import sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)

    return run


def additive_mask(case: GpuCase, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Returns (1, 1, Sq, Sk), 0 or -inf; None where every row sees every key."""
    if case.kind in ("full", "cached"):
        return None
    ranges = case.key_ranges(str(device))
    assert ranges is not None
    allowed = ranges.dense()[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


def sdpa_backends(found: Peers, case: GpuCase, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    from torch.nn.attention import SDPBackend

    q, k, v, _ = inputs
    mask = additive_mask(case, q.dtype, q.device)
    masked = "" if mask is None else ", dense mask"
    for name in names:
        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION" if name != "math" else "MATH")
        if mask is not None and name == "flash":
            found.absent["flash, dense mask"] = "takes no mask"
        elif name == "math" and not scores_fit(case):
            found.absent[f"math{masked}"] = "its scores would take more than a third of the GPU's memory"
        else:
            found.calls[f"{name}{masked}"] = with_groups(found, f"{name}{masked}", backend, mask, q, k, v)
        if mask is not None and name in ("cudnn", "flash"):
            found.beside[f"{name}, no mask"] = with_groups(found, f"{name}, no mask", backend, None, q, k, v)


def scores_fit(case: GpuCase) -> bool:
    """Returns whether two float32 and two half-precision copies of every score fit, forward and backward."""
    memory = gpu_limits()["memory"] or 2**30
    return 12.0 * case.batch * case.heads * case.queries * case.keys < memory / 3


def with_groups(
    found: Peers, name: str, backend: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Layout, Attend]:
    """Sets enable_gqa where the backend takes it, tried here with gradients as it will be called; else repeated
    heads."""
    if q.shape[2] == k.shape[2]:
        return grouped, sdpa(backend, mask, False)
    run = sdpa(backend, mask, True)
    try:
        run(*(grouped(x[:1]).requires_grad_() for x in (q, k, v)))
        found.notes[name] = "enable_gqa"
        return grouped, run
    except RuntimeError as error:
        found.notes[name] = f"key heads repeated outside the timing; with enable_gqa: {why(error)}"
        return heads_first(q.shape[2]), sdpa(backend, mask, False)


# ---- variable lengths, FlexAttention --------------------------------------------------------------------------------
def boundaries(device: torch.device | str) -> Tensor:
    return torch.tensor([0, *DOCUMENTS], device=device).cumsum(0, dtype=torch.int32)


def torch_varlen(found: Peers, case: GpuCase, device: torch.device) -> None:
    """Adds PyTorch's own flash-attention for variable lengths (torch.nn.attention.varlen, from 2.10)."""
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        found.absent["flash, varlen"] = why(error)
        return
    cu, longest = boundaries(device), max(DOCUMENTS)
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": True} if takes_groups and case.heads != case.kv_heads else {}
    layout: Layout = tokens_only if takes_groups else lambda x: x[0].repeat_interleave(case.heads // x.shape[2], 1)
    if not takes_groups and case.heads != case.kv_heads:
        found.notes["flash, varlen"] = "key heads repeated outside the timing"
    found.calls["flash, varlen"] = layout, lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options)


def mask_mod(case: GpuCase, device: torch.device | str) -> Callable[..., Tensor] | None:
    """Returns the case's KeyRanges as FlexAttention's users write such a mask; None where every row sees every key."""
    if case.kind == "block_diffusion":
        half, block = case.keys // 2, case.block

        def block_diffusion(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            noisy_q, noisy_k = q < half, k < half
            block_q, block_k = (q % half) // block, (k % half) // block
            own = noisy_q & noisy_k & (block_q == block_k)
            return own | (~noisy_k & torch.where(noisy_q, block_k < block_q, block_k <= block_q))

        return block_diffusion
    if case.kind == "packed":
        document = torch.arange(len(DOCUMENTS), device=device).repeat_interleave(
            torch.tensor(DOCUMENTS, device=device), output_size=sum(DOCUMENTS)
        )
        return lambda batch, head, q, k: document[q] == document[k]
    return None


def flex(found: Peers, case: GpuCase, device: torch.device) -> None:
    """Adds FlexAttention, compiled for this shape alone. The block mask is made outside the timing, as a model makes
    it once per batch."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # else the eighth shape would run uncompiled
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False  # else a backward cannot be timed alone, with its graph retained
        mod = mask_mod(case, device)
        blocks = mod and create_block_mask(mod, None, None, case.queries, case.keys, device=str(device))
        compiled = torch.compile(flex_attention, dynamic=False)
    except Exception as error:
        found.absent["flex, compiled"] = why(error)
        return
    options = {"block_mask": blocks, "enable_gqa": case.heads != case.kv_heads}
    found.notes["flex, compiled"] = "block mask made outside the timing" if blocks is not None else "no block mask"
    found.calls["flex, compiled"] = grouped, lambda q, k, v: compiled(q, k, v, **options)


def flex_on_cpu(case: shapes.Case, ranges: KeyRanges | None) -> Attend:
    """Returns FlexAttention compiled for this shape alone, forward only: it has no backward on a CPU. The block mask is
    made here, outside the timing; inside its partial blocks the mask is the case's ranges."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = None
    if ranges is not None:
        bounds = ranges.bounds.expand(-1, case.queries, -1)
        each = len(bounds) > 1
        lo0, hi0, lo1, hi1 = (bounds[..., i].contiguous() if each else bounds[0, :, i].contiguous() for i in range(4))

        def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = (batch, q) if each else (q,)
            return ((k >= lo0[row]) & (k < hi0[row])) | ((k >= lo1[row]) & (k < hi1[row]))

        batch = case.batch if each else None
        blocks = create_block_mask(allowed, batch, None, case.queries, case.keys, device="cpu")
    torch._dynamo.reset()  # else the eighth shape would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": blocks, "enable_gqa": case.heads != case.kv_heads}
    return lambda q, k, v: compiled(q, k, v, **options)


# ---- the flash-attn packages ----------------------------------------------------------------------------------------
FLASH_PACKAGES = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


def flash_packages(found: Peers, case: GpuCase, device: torch.device) -> None:
    for name, module_name in FLASH_PACKAGES.items():
        if case.kind == "block_diffusion" and module_name != "flash_attn.cute":
            found.absent[name] = "has no such mask"
            continue
        try:
            if case.kind == "block_diffusion":
                found.calls[name] = as_it_is, flash_4_block_diffusion(case, device)
                continue
            module = importlib.import_module(module_name)
            function = getattr(module, "flash_attn_varlen_func" if case.kind == "packed" else "flash_attn_func")
        except Exception as error:  # a package built for another torch may raise anything at import
            found.absent[name] = why(error)
            continue
        found.calls[name] = flash_call(function, case, device)


def flash_4_block_diffusion(case: GpuCase, device: torch.device) -> Attend:
    """Returns FlashAttention-4's CuTe kernels with the mask as a function of indices, and tables of blocks of 128 x 128
    for both directions, made outside the timing by FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    function = importlib.import_module("flash_attn.cute").flash_attn_func
    Tables = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    half, block = case.keys // 2, case.block

    @importlib.import_module("cutlass.cute").jit  # type: ignore[untyped-decorator]
    def mask(batch: Any, head: Any, q: Any, k: Any, lengths: Any, tensors: Any) -> Any:
        block_q, block_k = q % half // block, k % half // block
        own = (q < half) & (k < half) & (block_q == block_k)
        earlier = (k >= half) & ((block_k < block_q) | ((q >= half) & (block_k == block_q)))
        return own | earlier

    made = create_block_mask(
        mask_mod(case, device), 1, 1, case.queries, case.keys, device=str(device), BLOCK_SIZE=(128, 128)
    )
    forward = Tables(
        made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices, block_size=(128, 128)
    )
    backward = Tables(
        made.q_num_blocks, made.q_indices, made.full_q_num_blocks, made.full_q_indices, block_size=(128, 128)
    )
    options = {"mask_mod": mask, "block_sparse_tensors": forward, "block_sparse_tensors_bwd": backward}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return run


def flash_call(function: Callable[..., Any], case: GpuCase, device: torch.device) -> tuple[Layout, Attend]:
    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    if case.kind != "packed":
        return as_it_is, lambda q, k, v: first(function(q, k, v))
    lengths: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), boundaries(device))
    lengths |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(DOCUMENTS))
    return tokens_only, lambda q, k, v: first(function(q, k, v, **lengths))
