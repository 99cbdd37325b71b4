"""`record`: trajectories of a model's own sampler, and of a student that a teacher takes over from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..decoding.config import GenerationConfig
from ..decoding.fill import fill
from ..decoding.generate import generate
from ..decoding.loop import Step
from ..decoding.samplers import ALONE, of_model
from ..decoding.settings import checked, resolve_block_length, seeds_of
from ..errors import PromptError
from ..model import Model
from .trajectories import Trajectory, best


def record(
    model: Model,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    *,
    draws: int = 1,
    keep: int | None = None,
    teacher: Model | None = None,
    batch_size: int = 8,
) -> Iterator[list[Trajectory]]:
    """Returns, for each prompt, the trajectories that were kept: what a sampler wrote and in which pass.

    Parameters
    ----------
    model : Model
    prompts : iterable of sequences of int
        Read as they are needed.
    config : GenerationConfig
        How to decode. `seed`, an int, and the draw's number give a draw its noise: draws differ only with a temperature
        or a rank_temperature.
    draws : int
        Trajectories made of each prompt.
    keep : int, optional
        How many of them are kept, those of highest bound (`best`). None: all.
    teacher : Model, optional
        Takes over: the model decodes up to a pass drawn uniformly from 1 .. its passes, then the teacher fills what is
        masked, one token a pass, without noise. `first` is the teacher's first pass, so that training shows states that
        the model's own sampler reaches and learns what the teacher makes of them.
    batch_size : int
        Sequences decoded at a time.

    Returns
    -------
    iterator of lists of Trajectory
        In the order of the prompts, best first, each list as soon as its batch is done.

    Raises
    ------
    PromptError
        As `generate`; for settings with which tokens change after they were committed, or whose confidence is not the
        committed tokens' probability; with `teacher` for blocks that appear one by one.
    ValueError
        For draws, keep or batch_size that cannot be.

    Notes
    -----
    The bound is the sum of log p(token | state) over what was committed, from the confidences of decoding, so it costs
    nothing. It is what a sampler with this order gives the text, Seed Diffusion's criterion (arXiv 2508.02193) where
    each trajectory is judged by the states that it went through.

    Examples
    --------
    >>> import torch
    >>> from illada import GenerationConfig, Model, ModelConfig, record
    >>> _ = torch.manual_seed(0)
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> [kept] = record(model, [[72, 105]], GenerationConfig(max_new_tokens=4), draws=2, keep=1)
    >>> len(kept), sorted(kept[0].order)
    (1, [1, 2, 3, 4])
    """
    for name, value in (("draws", draws), ("keep", draws if keep is None else keep), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if keep is not None and keep > draws:
        raise ValueError(f"keep: expected at most draws = {draws}, got {keep}; draw more, or keep fewer")
    _check(model, config, teacher)
    return _recorded(model, prompts, config, draws, draws if keep is None else keep, teacher, batch_size)


def _recorded(
    model: Model,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    draws: int,
    keep: int,
    teacher: Model | None,
    batch_size: int,
) -> Iterator[list[Trajectory]]:
    rows = ((list(prompt), number) for number, prompt in enumerate(p for p in prompts for _ in range(draws)))
    [seed] = seeds_of(config.seed, 1)
    made: list[Trajectory] = []
    while some := list(itertools.islice(rows, batch_size)):
        seeded = dataclasses.replace(config, seed=[(seed + number) % 2**64 for _, number in some])
        made += _decoded(model, [prompt for prompt, _ in some], seeded, teacher)
        while len(made) >= draws:
            yield best(made[:draws], keep)
            made = made[draws:]


def _check(model: Model, config: GenerationConfig, teacher: Model | None) -> None:
    if (sampler := of_model(config, model.config).sampler) in ALONE:
        default = ", the default of a model with next_token" if config.sampler is None else ""
        raise PromptError(f"sampler: expected one that fills masks pass by pass, got {sampler!r}{default}")
    c = checked(config, model.config)
    if c.revise is not None:
        raise PromptError("revise: expected None, because the tokens of a trajectory stay what they were committed as")
    if c.end_early:
        raise PromptError("end_early: expected False, because it writes tokens that no pass has committed")
    if c.confidence != "probability" or c.confidence_temperature != 1:
        raise PromptError(
            "confidence: expected 'probability' at confidence_temperature 1, of which the bound is the sum, got "
            f"{c.confidence!r} at {c.confidence_temperature}"
        )
    if teacher is None:
        return
    if teacher.config.causal_block or (c.variable_length and c.max_new_tokens > resolve_block_length(c, model.config)):
        raise PromptError("teacher: expected a model that sees everything, and all masks visible from the start")
    if (teacher.config.vocab_size, teacher.config.mask_id) != (model.config.vocab_size, model.config.mask_id):
        raise PromptError(
            f"teacher: expected vocab_size {model.config.vocab_size} and mask_id {model.config.mask_id} like the "
            f"model's, got {teacher.config.vocab_size} and {teacher.config.mask_id}"
        )


class _Orders:
    """`generate`'s callback: the pass that committed each column, and log p of what was committed."""

    def __init__(self) -> None:
        self.tokens, self.starts = torch.zeros(0, 0), list[int]()
        self.order, self.log_p = torch.zeros(0, 0), torch.zeros(0, 0)

    def __call__(self, step: Step) -> None:
        if not self.starts:
            self.tokens, self.starts = step.tokens, step.starts
            self.order = torch.zeros_like(step.tokens)
            self.log_p = torch.zeros(step.tokens.shape, dtype=torch.float64, device=step.tokens.device)
        number = self.order.amax(1, keepdim=True) + 1
        at = step.positions.clamp(min=0)
        self.order.scatter_add_(1, at, torch.where(step.committed, number, 0))
        self.log_p.scatter_add_(1, at, torch.where(step.committed, step.confidence.double().log(), 0.0))

    def rows(self) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Yields (tokens, orders, log p) of each sequence, from its first token on."""
        columns = (self.tokens.cpu(), self.order.cpu(), self.log_p.cpu())
        for b, start in enumerate(self.starts):
            tokens, order, log_p = (x[b, start:] for x in columns)
            yield tokens.tolist(), order.tolist(), log_p


def _decoded(
    model: Model, prompts: list[list[int]], config: GenerationConfig, teacher: Model | None
) -> list[Trajectory]:
    seen = _Orders()
    generate(model, prompts, config, seen)
    c = checked(config, model.config)
    block = resolve_block_length(c, model.config)
    appears = block if (c.variable_length or model.config.causal_block) and block < c.max_new_tokens else 0
    mask, made = model.config.mask_id, []
    for prompt, (tokens, order, log_p) in zip(prompts, seen.rows()):
        end = len(tokens)
        if appears and max(order) > 0:  # blocks that were never begun are not there
            whole = 0 if model.config.causal_block else len(prompt)
            last = max(i for i, k in enumerate(order) if k > 0)
            end = min(end, whole + -(-(last + 1 - whole) // block) * block)
        response, orders = tokens[len(prompt) : end], order[len(prompt) : end]
        orders = [-1 if token == mask else k for token, k in zip(response, orders)]
        shown = 0 if model.config.causal_block else appears
        made.append(Trajectory(prompt, response, orders, float(log_p.sum()), shown))
    return made if teacher is None else _taken_over(teacher, made, c)


def _taken_over(teacher: Model, made: list[Trajectory], config: GenerationConfig) -> list[Trajectory]:
    """Returns the trajectories with what the teacher fills in from a pass on that is drawn for each."""
    seeds = list(config.seed)  # type: ignore[arg-type]  # one for each, says `record`
    firsts = [
        int(torch.randint(1, max(t.order) + 1, (), generator=torch.Generator().manual_seed(seed % 2**63), device="cpu"))
        for t, seed in zip(made, seeds)
    ]
    mask, seen = teacher.config.mask_id, _Orders()
    states = [
        t.prompt + [mask if k >= first or k < 0 else token for token, k in zip(t.response, t.order)]
        for t, first in zip(made, firsts)
    ]
    at_once = resolve_block_length(config, teacher.config)
    fill(teacher, states, GenerationConfig(block_length=at_once, forbid=config.forbid), seen)
    taken = []
    for t, first, (tokens, order, log_p) in zip(made, firsts, seen.rows()):
        own = order[len(t.prompt) :]
        orders = [k + first - 1 if k else old for k, old in zip(own, t.order)]
        taken.append(Trajectory(t.prompt, tokens[len(t.prompt) :], orders, float(log_p.sum()), 0, first))
    return taken
