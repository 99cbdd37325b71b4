"""A progress bar, and text in which masks turn into tokens; plain lines where the output is not a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from typing import TextIO

from .decoding.generate import Step
from .tokenizer import Tokenizer
from .training.trainer import Progress

MASK = "░"
_CLEAR_LINE, _UP, _CLEAR_BELOW = "\r\x1b[2K", "\x1b[{}A", "\x1b[J"
_BRIGHT, _DIM, _OFF = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def duration(seconds: float) -> str:
    """Returns minutes:seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


class ProgressBar:
    """Shows after every step: share done, loss (mean of the last 50), tokens/s, time left.

    Rewrites one line of a terminal ten times a second; prints a line at each tenth of the run elsewhere.
    """

    def __init__(self, out: TextIO | None = None, width: int = 28):
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.width = width
        self.recent: deque[float] = deque(maxlen=50)
        self.shown_at, self.tenths, self.held_out = -1.0, 0, ""
        self.start: tuple[float, float, int] | None = None  # seconds, share done and tokens when this process began

    def __call__(self, now: Progress) -> None:
        self.recent.append(now.loss)
        if self.start is None:
            self.start = (now.seconds, now.done, now.tokens)
        if not self.live:
            if int(now.done * 10) > self.tenths or now.done >= 1:
                self.tenths = int(now.done * 10)
                print(self.text(now), file=self.out, flush=True)
        elif now.done >= 1 or time.monotonic() - self.shown_at > 0.1:
            self.shown_at = time.monotonic()
            filled = int(now.done * self.width)
            bar = "█" * filled + "·" * (self.width - filled)
            self.out.write(f"{_CLEAR_LINE}{bar} {self.text(now)}" + ("\n" if now.done >= 1 else ""))
            self.out.flush()

    def text(self, now: Progress) -> str:
        assert self.start is not None
        seconds, done, tokens = (a - b for a, b in zip((now.seconds, now.done, now.tokens), self.start))
        rate = tokens / seconds if seconds > 0 else 0.0
        left = duration((1 - now.done) * seconds / done) if done > 0 else "?:??"
        loss = sum(self.recent) / len(self.recent)
        if now.held_out is not None:
            self.held_out = f"  held out {now.held_out:.3f}"
        return f"{now.done:4.0%}  step {now.step}  loss {loss:.3f}{self.held_out}  {rate:,.0f} tokens/s  {left} left"

    def close(self) -> None:
        """Ends the line of a bar that did not reach its end."""
        if self.live and self.shown_at >= 0:
            self.out.write("\n")


class LiveText:
    """Shows the first sequence: masks as ░, new tokens in green. It is `generate`'s callback, or call `show(tokens)`.

    Where the output is not a terminal, prints a line whenever another quarter of the masks is filled.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_length: int = 0, out: TextIO | None = None, delay: float = 0.0):
        self.tokenizer, self.prompt_length, self.delay = tokenizer, prompt_length, delay
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.lines = 0
        self.before: list[int] = []

    def __call__(self, step: Step) -> None:
        first = step.starts[0] if hasattr(step, "starts") else 0
        self.show(step.tokens[0].tolist()[first:])

    def show(self, tokens: list[int]) -> None:
        """Shows the sequence as it is now."""
        tokens = [self.tokenizer.mask_id if token < 0 else token for token in tokens]  # of models without a mask token
        if not self.live:
            self._plain(tokens)
        else:
            self._draw(tokens)
            time.sleep(self.delay)
        self.before = tokens

    def finish(self, tokens: list[int]) -> None:
        """Prints the final text, without marks."""
        if self.live:
            self._erase()
        self.out.write(self.tokenizer.decode(tokens) + "\n")
        self.out.flush()

    def _plain(self, tokens: list[int]) -> None:
        left, total = tokens.count(self.tokenizer.mask_id), max(1, len(tokens) - self.prompt_length)
        before = self.before.count(self.tokenizer.mask_id) if self.before else total + 1
        if left * 4 // total < before * 4 // total or left == 0 < before:
            text = self._pieces(tokens, plain=True).replace("\n", "⏎")
            print(f"{left:4d} masks left  {text[-160:]}", file=self.out, flush=True)

    def _pieces(self, tokens: list[int], plain: bool) -> str:
        """Returns the text. Tokens of one kind (old, new, mask) are decoded together because characters span tokens."""
        out: list[str] = []
        run: list[int] = []
        kind = ""
        kinds = [self._kind(i, token) for i, token in enumerate(tokens)]
        for token, its in zip([*tokens, -1], [*kinds, "end"]):
            if its != kind and run:
                text = MASK * len(run) if kind == "mask" else self.tokenizer.decode(run)
                style = "" if plain else {"mask": _DIM, "new": _BRIGHT}.get(kind, "")
                out.append(f"{style}{text}{_OFF}" if style else text)
                run = []
            run.append(token)
            kind = its
        return "".join(out)

    def _kind(self, index: int, token: int) -> str:
        if token == self.tokenizer.mask_id:
            return "mask"
        if index < len(self.before) and self.before[index] == self.tokenizer.mask_id:
            return "new"
        return "old"

    def _draw(self, tokens: list[int]) -> None:
        rows = shutil.get_terminal_size().lines
        lines = self._pieces(tokens, plain=False).replace("\t", "    ").split("\n")[-(rows - 2) :]
        self._erase()
        # No wrapping meanwhile, because the cursor could not find its way back over wrapped lines.
        self.out.write("\x1b[?7l" + "\n".join(lines) + "\x1b[?7h")
        self.lines = len(lines) - 1
        self.out.flush()

    def _erase(self) -> None:
        self.out.write("\r" + (_UP.format(self.lines) if self.lines else "") + _CLEAR_BELOW)
        self.lines = 0
