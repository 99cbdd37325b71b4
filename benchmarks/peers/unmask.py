"""Who else makes a decoding step: LLaDA's loop, what a careful user writes, both compiled, FlashInfer's sampling.

A step takes (logits, tokens, k, mask_id, temperature), commits the k most confident of each sequence's proposals into
`tokens` (B, K) and returns them. Logits are given; the product with the head before them is the caller's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..machine import gpu_limits
from ..measure import why

Step = Callable[[Tensor, Tensor, int, int, float], Tensor]


def llada_step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, temperature: float) -> Tensor:
    """Takes one step of LLaDA's generate.py with low_confidence remasking: float64 Gumbel noise over all logits,
    argmax, softmax in the logits' dtype, gather, and a top-k for each sequence."""
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
    """Takes the step that a careful user writes: masked rows only, exponential race in float32, log-sum-exp instead of
    softmax, one batched top-k."""
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


def truncated(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Runs Hugging Face's processors in their order: float32 logits / temperature, -inf where they drop."""
    scores = logits.float() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        rising, ids = scores.sort(-1)
        dropped = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, ids, dropped), -torch.inf)
    if min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return scores


def truncated_step(temperature: float, **options: float) -> Callable[..., Tensor]:
    """Takes device_step with the proposal drawn from what Hugging Face's processors leave."""

    def step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, *_: float) -> Tensor:
        scores = truncated(logits, temperature, **options)  # type: ignore[arg-type]
        proposal = (scores - torch.empty_like(scores).exponential_().log_()).argmax(-1)
        chosen = logits.gather(-1, proposal[..., None])[..., 0]
        return commit(proposal, (chosen - logits.logsumexp(-1)).exp(), tokens, k, mask_id)

    return step


def renoised_step(logits: Tensor, tokens: Tensor, gamma: float, temperature: float) -> Tensor:
    """Takes DiffusionGemma's step (transformers): draw, accept by rising entropy, redraw the rest."""
    scores = logits.float() / temperature
    p = scores.softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    drawn = (scores - torch.empty_like(scores).exponential_().log_()).argmax(-1)
    rising, order = entropy.sort(-1)
    kept = torch.zeros_like(rising, dtype=torch.bool).scatter(-1, order, rising.cumsum(-1) - rising <= gamma)
    return tokens.copy_(torch.where(kept, drawn, torch.randint_like(tokens, logits.shape[-1])))


def commit(proposal: Tensor, confidence: Tensor, tokens: Tensor, k: int, mask_id: int) -> Tensor:
    """Commits the k most confident of (B, K) proposals, without the host."""
    masked = tokens == mask_id
    chosen = torch.where(masked, confidence, -torch.inf).topk(k, -1).indices
    return tokens.scatter_(1, chosen, torch.where(masked, proposal, tokens).gather(1, chosen))


def device_step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, temperature: float) -> Tensor:
    """Takes float32_step for a GPU: all rows, nothing read by the host, noise in float32 whatever the logits are."""
    wide = logits.float()
    noised = wide - temperature * torch.empty_like(wide).exponential_().log_() if temperature > 0 else wide
    proposal = noised.argmax(-1)
    chosen = wide.gather(-1, proposal[..., None])[..., 0]
    return commit(proposal, (chosen - wide.logsumexp(-1)).exp(), tokens, k, mask_id)


def flashinfer_step() -> Step:
    sampling = importlib.import_module("flashinfer.sampling")
    one = torch.ones(1, dtype=torch.int64, device="cuda")  # a seed on the device, so that graphs can capture it

    def step(logits: Tensor, tokens: Tensor, k: int, mask_id: int, temperature: float) -> Tensor:
        wide = logits.reshape(-1, logits.shape[-1]).float() / temperature
        proposal = sampling.sampling_from_logits(wide, seed=one, offset=one).long()
        confidence = (wide.gather(-1, proposal[:, None])[:, 0] - wide.logsumexp(-1)).exp()
        return commit(proposal.view(tokens.shape), confidence.view(tokens.shape), tokens, k, mask_id)

    return step


def sequences_at_a_time(batch: int, count: int, vocab: int) -> int:
    """Returns how many sequences LLaDA's loop can take at once: at temperature > 0 it holds five float64 tensors of
    logits, for which half of the GPU's memory is meant."""
    each = 5.0 * 8 * count * vocab
    return max(1, min(batch, int(gpu_limits()["memory"] / 2 / each)))


def find(temperature: float, compiled: bool, quick: bool = False) -> tuple[dict[str, Step], dict[str, str]]:
    """Returns ({name: step}, {name: why it is absent}); `quick`: without LLaDA's loop, which is never the fastest."""
    steps: dict[str, Step] = {"float32": device_step} if quick else {"LLaDA's loop": llada_step, "float32": device_step}
    absent: dict[str, str] = {}
    if compiled:
        torch._dynamo.reset()
        steps["LLaDA's loop, compiled"] = torch.compile(llada_step, dynamic=False)
        steps["float32, compiled"] = torch.compile(device_step, dynamic=False)
    if temperature > 0:
        try:
            steps["FlashInfer"] = flashinfer_step()
        except Exception as error:  # a package built for another torch may raise anything at import
            absent["FlashInfer"] = why(error)
    return steps, absent
