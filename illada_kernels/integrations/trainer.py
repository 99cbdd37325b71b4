"""masked_loss in the trainers of others: a data collator that masks, and a loss for models with an LM head.

    from illada_kernels.integrations.trainer import MaskedDiffusion, MaskingCollator
    class DiffusionTrainer(MaskedDiffusion, transformers.Trainer): ...
    trainer = DiffusionTrainer(model, arguments, train_dataset=data, data_collator=MaskingCollator(mask_id, pad_id))

A loop of your own calls `compute_loss(model, batch)` on what the collator gives. Nothing here imports transformers.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import expect_integer, expect_number
from ..ops.masked_loss import masked_loss, masked_loss_from_logits

__all__ = ["MaskedDiffusion", "MaskingCollator", "compute_loss"]

IGNORED = -100  # of labels, as everywhere in transformers
KEYS = ("input_ids", "labels", "attention_mask", "token_type_ids")


class MaskingCollator:
    """Pads token lists to a batch and masks it: each sequence draws a rate p, each of its tokens is masked with it.

    Parameters
    ----------
    mask_id, pad_id : int
    eps : float
        Smallest rate: p = (1 - eps) u + eps with u uniform.
    padding_side : str
        "right" or "left".
    generator : torch.Generator, optional
        None: torch's default, which Trainer seeds, in workers too.

    Notes
    -----
    Called with a list of {"input_ids": tokens}, optionally with "labels" as long, in which -100 marks what is never
    masked (prompts). Returns input_ids (B, S) with masks, attention_mask (B, S), labels (B, S), the clean token of
    everything that could have been masked and -100 elsewhere, and loss_weight (B, S) float32: 1 / p where a token
    is masked, 0 elsewhere.

    Source: LLaDA (arXiv 2502.09992), equation 3.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.integrations.trainer import MaskingCollator
    >>> batch = MaskingCollator(mask_id=9, pad_id=0)([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    >>> batch["labels"]
    tensor([[   5,    6,    7],
            [   8, -100, -100]])
    >>> torch.equal(batch["loss_weight"] > 0, batch["input_ids"] == 9)
    True
    """

    def __init__(
        self,
        mask_id: int,
        pad_id: int,
        *,
        eps: float = 1e-3,
        padding_side: str = "right",
        generator: torch.Generator | None = None,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f'padding_side: expected "right" or "left", got {padding_side!r}')
        expect_number("eps", eps)
        if not 0 < eps <= 1:
            raise ValueError(
                f"eps: expected a number in (0, 1], got {eps}; it is the smallest rate, and 1 / p a weight"
            )
        expect_integer("mask_id", mask_id, 0, 2**31 - 1)
        expect_integer("pad_id", pad_id, 0, 2**31 - 1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        if mask_id == pad_id:
            raise ValueError(f"pad_id: expected an id other than mask_id, got {pad_id} for both")
        self.mask_id, self.pad_id, self.eps = mask_id, pad_id, eps
        self.padding_side, self.generator = padding_side, generator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = self._rows(features)
        tokens = self._padded(rows["input_ids"], self.pad_id)
        batch = {"attention_mask": self._padded([torch.ones_like(row) for row in rows["input_ids"]], 0)}
        for key in ("attention_mask", "token_type_ids"):
            if key in rows:
                batch[key] = self._padded(rows[key], 0)
        labels = self._padded(rows["labels"], IGNORED) if "labels" in rows else tokens
        maskable = (batch["attention_mask"] != 0) & (labels != IGNORED)
        p = (1 - self.eps) * torch.rand(len(tokens), 1, generator=self.generator) + self.eps
        masked = (torch.rand(tokens.shape, generator=self.generator) < p) & maskable
        return batch | {
            "input_ids": tokens.masked_fill(masked, self.mask_id),
            "labels": tokens.masked_fill(~maskable, IGNORED),
            "loss_weight": masked / p,
        }

    def _rows(self, features: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
        """Returns the features by key, each of the length of its input_ids; raises TypeError or ValueError."""
        if len(features) == 0 or not all(isinstance(feature, Mapping) for feature in features):
            what = type(features[0]).__name__ if len(features) else "none"
            raise ValueError(f"features: expected a list of {{'input_ids': tokens}}, got {what}")
        keys = set(features[0])
        if unknown := sorted(keys - set(KEYS)):
            raise ValueError(f"features: expected keys among {', '.join(KEYS)}, got {unknown[0]!r}; drop the column")
        if "input_ids" not in keys:
            raise ValueError(f"features: expected the key 'input_ids', got {sorted(keys)}")
        if other := next((set(feature) for feature in features if set(feature) != keys), None):
            raise ValueError(f"features: expected the same keys in each, got {sorted(keys)} and {sorted(other)}")
        rows = {key: [_integers(key, feature[key]) for feature in features] for key in keys}
        for key in keys:
            for row, tokens in zip(rows[key], rows["input_ids"]):
                if len(row) != len(tokens):
                    raise ValueError(f"{key}: expected the length of input_ids, {len(tokens)}, got {len(row)}")
        return rows

    def _padded(self, rows: Sequence[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side
        )


def _integers(key: str, row: Any) -> Tensor:
    x = torch.as_tensor(row)
    if x.dim() != 1 or (x.is_floating_point() and len(x)) or x.is_complex():
        raise ValueError(f"{key}: expected a list of integers, got {x.dtype} of shape {tuple(x.shape)}")
    return x.to(torch.int64)


def compute_loss(
    model: Any,
    inputs: Mapping[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    *,
    shifted: bool = False,
    **options: Any,
) -> Any:
    """Computes sum of loss_weight * CE over masked tokens, divided by the number of tokens that could be masked.

    Parameters
    ----------
    model : torch.nn.Module
        With get_output_embeddings(), the LM head, a torch.nn.Linear that its forward calls. May be wrapped (DDP).
    inputs : mapping
        What `MaskingCollator` gives, on the model's device; all but labels and loss_weight go to the model.
    return_outputs : bool
        Return (loss, outputs); then the logits are computed, and the loss comes from them.
    num_items_in_batch : int or Tensor, optional
        The denominator, of all gradient-accumulation steps and ranks. None: labels other than -100 in this batch.
    shifted : bool
        Row i predicts token i + 1 (Dream).
    options
        Keyword arguments of `masked_loss`, such as forbid=(mask_id,) or memory_budget.

    Returns
    -------
    Tensor, or (Tensor, outputs)
        A float32 scalar.

    Raises
    ------
    TypeError, ValueError
        If the batch has no labels or loss_weight, or the model no head that can be fused.

    Notes
    -----
    The loss is computed inside the model's forward, in place of the head: logits of tokens that are not masked are
    never computed. A softcap of config.final_logit_softcapping is applied; other changes that the model makes to its
    logits raise. Synchronises once, as `masked_loss` does without max_masked, and once more for a model that is new.

    Examples
    --------
    >>> import transformers
    >>> from illada_kernels.integrations.trainer import MaskingCollator, compute_loss
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=10, **sizes))
    >>> batch = MaskingCollator(mask_id=9, pad_id=0, eps=0.999)([{"input_ids": [5, 6, 7]}])
    >>> compute_loss(model, batch).backward()
    """
    for key in ("labels", "loss_weight"):
        if key not in inputs:
            raise ValueError(f"inputs: expected {key!r}, got {sorted(inputs)}; collate with MaskingCollator")
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "loss_weight")}
    labels, weight = inputs["labels"], inputs["loss_weight"].float()
    denominator = (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if shifted:
        labels, weight = _next(labels, IGNORED), _next(weight, 0)
    targets = labels, weight > 0, weight / denominator
    if return_outputs:
        outputs = model(**rest)
        options.pop("memory_budget", None)
        return masked_loss_from_logits(_logits(outputs), *targets, **options), outputs
    inner = _unwrapped(model)
    head = _head(inner)
    softcap = getattr(getattr(inner, "config", None), "final_logit_softcapping", None)
    losses: list[Tensor] = []

    def fused(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != targets[0].shape:
            raise ValueError(
                f"model: expected hidden rows {tuple(targets[0].shape)} at its head, got {tuple(hidden.shape[:-1])}"
            )
        losses.append(masked_loss(hidden, head.weight, *targets, head_bias=head.bias, softcap=softcap, **options))
        return _instead(losses[-1], torch.ones_like(losses[-1])).expand(*hidden.shape[:-1], 1)

    with _forward(head, fused):
        outputs = model(**rest)
    if len(losses) != 1:
        raise ValueError(
            f"model: expected {type(inner).__name__}'s forward to call its head once, it called it {len(losses)} "
            "times; use return_outputs=True"
        )
    logits = _logits(outputs)
    if inner not in _checked:
        one = 1.0 if softcap is None else softcap * math.tanh(1 / softcap)
        if logits.shape[-1] != 1 or not bool(((logits - one).abs() < 1e-2).all()):  # bfloat16 rounds to 2**-8
            raise ValueError(
                f"model: expected logits that are what its head gives, but {type(inner).__name__} changes them (scale, "
                "bias or the like); use return_outputs=True"
            )
        _checked.add(inner)
    # gradients pass through the outputs, where DistributedDataParallel and FSDP look for them
    return _instead(logits.float().sum(), losses[0])


class MaskedDiffusion:
    """Gives a subclass of transformers' Trainer `compute_loss`: class DiffusionTrainer(MaskedDiffusion, Trainer).

    Attributes
    ----------
    shifted : bool
        Row i predicts token i + 1 (Dream).
    loss_options : dict
        Keyword arguments of `masked_loss`.

    Raises
    ------
    ValueError
        When it is made, where Trainer would use torch.nn.DataParallel.

    Notes
    -----
    The denominator counts the tokens of all gradient-accumulation steps, and of all ranks with Trainer's
    average_tokens_across_devices, as iLLaDA's loss does. Evaluation draws masks too, so its loss varies.

    Examples
    --------
    >>> import transformers
    >>> from illada_kernels.integrations.trainer import MaskedDiffusion
    >>> class DiffusionTrainer(MaskedDiffusion, transformers.Trainer):
    ...     shifted, loss_options = True, {"forbid": (9,)}
    >>> DiffusionTrainer.compute_loss is MaskedDiffusion.compute_loss
    True
    """

    shifted: bool = False
    loss_options: Mapping[str, Any] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of the whole step
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU a process, got {trainer.args.n_gpu} (torch.nn.DataParallel); start it with "
                "torchrun, or name one in CUDA_VISIBLE_DEVICES"
            )

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        options = {"shifted": self.shifted, **self.loss_options}
        found = compute_loss(model, inputs, return_outputs, num_items_in_batch, **options)
        trainer: Any = self
        if num_items_in_batch is None or not trainer.args.average_tokens_across_devices:
            return found
        # gradients are averaged over ranks, but the sum is over all of them
        ranks = trainer.accelerator.num_processes // getattr(trainer, "get_tp_size", lambda: 1)()
        return (found[0] * ranks, found[1]) if return_outputs else found * ranks


_checked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _logits(outputs: Any) -> Tensor:
    """Returns the logits of a model's outputs: by their name, or the first of a tuple."""
    if isinstance(outputs, dict) and "logits" not in outputs:
        raise ValueError(
            f"model: expected an output named 'logits', got {', '.join(outputs)}; use masked_loss in its code"
        )
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def _instead(x: Tensor, value: Tensor) -> Tensor:
    """Returns `value`, with x as another parent in autograd's graph, to which it gives zeros."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, value)


def _next(x: Tensor, last: int) -> Tensor:
    """Gives row i what row i + 1 had."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], dim=1)


def _unwrapped(model: Any) -> Any:
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), torch.nn.Module):
        model = inner
    return model


def _head(model: Any) -> torch.nn.Linear:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, torch.nn.Linear):
        raise TypeError(
            f"model: expected {type(model).__name__}.get_output_embeddings() to give the LM head, a torch.nn.Linear, "
            f"got {type(head).__name__}; use masked_loss_from_logits on its logits"
        )
    return head


@contextlib.contextmanager
def _forward(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Gives a module another forward for a while."""
    was_there, before = "forward" in vars(module), vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if was_there:
            vars(module)["forward"] = before
        else:
            del vars(module)["forward"]
