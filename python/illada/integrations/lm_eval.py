"""The model "illada" of lm-evaluation-harness 0.4.13 and 0.5: likelihoods and answers of a checkpoint folder.

    python -m illada.integrations.lm_eval --model_args pretrained=FOLDER,method=confidence --tasks arc_easy

takes every option of the harness's own command; `illada eval --tasks` is the short form.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..chat import ChatTemplate, load_chat_template
from ..decoding.config import GenerationConfig
from ..decoding.generate import generate
from ..decoding.settings import guidance_of
from ..likelihood import METHODS, is_greedy, log_likelihood, longest_pair, read_as
from ..tokenizer_config import begun, bos_of, special_id
from ..training.runs import open_model
from .harness_settings import cut, expect_known, generation

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import make_table as make_table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is missing: pip install 'lm_eval>=0.4.13'") from None

_log = logging.getLogger(__name__)


class IlladaLM(LM):
    """A checkpoint folder as lm-evaluation-harness sees a model.

    Parameters
    ----------
    pretrained : str
        The folder: of Hugging Face, or a run's.
    device, dtype : str
        dtype "auto": that of the stored weights.
    method, samples, guidance, seed, rows_per_pass
        As in `illada.log_likelihood`; without a method autoregressive models and those with `next_token` are read from
        left to right, others by "monte_carlo". Generation takes guidance and seed too, and as many sequences at a time
        as fit into rows_per_pass.
    mask_id : int, optional
        The mask token, where config.json does not name it. Autoregressive models need none.
    check_greedy : bool
        Find out whether a continuation is the greedy one, which tasks with exact matches of continuations need. It
        costs one more forward pass for most pairs.
    max_gen_toks : int
        Tokens to generate where a task does not say.
    batch_size : int or str
        At most so many sequences in a batch of generation. 1, the harness's default, and "auto" set no limit.
    add_bos_token : bool, optional
        Begin contexts with the BOS token, once: a chat template may have written it. None: as the folder's tokenizer
        does by itself, which is what the harness's own models do.
    chat_template : str
        Which of the folder's chat templates `--apply_chat_template` uses.
    **settings
        Fields of `GenerationConfig` for all tasks, such as block_length, steps_per_block or cache. The harness's
        `--gen_kwargs` and a task's generation_kwargs come before them.

    Raises
    ------
    ValueError
        For settings that are not known.

    Notes
    -----
    What does not fit into max_seq_len loses its first tokens, with a warning, as for the harness's own models. A
    continuation or an answer that does not fit by itself is an error that names the request, before anything is scored.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        method: str | None = None,
        samples: int = 128,
        guidance: float = 0.0,
        seed: int = 0,
        rows_per_pass: int = 4096,
        check_greedy: bool = True,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        chat_template: str = "default",
        mask_id: int | None = None,
        add_bos_token: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        expect_known("model_args", settings)
        if method is not None and method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if add_bos_token not in (None, True, False):
            raise ValueError(f"add_bos_token: expected True, False or None, got {add_bos_token!r}")
        guidance = guidance_of(guidance)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        overrides = {} if mask_id is None else {"mask_id": int(mask_id)}
        self.model, self.coder = open_model(pretrained, device, dtype, **overrides)
        config = self.model.config
        method = method or ("autoregressive" if config.autoregressive or config.next_token else "monte_carlo")
        self.folder, self._device, self.check_greedy = Path(pretrained), torch.device(device), check_greedy
        self.scoring: dict[str, Any] = {"method": method, "samples": samples, "guidance": guidance, "seed": seed}
        self.rows_per_pass, self.max_gen_toks = rows_per_pass, max_gen_toks
        self.settings = {"guidance": guidance, "seed": seed, **settings}
        limit = max_batch_size if batch_size == "auto" else int(batch_size)
        self.batch_limit = limit if limit and limit > 1 else 2**31
        self.template_name = chat_template
        self.template: ChatTemplate | None = None
        self.bos = bos_of(self.folder, self.coder, add_bos_token)
        from_left = config.shifted_logits or (config.next_token and method == "autoregressive")
        self.prefix = self.bos or (self._first() if from_left or config.next_token else [])
        self.least = int(from_left)  # tokens before what is scored
        self.longest = longest_pair(read_as(config, method))

    def _first(self) -> list[int]:
        """Returns what an empty context is for a model whose first row predicts nothing: BOS, else the end of a text.

        As the tokenizer names them, as in the harness, else config.json.
        """
        config = self.model.config
        named = [special_id(self.folder, self.coder, role) for role in ("bos_token", "eos_token")]
        ids = [*named, config.hf.get("bos_token_id"), config.eos_id]
        return [i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size][:1]

    # ---- chat ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Returns the name by which the harness's caches of requests know the tokenizer."""
        return str(self.folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template's source, for the record of the results."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            self.template_name = chat_template
        return self._template().source

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, whose special tokens are special from then on."""
        return self._template().render(chat_history, add_generation_prompt)

    def _template(self) -> ChatTemplate:
        if self.template is None:
            self.template = load_chat_template(self.folder, self.template_name)
        return self.template

    def encode(self, text: str) -> list[int]:
        """Returns a text's ids, to which BOS is not added."""
        return [int(i) for i in self.coder.encode(text.encode(), special=self.template is not None)]

    # ---- likelihood ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, is greedy) for each (context, continuation)."""
        pairs = self._fitting([self._pair(*request.args) for request in requests])
        found = self._score(pairs, self.check_greedy, disable_tqdm)
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Returns the log-likelihood of each text, in windows of max_seq_len; with 0.5's requests (it, False)."""
        texts = [begun(self.encode(request.args[-1]), self.prefix)[len(self.prefix) :] for request in requests]
        windows = [list(self._windows(ids)) for ids in texts]
        found = iter(self._score([pair for text in windows for pair in text], False, disable_tqdm))
        answers: list[Any] = []
        for request, text in zip(requests, windows):
            total = sum(next(found)[0] for _ in text)
            answers.append(total if len(request.args) == 1 else (total, False))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes both as one text; white space at the context's end belongs to the continuation, as in the harness."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        first = self.bos if bare else self.prefix
        before, whole = (begun(self.encode(text), first) for text in (bare, bare + continuation))
        return before, whole[len(before) :]

    def _fitting(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        """Cuts contexts from the left, with a warning; raises ValueError for a continuation that does not fit."""
        length, least = self.longest, self.least
        for i, (_, ids) in enumerate(pairs):
            if least + len(ids) > length:
                raise ValueError(
                    f"request {i}: expected a continuation of at most {length - least} tokens, for which the model has "
                    f"room (max_seq_len = {self.model.config.max_seq_len}), got {len(ids)}, which begin with "
                    f"{self.coder.decode(ids[:16])[:60]!r}; leave its document out (--samples), or shorten it"
                )
        self._warn([len(context) + len(ids) - length for context, ids in pairs])
        return [(context[max(len(context) + len(ids) - length, 0) :], ids) for context, ids in pairs]

    def _warn(self, over: Sequence[int]) -> None:
        cut = [i for i, tokens in enumerate(over) if tokens > 0]
        if cut:
            most = max(cut, key=lambda i: over[i])
            _log.warning(
                "%d of %d requests exceed max_seq_len = %d and lose their first tokens; request %d the most, %d",
                *(len(cut), len(over), self.model.config.max_seq_len, most, over[most]),
            )

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (context, continuation) so that every token counts once and the last one sees all it can."""
        length, start = self.longest, 0
        while start < len(ids):
            end = min(start + length - (1 if start else max(len(self.prefix), self.least)), len(ids))
            yield (ids[max(end - length, 0) : start] if start else self.prefix), ids[start:end]
            start = end

    def _score(self, pairs: list[tuple[list[int], list[int]]], greedy: bool, quiet: bool) -> list[tuple[float, bool]]:
        if self.model.config.mask_id < 0 and any(ids and not context for context, ids in pairs):
            raise ValueError(
                "a request has no context: expected bos_token_id or eos_token_id in config.json, after which the first "
                "token comes"
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # what may not fit first
        with tqdm(total=len(pairs), desc="log-likelihood", disable=quiet) as bar:
            for chunk in (order[i : i + 64] for i in range(0, len(order), 64)):
                contexts, continuations = zip(*(pairs[i] for i in chunk))
                rows = self.rows_per_pass
                nats = log_likelihood(self.model, contexts, continuations, rows_per_pass=rows, **self.scoring)
                how = (self.model, contexts, continuations, rows, self.scoring["method"])
                same = is_greedy(*how) if greedy else [False] * len(chunk)
                for i, value, match in zip(chunk, nats.tolist(), same):
                    found[i] = (value, match)
                bar.update(len(chunk))
        return found

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each (context, settings), cut before the first of the strings in "until"."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():  # before anything is decoded
            config, _, size = self._generation(requests[group[0]].args[1])
            if self.model.config.max_seq_len - config.max_new_tokens < 1:
                raise ValueError(
                    f"max_gen_toks: expected less than the model's max_seq_len = {self.model.config.max_seq_len}, "
                    f"got {size} for request {group[0]}"
                )
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm) as bar:
            for group in groups.values():
                config, until, size = self._generation(requests[group[0]].args[1])
                room = self.model.config.max_seq_len - config.max_new_tokens
                whole = {i: begun(self.encode(requests[i].args[0]), self.bos) or self.prefix for i in group}
                self._warn([len(whole.get(i, ())) - room for i in range(len(requests))])
                prompts = {i: ids[-room:] for i, ids in whole.items()}
                for batch in self._batches(prompts, config.max_new_tokens):
                    seeds = [config.seed + i for i in batch]  # type: ignore[operator]
                    # An answer depends on its request alone, and ends with the block that holds one of `until`.
                    one = dataclasses.replace(config, seed=seeds, stop_when=self._holds(until) if until else None)
                    done = generate(self.model, [prompts[i] for i in batch], one)
                    for i, tokens in zip(batch, done.tokens):
                        answers[i] = cut(self.coder.decode(tokens[:size]), until)
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    bar.update(len(batch))
        return answers

    def _holds(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        return lambda ids: any(stop in self.coder.decode(ids) for stop in until)

    def _batches(self, prompts: Mapping[int, list[int]], new: int) -> Iterator[list[int]]:
        """Yields requests of similar length, as many as fit into rows_per_pass."""
        order = sorted(prompts, key=lambda i: -len(prompts[i]))
        while order:
            fit = max(self.rows_per_pass // (len(prompts[order[0]]) + new), 1)
            count = min(fit, self.batch_limit)
            yield order[:count]
            order = order[count:]

    def _generation(self, asked: Mapping[str, Any]) -> tuple[GenerationConfig, list[str], int]:
        """Returns the settings, the strings that end an answer, and the tokens of an answer."""
        return generation(asked, self.settings, self.model.config, self.max_gen_toks)


def evaluate(model: IlladaLM, tasks: Sequence[str], include_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Runs the harness's `simple_evaluate` with a model; returns its results.

    Parameters
    ----------
    model : IlladaLM
    tasks : sequence of str
        Names of tasks, or paths of YAML files.
    include_path : str, optional
        A folder with more tasks.
    **options
        Of simple_evaluate, such as limit, num_fewshot or apply_chat_template.

    Returns
    -------
    dict
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    return lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the harness's command with "illada" as its model."""
    from lm_eval.__main__ import cli_evaluate

    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[:1] if given and not given[0].startswith("-") else ["run"]
    rest = given[1:] if command == given[:1] else given
    if command == ["run"] and not any(a.partition("=")[0] in ("--model", "-M") for a in rest):
        rest = ["--model", "illada", *rest]
    sys.argv = ["lm_eval", *command, *rest]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    from illada.integrations.lm_eval import main as run  # the model is registered by its importable name

    raise SystemExit(run())
register_model("illada")(IlladaLM)
