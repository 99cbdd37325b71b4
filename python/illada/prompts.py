"""`illada generate`: prompts from arguments, a file or standard input; text block by block, or JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from illada_kernels import Edit, Remask, Threshold

from . import packing
from .chat import load_chat_template
from .decoding.config import GenerationConfig
from .decoding.decoder import Decoder, Finished
from .decoding.generate import Generation, generate
from .decoding.loop import Step
from .decoding.samplers import ALONE, of_model
from .errors import PromptError
from .live import LiveText
from .replay import Recorder
from .tokenizer import Tokenizer
from .tokenizer_config import begun, bos_of
from .training.runs import open_model


def run(options: argparse.Namespace) -> int:
    """Runs the command; statistics go to standard error."""
    if options.prompts is not None and (options.html or options.live):
        raise PromptError("prompts: --html and --live show what is given by --prompt; leave out one of them")
    for prompt in options.prompt or []:
        if not prompt:
            raise PromptError("prompt: it is empty; give at least one character, for example --prompt 'def '")
    if options.batch_size < 1:
        raise PromptError(f"batch_size: expected at least 1, got {options.batch_size}")
    if options.out and os.path.exists(options.out) and os.path.exists(options.prompts or ""):
        if os.path.samefile(options.out, options.prompts):
            raise PromptError(f"out: expected a file other than --prompts, got {options.out} for both")
    if options.out and options.html and os.path.realpath(options.out) == os.path.realpath(options.html):
        raise PromptError(f"out: expected a file other than --html, got {options.out} for both")
    config = config_of(options)
    for path in (options.html, options.out):  # before minutes of decoding
        if path:
            open(path, "a", encoding="utf-8").close()
    device = options.device
    dtype = packing.fast_dtype(device) if options.dtype == "fast" else options.dtype
    model, tokenizer = open_model(options.model, device, dtype)
    weights = options.weights or "same"
    if packed := options.weights is not None or packing.reason(model) is None:  # what was asked for says why not
        packing.pack(model, weights=weights)
    began = time.monotonic()
    with Output(options.out) as out:
        several = options.prompts is None and len(options.prompt) > 1 and not (options.html or options.live)
        if options.prompts is not None or several:
            counts = _stream(model, tokenizer, config, options, out)
        else:
            counts = _arguments(model, tokenizer, config, options, out)
    seconds = time.monotonic() - began
    tokens, passes, by_sequence = counts
    print(
        f"{tokens} tokens in {passes} passes, {tokens / max(by_sequence, 1):.2f} a pass of a sequence, "
        f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s, {dtype}"
        + (", packed layers" if packed else "")
        + (f", {weights} weights" if options.weights not in (None, "same") else ""),
        file=sys.stderr,
    )
    return 0


Counts = tuple[int, int, int]  # tokens, passes of the batch, passes summed over sequences


def config_of(options: argparse.Namespace) -> GenerationConfig:
    """Returns the settings that were said; raises PromptError for two that say the same thing."""
    said = dict(vars(options))
    fields = {f.name for f in dataclasses.fields(GenerationConfig)}
    values = {name: value for name, value in said.items() if name in fields}
    values["sampler_options"] = _pairs(said.get("sampler_option", []), "sampler-option", str)
    for name in ("logit_bias", "growing_bias"):
        if name in said:
            values[name] = _pairs(said[name], name.replace("_", "-"), int)
    if "threshold" in said:
        values["rule"] = Threshold(said["threshold"], said.get("at_least", 1))
    elif "at_least" in said:
        raise PromptError("at_least: expected --threshold beside it")
    if "edit" in said and "remask" in said:
        raise PromptError("edit: expected none with --remask; a pass either replaces tokens or takes them back")
    if "edit" in said:
        values["revise"] = Edit(said["edit"])
    if "remask" in said:
        values["revise"] = Remask(said["remask"])
    if "revise_steps" in said and not {"edit", "remask", "sampler"} & said.keys():
        raise PromptError("revise_steps: expected --edit or --remask beside it, which it limits")
    return GenerationConfig(**values)


def _pairs(texts: list[str], name: str, kind: Callable[[str], Any]) -> dict[Any, float]:
    pairs = {}
    for text in texts:
        key, _, number = text.partition("=")
        try:
            name_or_id, value = kind(key), float(number)
        except ValueError:
            raise PromptError(f"{name}: expected {'NAME' if kind is str else 'ID'}=NUMBER, got {text!r}") from None
        if name_or_id in pairs:
            raise PromptError(f"{name}: expected {key} once, got {text!r} as well")
        pairs[name_or_id] = value
    return pairs


def _encode(tokenizer: Tokenizer, text: str, options: argparse.Namespace) -> list[int]:
    content, folder = os.fsencode(text), Path(options.model)
    if options.chat:
        message = {"role": "user", "content": content.decode("utf-8", "replace")}
        content = load_chat_template(folder).render([message]).encode()
    return begun(tokenizer.encode(content, special=True).tolist(), bos_of(folder, tokenizer, options.add_bos_token))


class Output:
    """JSON lines in a file, which keeps what it held until the first one comes. Without a name nothing is written."""

    def __init__(self, name: str | None) -> None:
        self.name, self.file, self.begun = name, None if name is None else open(name, "a", encoding="utf-8"), False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self.file is not None:
            with self.file:
                if kind is None:  # all is done, be it nothing
                    self.begin()

    def begin(self) -> None:
        """Empties the file, once."""
        if not self.begun and self.name is not None and os.path.isfile(self.name):
            os.truncate(self.name, 0)
        self.begun = True

    def write(self, prompt: str, text: str, done: Finished, to: TextIO | None = None) -> None:
        """Writes a line, to the file or else to `to`, and flushes, so that what is done outlives Ctrl-C."""
        record = {"index": done.ticket, "prompt": prompt, "text": text, "tokens": len(done.tokens)}
        record |= {"stopped": done.stopped, "passes": done.passes}
        if (file := self.file or to) is not None:
            self.begin()
            file.write(json.dumps(record) + "\n")
            file.flush()


# ---- one --prompt, or several to be seen together -------------------------------------------------------------------


def _arguments(
    model: Any, tokenizer: Tokenizer, config: GenerationConfig, options: argparse.Namespace, out: Output
) -> Counts:
    prompts = [_encode(tokenizer, prompt, options) for prompt in options.prompt]
    shown = [prompt + "\n" * options.chat for prompt in options.prompt]
    live = LiveText(tokenizer, len(prompts[0])) if options.live else None
    recorder = Recorder(tokenizer, prompts) if options.html else None
    stream = None
    if live is None and len(prompts) == 1:
        stream = BlockStream(tokenizer, shown[0], len(prompts[0]), sys.stdout)
    watchers: list[Callable[[Step], object]] = [w for w in (live, recorder, stream) if w is not None]

    def watch(step: Step) -> None:
        for watcher in watchers:
            watcher(step)

    try:
        done = generate(model, prompts, config, watch if watchers else None)
    finally:
        if recorder is not None and recorder.passes:  # what was decoded when Ctrl-C came, too
            Path(options.html).write_text(recorder.page(), encoding="utf-8")
    texts = [tokenizer.decode(tokens) for tokens in done.tokens]
    if live is not None:
        live.finish([*prompts[0], *done.tokens[0]])
    elif stream is not None:
        stream.finish(texts[0])
    for prompt, text in zip(shown[1 if live else 0 :], texts[1 if live else 0 :]):
        if stream is None:
            print(prompt + text)
    for finished, text in zip(_finished(done), texts):
        out.write(options.prompt[finished.ticket], text, finished)
    return sum(done.filled), done.forward_passes, sum(done.passes)


def _finished(done: Generation, first: int = 0) -> list[Finished]:
    """Returns the sequences of a generation, numbered from `first`."""
    each = zip(done.tokens, done.stopped, done.passes, done.filled)
    return [Finished(first + b, *parts) for b, parts in enumerate(each)]


class BlockStream:
    """Writes a sequence's text whenever a block is full: `generate`'s callback."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, prompt_length: int, out: TextIO) -> None:
        self.tokenizer, self.prompt_length, self.out = tokenizer, prompt_length, out
        self.block, self.written = 0, ""
        self.prompt = prompt  # it is written with the first pass, which wrong settings do not reach

    def __call__(self, step: Step) -> None:
        self.begin()
        columns = [column for column in step.positions[0].tolist() if column >= 0]
        if step.block > self.block and columns:  # the one before is full
            self.block = step.block
            tokens = step.tokens[0, step.starts[0] + self.prompt_length : columns[0]].tolist()
            self.write(self.tokenizer.decode(tokens).rstrip("\ufffd"))  # the rest of a character may follow

    def begin(self) -> None:
        """Writes the prompt, once."""
        self.out.write(self.prompt)
        self.out.flush()
        self.prompt = ""

    def write(self, text: str) -> None:
        """Writes what `text` has beyond what is written."""
        if text.startswith(self.written):
            self.out.write(text[len(self.written) :])
            self.out.flush()
            self.written = text

    def finish(self, text: str) -> None:
        """Writes the rest of the final text."""
        self.begin()
        self.write(text)
        self.out.write("\n")
        self.out.flush()


