"""From messages to a text, by the template of a model's tokenizer, and which of its characters are answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_core.data.tokenizer import HuggingFaceTokenizer, MegatronTokenizer
from parallel_core.errors import ConfigError, DataError
from parallel_core.files import read_regular

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_LARGEST_FILE = 1 << 24
_BEGIN, _END = "\ufdd0", "\ufdd1"
"""What stands around answers while a template with `{% generation %}` is rendered: no text has noncharacters."""
_NEMOTRON = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<SPECIAL_10>System\\n' + "
    "message['content'].strip() + '\\n' }}{% elif message['role'] == 'user' %}{{ '<SPECIAL_11>User\\n' + "
    "message['content'].strip() + '\\n<SPECIAL_11>Assistant\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'].strip() + '\\n' }}{% endif %}{% endfor %}"
)
FORMATS = {
    "identity": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "nemotron-h-aligned": _NEMOTRON,
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
"""Templates by name: Megatron's, and a plain one that any tokenizer can read. `default` is the tokenizer's own."""
HOW_TO_NAME_ONE = (
    "name one: --chat-template FILE, or --sft-tokenizer-prompt-format plain, which writes 'User: ...' and "
    "'Assistant: ...' on lines of their own"
)


class ChatTemplate:
    """A Jinja template in a sandbox, as `transformers` runs it.

    Args:
        text: the template.
        tokens: special tokens by the names that templates use (`bos_token`, `eos_token`, ...).
        tokenizer: turns the result into ids; it adds no special tokens, which are the template's.

    Raises:
        ConfigError: it cannot be read, or jinja2 is not installed.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], tokenizer: MegatronTokenizer) -> None:
        require_jinja2()
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_blocks()]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from None
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", text) is not None
        self.source, self._tokens, self._tokenizer = text, dict(tokens), tokenizer
        self._checked: set[str] = set()

    def text(self, messages: Messages, *, add_generation_prompt: bool = False, tools: Any = None) -> str:
        """Return the text of a conversation.

        Args:
            messages: objects with `role` and `content`, a text or a list of parts of text; what else they have
                (`tool_calls`, ...) is the template's.
            add_generation_prompt: with what stands before an answer at the end.
            tools: descriptions of functions, for templates that write them.

        Raises:
            DataError: a message has no role or content, or the template refuses the messages.
        """
        return self._render(messages, add_generation_prompt, tools)

    def tokens(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation that waits for an answer; errors as in `text`."""
        return self._ids(self.text(messages, add_generation_prompt=True))

    def answers(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span]]:
        """Return the text of a conversation and which characters the assistant has written, by message.

        A template says so itself by `{% generation %}` blocks. Of others, a message's answer is what follows the text
        of the messages before it with the prompt for an answer, up to the end of the text that ends with the message.

        Raises:
            DataError: as `text`, or the template writes the beginning of a conversation in more than one way.
        """
        if self._marks_answers:
            return _take_marks(self._render(messages, False, tools, mark=True))
        text, spans = self._render(messages, False, tools), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, tools) if i else ""
            until = self._render(messages[: i + 1], False, tools)
            if not (text.startswith(until) and until.startswith(before)):
                raise DataError(
                    f"messages[{i}]: the chat template writes what comes before this answer in another way when the "
                    "conversation goes on, so that its place cannot be told; put {% generation %} and "
                    "{% endgeneration %} around answers in the template (--chat-template FILE)"
                )
            spans.append((len(before), len(until)))
        return text, spans

    def tokens_and_answers(self, messages: Messages, tools: Any = None) -> tuple[list[int], list[Span]]:
        """Return the ids of a conversation and the range of ids of each answer.

        The text is tokenized as one. A token that reaches over the beginning of an answer belongs to it, one that
        reaches over its end does not.

        Raises:
            DataError: as `answers`.
        """
        text, spans = self.answers(messages, tools)
        ids = self._ids(text)
        ends = {end: self._common(ids, text, end) for span in spans for end in span}
        return ids, [(ends[begin], ends[end]) for begin, end in spans]

    def _common(self, ids: list[int], text: str, end: int) -> int:
        """Return how many of the whole text's ids are those of its first `end` characters."""
        if end == len(text):
            return len(ids)
        first = self._tokenizer.tokenize(text[:end]) if end else []
        return next((n for n, (one, other) in enumerate(zip(ids, first)) if one != other), min(len(ids), len(first)))

    def _ids(self, text: str) -> list[int]:
        for token in self._tokens.values():
            if token and token in text and token not in self._checked:
                self._check_special(token)
        for token in set(re.findall(r"<SPECIAL_\d+>", text)) - self._checked:
            self._check_special(token)
        return [int(token) for token in self._tokenizer.tokenize(text)]

    def _check_special(self, token: str) -> None:
        """Refuse a tokenizer that reads a special token as letters: a model would learn to spell it."""
        pieces = self._tokenizer.tokenize(token)
        if len(pieces) != 1:
            raise DataError(
                f"the chat template writes the special token {token!r}, which this tokenizer reads as {len(pieces)} "
                "tokens; use a tokenizer.json (--tokenizer-type HuggingFaceTokenizer) that has it, or "
                "--sft-tokenizer-prompt-format plain"
            )
        self._checked.add(token)

    def _render(self, messages: Messages, add_generation_prompt: bool, tools: Any, mark: bool = False) -> str:
        flat = [_flat(i, message) for i, message in enumerate(messages)]
        values = {**self._tokens, "messages": flat, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self._template.render(**values, tools=tools, mark_answers_=mark))
        except Exception as error:  # a template is a program of somebody else's
            raise DataError(f"the chat template refuses the messages: {error}") from None


def require_jinja2() -> None:
    """Refuse an installation without jinja2.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("chat templates need jinja2: pip install 'parallel_core[chat]' (or pip install jinja2)")


def _generation_blocks() -> type:
    """Return the extension for `{% generation %}...{% endgeneration %}`, which marks what it holds on request."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked", [nodes.Name("mark_answers_", "load")])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, mark: bool, caller: Callable[[], str]) -> str:
            return f"{_BEGIN}{caller()}{_END}" if mark is True else caller()

    return Generation


