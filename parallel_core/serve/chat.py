"""From messages to a prompt, by the template that a model's tokenizer brings along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel_core.data.tokenizer import HuggingFaceTokenizer, MegatronTokenizer
from parallel_core.errors import ConfigError
from parallel_core.files import read_regular
from parallel_core.serve.values import Refused

_LARGEST_FILE = 1 << 24


class ChatTemplate:
    """A Jinja template in a sandbox, as `transformers` runs it.

    Args:
        text: the template.
        tokens: special tokens by the names that templates use (`bos_token`, `eos_token`, ...).
        tokenizer: turns the result into ids; it adds no special tokens, which are the template's.
    """

    def __init__(self, text: str, tokens: dict[str, str], tokenizer: MegatronTokenizer) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from None
        self._tokens, self._tokenizer = tokens, tokenizer

    def text(self, messages: list[Any]) -> str:
        """Return the prompt of a conversation.

        Raises:
            Refused: a message has no role or content, or the template refuses it.
        """
        for i, message in enumerate(messages):
            fits = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not fits or not isinstance(message.get("content"), (str, list)):
                raise Refused(f'messages[{i}]: send {{"role": "user", "content": "a text"}}', parameter="messages")
        try:
            flat = [{**m, "content": _flat(i, m["content"])} for i, m in enumerate(messages)]
            return self._template.render(messages=flat, add_generation_prompt=True, **self._tokens)
        except Refused:
            raise
        except Exception as error:  # a template is a program of somebody else's
            raise Refused(f"the model's chat template refuses the messages: {error}", parameter="messages") from None

    def tokens(self, messages: list[Any]) -> list[int]:
        """Return the prompt's token ids; errors as in `text`."""
        return [int(token) for token in self._tokenizer.tokenize(self.text(messages))]


def _flat(number: int, content: Any) -> str:
    """Return the text of a content that may be a list of parts."""
    if isinstance(content, str):
        return content
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        raise Refused(f"messages[{number}]: only parts of text are read", parameter="messages")
    return "".join(part["text"] for part in content)


def chat_template(folder: Path, tokenizer: MegatronTokenizer | None) -> ChatTemplate | None:
    """Return the template beside a tokenizer's files; None where there is none.

    Raises:
        ConfigError: there is one that cannot be read.
    """
    if tokenizer is None:
        return None
    config = _object(folder / "tokenizer_config.json")
    text = config.get("chat_template") or _object(folder / "chat_template.json").get("chat_template")
    if (folder / "chat_template.jinja").exists():
        text = _read(folder / "chat_template.jinja").decode("utf-8", errors="replace")
    if isinstance(text, list):  # several by name
        named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
        text = named.get("default") or next(iter(named.values()), None)
    if not isinstance(text, str) or not text:
        return None
    special = {}
    for source in (_object(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            value = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(value, str):
                special[name] = value
    plain = HuggingFaceTokenizer(str(folder)) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer
    return ChatTemplate(text, special, plain)


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values if isinstance(values, dict) else {}


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _LARGEST_FILE)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
