"""Chat templates of a Hugging Face folder: chat_template.jinja, or the one in tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from . import tokenizer_config
from .errors import DataError

_FILE = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template that turns messages into the text of a prompt.

    Parameters
    ----------
    source : str
    tokens : mapping of str to str
        Special tokens by the names that templates use, such as "bos_token".

    Raises
    ------
    DataError
        For a template that is not Jinja.

    Examples
    --------
    >>> from illada.chat import ChatTemplate
    >>> source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    >>> ChatTemplate(source, {"eos_token": "</s>"}).render([{"role": "user", "content": "Hi"}])
    '[user] Hi</s>'
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        environment, self._error = _environment()
        self.source, self.tokens = source, dict(tokens or {})
        try:
            self._template = environment.from_string(source)
        except (self._error, SyntaxError, TypeError) as error:  # a break outside of a loop is Python's to refuse
            raise DataError(f"chat template: not Jinja ({error})") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation.

        Parameters
        ----------
        messages : sequence of dicts with "role" and "content"
        add_generation_prompt : bool
            End with what opens the model's answer.

        Returns
        -------
        str

        Raises
        ------
        DataError
            For messages that the template refuses.
        """
        values = {**self.tokens, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        values |= {"tools": None, "documents": None}  # as transformers gives them, not undefined
        try:
            return self._template.render(values)
        except (self._error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"chat template: it does not take these messages ({error})") from None


def load_chat_template(folder: Path, name: str = "default") -> ChatTemplate:
    """Returns the chat template in a folder; raises DataError where there is none of that name."""
    config = tokenizer_config.read(folder)
    found = config.get("chat_template")
    try:
        if isinstance(found, list):  # several, each with a name
            found = {entry["name"]: entry["template"] for entry in found}
        sources = found if isinstance(found, dict) else {"default": found} if found else {}
        if name == "default" and (folder / _FILE).exists():
            sources["default"] = (folder / _FILE).read_text(encoding="utf-8-sig")  # a byte order mark is not a prompt
        if not all(isinstance(source, str) for source in sources.values()):
            raise TypeError("a template is not a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the chat template cannot be read ({error}); download it again") from None
    if name not in sources:
        there = f", only {', '.join(sorted(sources))}" if sources else ""
        raise DataError(
            f"{folder} holds no chat template {name!r}{there}; expected it in {_FILE} or {tokenizer_config.FILE}"
        )
    return ChatTemplate(sources[name], tokenizer_config.special_tokens(config))


def _environment() -> tuple[Any, type[Exception]]:
    """Returns Jinja's sandbox with what transformers gives to templates, and the base of Jinja's errors."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import Scope
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise DataError("chat templates need jinja2: pip install 'illada-kernels[tokenizers]'") from None

    class Generation(Extension):
        """Passes over the marks around the assistant's answers, which matter to training alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = as_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox, TemplateError