def _take_marks(marked: str) -> tuple[str, list[Span]]:
    parts, spans, at = re.split(f"([{_BEGIN}{_END}])", marked), [], 0
    text, begun = [], -1
    for part in parts:
        if part == _BEGIN:
            begun = at
        elif part == _END:
            spans.append((begun, at))
        else:
            text.append(part)
            at += len(part)
    return "".join(text), spans


def _flat(number: int, message: Any) -> dict[str, Any]:
    """Return a message whose content is a text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f'messages[{number}]: send {{"role": "user", "content": "a text"}}')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, str):
        flat = content
    elif not isinstance(content, list):
        raise DataError(f'messages[{number}]: send {{"role": "user", "content": "a text"}}')
    elif all(isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        flat = "".join(part["text"] for part in content)
    else:
        raise DataError(f"messages[{number}]: only parts of text are read")
    if _BEGIN in flat or _END in flat:
        raise DataError(f"messages[{number}]: has U+FDD0 or U+FDD1, which are no characters")
    return {**message, "content": flat}


def chat_template(
    tokenizer: MegatronTokenizer, folders: Sequence[str | Path], prompt_format: str = "default", file: str = ""
) -> ChatTemplate | None:
    """Return the template of a tokenizer; None where it has none and no other is named.

    Args:
        tokenizer: reads what the template writes.
        folders: where its files are, the first to be looked at first.
        prompt_format: one of `FORMATS`, or `default`: the one in the first folder that has one.
        file: a file of a template, over all others.

    Raises:
        ConfigError: there is one that cannot be read.
    """
    text, special = template_text(folders, prompt_format, file)
    if text is None:
        return None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer = HuggingFaceTokenizer(tokenizer.file)  # one that adds no special tokens
    return ChatTemplate(text, special, tokenizer)


def template_text(folders: Sequence[str | Path], prompt_format: str, file: str) -> tuple[str | None, dict[str, str]]:
    """Return a template and the special tokens beside it; arguments and errors as in `chat_template`."""
    text = FORMATS.get(prompt_format)
    if file:
        text = _read(Path(file)).decode("utf-8", errors="replace")
    for folder in map(Path, folders):
        text = _text_in(folder) if text is None else text
    return text, special_tokens(folders)


def special_tokens(folders: Sequence[str | Path]) -> dict[str, str]:
    """Return the special tokens (`bos_token`, ...) that the files in these folders name, the first one's above all."""
    named: dict[str, str] = {}
    for folder in folders:
        named = {**_special_tokens(Path(folder)), **named}
    return named


def tokenizer_folders(*files: str | None) -> list[str]:
    """Return the folders of a tokenizer's files."""
    given = [file for file in files if file]
    return list(dict.fromkeys(file if os.path.isdir(file) else os.path.dirname(file) or "." for file in given))


def _text_in(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return _read(folder / "chat_template.jinja").decode("utf-8", errors="replace")
    config, other = _object(folder / "tokenizer_config.json"), _object(folder / "chat_template.json")
    text = config.get("chat_template") or other.get("chat_template")
    if isinstance(text, list):  # several by name
        named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
        text = named.get("default") or next(iter(named.values()), None)
    return text if isinstance(text, str) and text else None


def _special_tokens(folder: Path) -> dict[str, str]:
    special = {}
    for source in (_object(folder / "special_tokens_map.json"), _object(folder / "tokenizer_config.json")):
        for name, value in source.items():
            value = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(value, str):
                special[name] = value
    return special


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