# ---- --prompts, or several --prompt ---------------------------------------------------------------------------------


class Results:
    """Takes sequences as they are done: lines to `out`; texts of --prompt to standard output, in their order."""

    def __init__(self, tokenizer: Tokenizer, options: argparse.Namespace, out: Output) -> None:
        self.tokenizer, self.options, self.out = tokenizer, options, out
        self.prompts: dict[int, str] = {}
        self.texts: dict[int, str] = {}
        self.tokens = self.by_sequence = self.printed = 0

    def take(self, done: Finished) -> None:
        self.tokens, self.by_sequence = self.tokens + done.filled, self.by_sequence + done.passes
        text, prompt = self.tokenizer.decode(done.tokens), self.prompts.pop(done.ticket)
        self.out.write(prompt, text, done, sys.stdout if self.options.prompts else None)
        if not self.options.prompts:
            self.texts[done.ticket] = prompt + "\n" * self.options.chat + text
        while self.printed in self.texts:
            print(self.texts.pop(self.printed), flush=True)
            self.printed += 1


def _stream(
    model: Any, tokenizer: Tokenizer, config: GenerationConfig, options: argparse.Namespace, out: Output
) -> Counts:
    """Decodes --batch-size prompts at a time. A line is written, and flushed, when its prompt is done."""
    results, name = Results(tokenizer, options, out), f"{options.prompts}, line" if options.prompts else "--prompt"
    lines = _lines(options.prompts) if options.prompts else iter(enumerate(options.prompt, 1))
    source: Iterator[tuple[int, str, list[int]]]
    source = ((number, prompt, _encode(tokenizer, prompt, options)) for number, prompt in lines)
    if of_model(config, model.config).sampler in ALONE:
        return _batches(model, config, options.batch_size, source, results)
    slots, room = options.batch_size, None
    if not options.prompts:  # all are known
        known = list(source)
        slots, source = min(slots, len(known)), iter(known)
        room = min(max(len(ids) for *_, ids in known) + config.max_new_tokens, model.config.max_seq_len)
    decoder = Decoder(model, config, slots, room)
    passes, exhausted = 0, False
    while True:
        while not exhausted and len(results.prompts) < slots:  # no more is read than can be decoded now
            line = next(source, None)
            if line is None:
                exhausted = True
                break
            number, prompt, ids = line
            try:
                results.prompts[decoder.submit(ids)] = prompt
            except PromptError as error:
                raise PromptError(f"{name} {number}: {error}") from None
        made = decoder.step()
        passes += made
        for done in decoder.collect():
            results.take(done)
        if exhausted and not made:
            return results.tokens, passes, results.by_sequence


