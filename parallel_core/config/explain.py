"""What one argument does, in words."""

from __future__ import annotations

from parallel_core.config import table
from parallel_core.config.argument import IGNORED, MAPPED, Argument
from parallel_core.errors import ConfigError


def explain(written: str) -> str:
    """Return what the argument, flag or config field `written` is.

    Raises:
        ConfigError: There is no such argument.
    """
    found = table.find(written)
    argument = found[0] if found else table.DIRECT.get(written)
    if argument is None:
        raise ConfigError(f"{written}: unknown argument{table.suggestion(written)}")
    lines = [f"{argument.name}: {fate(argument)}"]
    lines.append(f"  flags: {', '.join(spellings(argument))}")
    if argument.aliases:
        lines.append(f"  also called: {', '.join(argument.aliases)}")
    if argument.fields:
        lines.append(f"  fields: {', '.join(argument.fields)}")
    if argument.choices:
        lines.append(f"  values: {', '.join(argument.choices)}")
    renamed = [f"{there} is {here}" for there, here in argument.renamed]
    if renamed:
        lines.append(f"  other words: {', '.join(renamed)}")
    kind = "default in Megatron-LM" if argument.origin == "Megatron-LM" else f"default (from {argument.origin})"
    lines.append(f"  {kind}: {default_text(argument)}")
    if argument.status == MAPPED and argument.value_when_absent != argument.default:
        lines.append(f"  default here: {argument.value_when_absent}")
    return "\n".join(lines)


def fate(argument: Argument) -> str:
    """Return what becomes of the argument: its effect, why it is ignored, or what is missing."""
    if argument.status == MAPPED:
        return argument.help
    if argument.status == IGNORED:
        return f"ignored; {argument.reason}"
    if argument.reason.startswith("removed"):
        return argument.reason
    return f"refused unless it asks for nothing; not built: {argument.reason}"


def spellings(argument: Argument) -> list[str]:
    """Return the flags that are worth showing: all that Megatron has, and the opposite of a switch."""
    if argument.kind == "off":
        return [*argument.off_flags, *argument.flags[:1]]
    return [*argument.flags, *(argument.off_flags if argument.kind == "toggle" else ())]


def default_text(argument: Argument) -> str:
    """Return the default as one would write it in YAML."""
    value = argument.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    return str(value)
