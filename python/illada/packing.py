"""Packed linear layers for decoding on a CPU: oneDNN's layout of the weights, or int8 and int4 weights, by torch."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .model import Model

DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS = ("same", "int8", "int4")
GROUP = 32  # entries of a row that share an int4 scale
IDS = 16  # torch's int4 kernel takes a multiple of these rows of weights


class PackedLinear(nn.Module):
    """Computes x W^T + b with W in oneDNN's blocked layout. It has no derivative, and is neither moved nor saved.

    Copies share the packed weights, which nothing writes. Their layout is this processor's.
    """

    def __init__(self, linear: nn.Linear, rows: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.bias = None if linear.bias is None else linear.bias.detach()
        with torch.no_grad():
            self.packed = self.pack(linear.weight.detach(), rows)

    def pack(self, weight: Tensor, rows: int) -> Any:
        """Returns the weight as `product` takes it."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def product(self, x: Tensor) -> Tensor:
        """Returns x W^T + b for x (..., D)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "pack: packed layers have no derivative; call the model under torch.no_grad(), or train it before"
            )
        return self.product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"

    def _apply(self, function: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError("pack: packed layers stay where they are, in their dtype; use .to() before packing")

    def _save_to_state_dict(self, *arguments: Any) -> NoReturn:
        raise RuntimeError("pack: packed weights cannot be saved; save the model before packing")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError("pack: packed weights cannot be pickled (torch.save); save the model before packing")

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        new = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.packed)] = new, self.packed
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


class Int8Linear(PackedLinear):
    """W is round(W / s) in int8, s = max |W| / 127 of each row; products in x's dtype, summed in float32."""

    def pack(self, weight: Tensor, rows: int) -> Any:
        scale = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight.float() / scale[:, None]).round().to(torch.int8), scale.to(weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), *self.packed)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int4Linear(PackedLinear):
    """W is (q - 8) s + z with q in 0 .. 15, s and z of each GROUP entries of a row; products in x's dtype."""

    def pack(self, weight: Tensor, rows: int) -> Any:
        groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K / GROUP, GROUP)
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low).clamp(min=1e-6) / 15
        q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
        scales = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).to(weight.dtype).contiguous()
        return torch._convert_weight_to_int4pack_for_cpu(q, 1), scales  # (K / GROUP, N, 2)

    def product(self, x: Tensor) -> Tensor:
        q, scales = self.packed
        y = torch._weight_int4pack_mm_for_cpu(x.reshape(-1, self.in_features), q, GROUP, scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def fast_dtype(device: str) -> str:
    """Returns the dtype in which this device multiplies fastest: bfloat16 on a GPU, and on a CPU with AMX or AVX-512
    BF16; else float32."""
    if not device.startswith("cpu"):
        return "bfloat16"
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bfloat16" if any(probe is not None and probe() for probe in probes) else "float32"


def reason(model: Model, weights: str = "same") -> str | None:
    """Returns None, or why this model's layers cannot be packed here."""
    if model.device.type != "cpu":
        return f"packs for a CPU, the model is on {model.device}"
    if model.dtype not in DTYPES:
        return f"takes float32 and bfloat16, not {model.dtype}"
    if weights == "same":
        here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        return None if here else "this torch was built without oneDNN's packed layers"
    if model.dtype != torch.bfloat16:
        return (
            f"{weights} takes bfloat16, because torch's {weights} products are far slower than plain ones in float32; "
            "load the model in bfloat16 (--dtype bfloat16)"
        )
    if not hasattr(torch, "_weight_int8pack_mm" if weights == "int8" else "_weight_int4pack_mm_for_cpu"):
        return f"this torch has no {weights} products for a CPU"
    for name, linear in _linears(model):
        if weights == "int4" and (linear.in_features % GROUP or linear.out_features % IDS):
            return (
                f"int4 takes layers whose widths are multiples of {GROUP} and {IDS}, {name} has {linear.in_features} "
                f"and {linear.out_features}"
            )
    return None


def _linears(model: Model) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for layer in model.layers for n, m in layer.named_children() if isinstance(m, nn.Linear)]


@torch.no_grad()
def pack(model: Model, rows: int = 32, weights: str = "same") -> Model:
    """Packs the linear layers of a model on a CPU, in place, for decoding.

    Parameters
    ----------
    model : Model
        On a CPU, float32 or bfloat16.
    rows : int
        Rows of a usual pass, for which oneDNN chooses the layout. Others work too.
    weights : str
        "same": as they are, in oneDNN's layout. "int8": rounded, with a scale a row. "int4": rounded, with a scale and
        an offset for each 32 entries. Both take bfloat16, and run in torch's weight-only kernels: less memory, faster
        with a few rows, slower from some 16 rows on.

    Returns
    -------
    Model
        The same one.

    Raises
    ------
    ValueError
        For a model that is not on a CPU, or of another dtype or width, or a torch without these products.

    Notes
    -----
    Memory: packed weights replace the plain ones, one layer after the other. "same" rounds as oneDNN does, within
    float32's or bfloat16's rounding of torch's. Embedding and LM head stay as they are. A packed model can neither be
    trained nor saved nor moved; copy.deepcopy shares its packed weights. docs/measurements/model.md has what each costs
    and gains.

    Examples
    --------
    >>> import torch
    >>> from illada import GenerationConfig, Model, ModelConfig, generate, pack
    >>> _ = torch.manual_seed(0)
    >>> model = pack(Model(ModelConfig.preset("demo", n_layers=1)).eval())
    >>> len(generate(model, [[72, 105]], GenerationConfig(max_new_tokens=4, stop_ids=())).tokens[0])
    4
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected an integer of at least 1, got {rows!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    if (why := reason(model, weights)) is not None:
        raise ValueError(f"pack: {why}")
    kind = {"same": PackedLinear, "int8": Int8Linear, "int4": Int4Linear}[weights]
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, kind(child, rows))
    return model
