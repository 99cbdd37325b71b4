"""Writes the figures of docs/guides/cluster.md between its markers:

    python -m benchmarks.report.cluster

A plan is arithmetic on the model's shape and on the rates below. None of it was measured here: rates are what such
cards have shown elsewhere or their datasheets say, and shares of them are the predictions of the first GPU run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from illada.config import ModelConfig

from .predictions import BACKWARD, FORWARD, RATES

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "cluster.md"
BEGIN, END = "<!-- plan: written by python -m benchmarks.report.cluster -->", "<!-- /plan -->"
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU in one direction: H200's datasheet, a 400 Gb/s adapter for each GPU
GPUS_PER_NODE = 8
SHARE = 0.85  # of the matmul rate, predicted for layers and head with all that lies between their matmuls
MASKED = 0.5  # mean of t over (0, 1)


@dataclass(frozen=True)
class Plan:
    """Full-sequence training, iLLaDA's windows, weights sharded over all GPUs (FSDP2), layers computed again."""

    model: ModelConfig
    gpus: int
    window: int = 8192
    windows: int = 1  # of a GPU in a micro-batch
    split: float = 0.3  # windows that are cut in two at a uniform place
    again: bool = True  # layers keep their input alone

    @property
    def tokens(self) -> int:
        """Returns tokens of a GPU in a micro-batch."""
        return self.window * self.windows

    @property
    def head(self) -> int:
        """Weights of the LM head, which are the embedding's too in iLLaDA."""
        return self.model.vocab_size * self.model.dim

    @property
    def body(self) -> int:
        """Weights of the layers."""
        return self.model.num_parameters - self.head * (1 if self.model.tie_embeddings else 2) - self.model.dim

    # ---- arithmetic of a token -------------------------------------------------------------------------------------

    def matmul_flops(self) -> float:
        """Layers: 2 a weight forward, 4 backward, 2 again. Head: 2, of masked tokens, three times."""
        return (6 + 2 * self.again) * self.body + 6 * MASKED * self.head

    def seen(self) -> float:
        """Returns the mean number of tokens that a token sees: of a window cut at u, u^2 + (1 - u)^2 of it, 2/3 on
        average."""
        return self.window * (1 - self.split / 3)

    def attention_flops(self) -> tuple[float, float]:
        """Counts forward (again too) and backward, as attention counts them: 4 and 10 a pair and channel."""
        c = self.model
        forward = 4 * self.seen() * c.n_heads * c.head_dim * c.n_layers
        return forward * (1 + self.again), 2.5 * forward

    def seconds_per_token(self, floor: bool) -> float:
        """Returns seconds at the matmul rate throughout (floor), or with attention at the middle of what is predicted
        for it."""
        forward, backward = self.attention_flops()
        if floor:
            return (self.matmul_flops() + forward + backward) / RATES["gemm"]
        rates = [sum(table["cuda"][self.model.head_dim]) / 2 * 1e12 for table in (FORWARD, BACKWARD)]
        return self.matmul_flops() / (SHARE * RATES["gemm"]) + forward / rates[0] + backward / rates[1]

    def compute(self) -> float:
        """Seconds of a micro-batch, predicted."""
        return self.tokens * self.seconds_per_token(floor=False)

    # ---- memory of a GPU, bytes ------------------------------------------------------------------------------------

    def state_bytes(self) -> float:
        """Counts what is sharded: float32 weights, their gradients and two moments."""
        return 16 * self.model.num_parameters / self.gpus

    def whole_bytes(self) -> float:
        """Counts what is whole for a while: the head in bfloat16 with its float32 gradient, two layers with one's
        gradient."""
        layer = self.body / self.model.n_layers
        return (2 + 4) * self.head + (2 * 2 + 4) * layer

    def activation_bytes(self) -> float:
        """Counts bfloat16: each layer's input; of one layer, or of all, what its backward reads beside it."""
        c = self.model
        inside = 6 * c.dim + 2 * c.n_kv_heads * c.head_dim + 3 * c.ffn_dim  # elements of a token
        layers = c.n_layers * c.dim + inside if self.again else c.n_layers * inside
        return 2 * self.tokens * layers

    def loss_bytes(self) -> float:
        """Counts masked_loss in one chunk: bfloat16 logits of the masked rows."""
        return 2 * MASKED * self.tokens * self.model.vocab_size

    def memory(self) -> float:
        return self.state_bytes() + self.whole_bytes() + self.activation_bytes() + self.loss_bytes()

    # ---- communication of a micro-batch, seconds --------------------------------------------------------------------

    def traffic(self) -> tuple[float, float]:
        """Returns (NVLink, network): weights gathered twice in bfloat16, gradients reduced once in float32.

        What enters a node is shared by its GPUs' adapters, then goes around over NVLink.
        """
        bytes_ = (2 * 2 + 4) * self.model.num_parameters * (self.gpus - 1) / self.gpus
        nodes = -(-self.gpus // GPUS_PER_NODE)
        network = bytes_ / GPUS_PER_NODE / NETWORK if nodes > 1 else 0.0
        return bytes_ / NVLINK, network

    def communication(self) -> float:
        return max(self.traffic())

    def exposed(self) -> float:
        """Returns what nothing hides: the first gather and the last reduction, of the embedding, and what exceeds
        computing."""
        edge = self.communication() * self.head / self.model.num_parameters
        return edge + max(0.0, self.communication() - edge - self.compute())

    def tokens_per_second(self) -> float:
        return self.gpus * self.tokens / (self.compute() + self.exposed())

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second() / 86400

    def hides_from(self) -> float:
        """Returns tokens of a GPU in a micro-batch from which on computing takes longer than communication."""
        return self.communication() / self.seconds_per_token(floor=False)

    # ---- other ways to share, seconds of a micro-batch ---------------------------------------------------------------

    def tensor_parallel(self, ranks: int) -> float:
        """Counts four reductions of hidden rows a layer, two forward and two backward, two more again; none is
        hidden."""
        rows = 2 * self.tokens * self.model.dim
        return (4 + 2 * self.again) * self.model.n_layers * 2 * rows * (ranks - 1) / ranks / NVLINK

    def ring_hop(self, ranks: int) -> tuple[float, float]:
        """Returns (keys and values passed on, the attention beside it), in seconds of a layer's forward."""
        c, mine = self.model, self.window / ranks
        passed = 2 * 2 * mine * c.n_kv_heads * c.head_dim / NVLINK
        rate = sum(FORWARD["cuda"][c.head_dim]) / 2 * 1e12
        return passed, 4 * mine * mine * c.n_heads * c.head_dim / rate


def table(tokens: float = 12e12) -> str:
    c = ModelConfig.preset("iLLaDA-8B")
    one = Plan(c, 64)
    forward, backward = one.attention_flops()
    lines = [
        "| of a token | GFLOP |",
        "|---|---:|",
        f"| layers, forward, backward and again: 8 x {one.body / 1e9:.2f} G weights | {8 * one.body / 1e9:.1f} |",
        f"| LM head, at masked tokens: 6 x {MASKED} x {one.head / 1e9:.3f} G | {6 * MASKED * one.head / 1e9:.1f} |",
        f"| attention over {one.seen():.0f} tokens, forward and again | {forward / 1e9:.1f} |",
        f"| attention, backward | {backward / 1e9:.1f} |",
        "",
        "| GPUs | memory of one, GB: sharded + whole + activations + logits | tokens/s: floor | predicted | days for "
        f"{tokens / 1e12:.0f}T | a micro-batch, ms: computing | NVLink | network | not hidden |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in (8, 64, 256, 1024):
        plan = Plan(c, gpus)
        parts = (plan.state_bytes(), plan.whole_bytes(), plan.activation_bytes(), plan.loss_bytes())
        memory = " + ".join(f"{part / 1e9:.1f}" for part in parts)
        ms = (plan.compute(), *plan.traffic(), plan.exposed())
        floor, predicted = gpus / plan.seconds_per_token(floor=True), plan.tokens_per_second()
        lines.append(
            f"| {gpus} | {plan.memory() / 1e9:.0f}: {memory} | {floor / 1e6:.2f} M | {predicted / 1e6:.2f} M | "
            f"{plan.days(tokens):.0f} | {' | '.join(f'{1e3 * s:.0f}' for s in ms)} |"
        )
    whole = Plan(c, 64, again=False)
    shares = [f"{ranks} ranks {1e3 * one.tensor_parallel(ranks):.0f} ms" for ranks in (2, 4, 8)]
    hops = [(ranks, *one.ring_hop(ranks)) for ranks in (2, 4, 8)]
    lines += [
        "",
        f"Communication hides from {Plan(c, 1024).hides_from():.0f} tokens a GPU and micro-batch on.",
        f"Layers that are not computed again keep {whole.activation_bytes() / 1e9:.0f} GB instead of "
        f"{one.activation_bytes() / 1e9:.0f} and save {1 - whole.compute() / one.compute():.0%} of the time.",
        f"The embedding is {one.head / c.num_parameters:.0%} of the weights.",
        f"A save holds 12 bytes a weight, {12 * c.num_parameters / 1e9:.0f} GB.",
        "",
        f"Tensor parallel divides {1e3 * one.compute():.0f} ms by its ranks and adds, over NVLink and unhidden: "
        f"{', '.join(shares)}.",
        "",
        "Context parallel passes keys and values on beside attention, a hop of a layer: "
        + ", ".join(f"{r} ranks {1e6 * a:.0f} us beside {1e6 * b:.0f}" for r, a, b in hops)
        + ".",
    ]
    return "\n".join(lines)


def updated(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
    sys.exit(0)
