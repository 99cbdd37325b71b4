"""`illada generate`: prompts from arguments, a file or standard input; text block by block, or JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from .decoding.decoder import Decoder
from .decoding.generate import Generation, generate
from .decoding.loop import Step
from .errors import PromptError
from .live import LiveText
from .replay import Recorder
from .tokenizer import Tokenizer
from .training.runs import open_model


def run(options: argparse.Namespace) -> int:
    """Runs the command; statistics go to standard error."""
    if options.prompts is not None and (options.html or options.live):
        raise PromptError("prompts: --html and --live show what is given by --prompt; leave out one of them")
    for prompt in options.prompt or []:
        if not prompt:
            raise PromptError("prompt: it is empty; give at least one character, for example --prompt 'def '")
    config = config_of(options)
    if options.html:  # before minutes of decoding
        Path(options.html).touch()
    device = options.device
    dtype = packing.fast_dtype(device) if options.dtype == "fast" else options.dtype
    model, tokenizer = open_model(options.model, device, dtype)
    weights = options.weights or "same"
    if packed := options.weights is not None or packing.reason(model) is None:  # what was asked for says why not
        packing.pack(model, weights=weights)
    began = time.monotonic()
    with contextlib.ExitStack() as files:
        out = files.enter_context(open(options.out, "w", encoding="utf-8")) if options.out else None
        if options.prompts is not None:
            counts = _stream(model, tokenizer, config, options, out or sys.stdout)
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
        values["rule"] = Threshold(said["threshold"])
    if "edit" in said and "remask" in said:
        raise PromptError("edit: expected none with --remask; a pass either replaces tokens or takes them back")
    if "edit" in said:
        values["revise"] = Edit(said["edit"])
    if "remask" in said:
        values["revise"] = Remask(said["remask"])
    return GenerationConfig(**values)


def _pairs(texts: list[str], name: str, kind: Callable[[str], Any]) -> dict[Any, float]:
    pairs = {}
    for text in texts:
        key, _, number = text.partition("=")
        try:
            pairs[kind(key)] = float(number)
        except ValueError:
            raise PromptError(f"{name}: expected {'NAME' if kind is str else 'ID'}=NUMBER, got {text!r}") from None
    return pairs


def _encode(tokenizer: Tokenizer, text: str, options: argparse.Namespace) -> list[int]:
    content = os.fsencode(text)
    if options.chat:
        message = {"role": "user", "content": content.decode("utf-8", "replace")}
        content = load_chat_template(Path(options.model)).render([message]).encode()
    return [int(i) for i in tokenizer.encode(content, special=True)]


# ---- --prompt ------------------------------------------------------------------------------------------------------


def _arguments(
    model: Any, tokenizer: Tokenizer, config: GenerationConfig, options: argparse.Namespace, out: TextIO | None
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
        if recorder is not None:  # what was decoded when Ctrl-C came, too
            Path(options.html).write_text(recorder.page(), encoding="utf-8")
    texts = [tokenizer.decode(tokens) for tokens in done.tokens]
    if live is not None:
        live.finish([*prompts[0], *done.tokens[0]])
    elif stream is not None:
        stream.finish(texts[0])
    for prompt, text in zip(shown[1 if live else 0 :], texts[1 if live else 0 :]):
        if stream is None:
            print(prompt + text)
    if out is not None:
        for b, text in enumerate(texts):
            _write(out, options.prompt[b], text, len(done.tokens[b]), done.stopped[b], done.passes[b])
    return _counts(done)


def _counts(done: Generation) -> Counts:
    return sum(done.filled), done.forward_passes, sum(done.passes)


class BlockStream:
    """Writes a sequence's text whenever a block is full: `generate`'s callback."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, prompt_length: int, out: TextIO) -> None:
        self.tokenizer, self.prompt_length, self.out = tokenizer, prompt_length, out
        self.block, self.written = 0, ""
        out.write(prompt)
        out.flush()

    def __call__(self, step: Step) -> None:
        columns = [column for column in step.positions[0].tolist() if column >= 0]
        if step.block > self.block and columns:  # the one before is full
            self.block = step.block
            tokens = step.tokens[0, step.starts[0] + self.prompt_length : columns[0]].tolist()
            self.write(self.tokenizer.decode(tokens).rstrip("\ufffd"))  # the rest of a character may follow

    def write(self, text: str) -> None:
        """Writes what `text` has beyond what is written."""
        if text.startswith(self.written):
            self.out.write(text[len(self.written) :])
            self.out.flush()
            self.written = text

    def finish(self, text: str) -> None:
        """Writes the rest of the final text."""
        self.write(text)
        self.out.write("\n")
        self.out.flush()


# ---- --prompts -----------------------------------------------------------------------------------------------------


def _stream(
    model: Any, tokenizer: Tokenizer, config: GenerationConfig, options: argparse.Namespace, out: TextIO
) -> Counts:
    """Decodes --batch-size prompts at a time. A line is written, and flushed, when its prompt is done."""
    decoder = Decoder(model, config, slots=options.batch_size)
    prompts: dict[int, str] = {}
    tokens = passes = by_sequence = 0

    def write() -> None:
        nonlocal tokens, by_sequence
        for done in decoder.collect():
            tokens, by_sequence = tokens + done.filled, by_sequence + done.passes
            text = tokenizer.decode(done.tokens)
            _write(out, prompts.pop(done.ticket), text, len(done.tokens), done.stopped, done.passes, done.ticket)

    source = _lines(options.prompts)
    exhausted = False
    while True:
        while not exhausted and len(prompts) < options.batch_size:  # no more is read than can be decoded now
            line = next(source, None)
            if line is None:
                exhausted = True
                break
            number, prompt = line
            try:
                prompts[decoder.submit(_encode(tokenizer, prompt, options))] = prompt
            except PromptError as error:
                raise PromptError(f"{options.prompts}, line {number}: {error}") from None
        if not decoder.step():
            write()
            if exhausted:
                return tokens, passes, by_sequence
            continue
        passes += 1
        write()


def run_record(options: argparse.Namespace) -> int:
    """Writes the trajectories of each prompt to --out, flushed batch by batch; a summary goes to standard error."""
    from .training.record import record

    config = config_of(options)
    model, tokenizer = open_model(options.model, options.device, options.dtype)
    teacher = open_model(options.teacher, options.device, options.dtype)[0] if options.teacher else None
    prompts = (_encode(tokenizer, prompt, options) for _, prompt in _lines(options.prompts))
    how: dict[str, Any] = {"draws": options.draws, "keep": options.keep, "teacher": teacher}
    count = tokens = passes = 0
    with open(options.out, "w", encoding="utf-8") as out:
        for kept in record(model, prompts, config, batch_size=options.batch_size, **how):
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
        source = sys.stdin if name == "-" else files.enter_context(open(name, encoding="utf-8"))
        for number, line in enumerate(source, 1):
            line = line.removeprefix("\ufeff") if number == 1 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            prompt = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(prompt, str) or not prompt:
                raise PromptError(f'{name}, line {number}: expected {{"prompt": "..."}}, got {line.strip()[:60]!r}')
            yield number, prompt


def _write(
    out: TextIO, prompt: str, text: str, tokens: int, stopped: bool, passes: int, index: int | None = None
) -> None:
    record = {"prompt": prompt, "text": text, "tokens": tokens, "stopped": stopped, "passes": passes}
    if index is not None:
        record = {"index": index, **record}
    out.write(json.dumps(record) + "\n")
    out.flush()  # so that what is done outlives Ctrl-C