def _batches(
    model: Any,
    config: GenerationConfig,
    size: int,
    source: Iterator[tuple[int, str, list[int]]],
    results: Results,
) -> Counts:
    """Decodes prompts in batches, for samplers with a loop of their own. Each has the seed it has in a Decoder."""
    first = passes = 0
    while batch := list(itertools.islice(source, size)):
        results.prompts |= {first + b: prompt for b, (_, prompt, _) in enumerate(batch)}
        done = generate(model, [ids for *_, ids in batch], dataclasses.replace(config, seed=config.seed + first))  # type: ignore[operator]
        passes += done.forward_passes
        for finished in _finished(done, first):
            results.take(finished)
        first += len(batch)
    return results.tokens, passes, results.by_sequence


def run_record(options: argparse.Namespace) -> int:
    """Writes the trajectories of each prompt to --out, flushed batch by batch; a summary goes to standard error."""
    from .training.record import record

    config = config_of(options)
    model, tokenizer = open_model(options.model, options.device, options.dtype)
    teacher = open_model(options.teacher, options.device, options.dtype)[0] if options.teacher else None
    prompts = (_encode(tokenizer, prompt, options) for _, prompt in _lines(options.prompts))
    how: dict[str, Any] = {"draws": options.draws, "keep": options.keep, "teacher": teacher}
    made = record(model, prompts, config, batch_size=options.batch_size, **how)
    first = next(made, None)  # an error in it leaves the file alone
    if first is None:
        raise PromptError(f'prompts: expected lines like {{"prompt": "..."}} in {options.prompts}, found none')
    count = tokens = passes = 0
    with open(options.out, "w", encoding="utf-8") as out:
        for kept in itertools.chain([first], made):
            for t in kept:
                out.write(t.line() + "\n")
                count += 1
                tokens += sum(k >= t.first for k in t.order)
                passes += max(t.order) - t.first + 1
            out.flush()
    print(f"{count} trajectories, {tokens / max(passes, 1):.2f} tokens a pass, in {options.out}", file=sys.stderr)
    return 0


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, prompt) of JSON lines. Empty lines are skipped, and a byte order mark before the first."""
    with contextlib.ExitStack() as files:
        if name == "-" and sys.stdin is None:
            raise PromptError("prompts: expected lines from standard input, which is closed; name a file")
        source = sys.stdin if name == "-" else files.enter_context(open(name, encoding="utf-8"))
        number = 0
        try:
            for number, line in enumerate(source, 1):
                line = line.removeprefix("\ufeff") if number == 1 else line
                if line.strip():
                    yield number, _prompt_of(line, f"{name}, line {number}")
        except UnicodeDecodeError as error:
            raise PromptError(f"{name}, after line {number}: expected UTF-8, {error.reason}") from None


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        os.fsencode(prompt or "")
    except UnicodeEncodeError:
        raise PromptError(f"{where}: expected text, got half of a surrogate pair, {line.strip()[:60]!r}") from None
    except (ValueError, TypeError, RecursionError):  # RecursionError: brackets without end
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f'{where}: expected {{"prompt": "..."}}, got {line.strip()[:60]!r}')
    return prompt
