"""Chat templates of published folders: Jinja text that turns messages into the text that a model was trained on.

They come from whoever published the model, so they run in Jinja's sandbox, over plain JSON values: a template reads
what it is given, changes none of it, and reaches no Python. What it makes by repeating or padding is bounded; loops
within loops, and texts that double in a loop, can still take long and much memory.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from zoo.published_folder import PretrainedError

LONGEST = 1_000_000
"""Of what a template may make by repeating; Jinja's own limit to range is a tenth of it."""

WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*:[^{}]*(\d{4}|\{)")
"""In a text that formats: a width, or a precision, of four digits or one that is filled in."""

DEEPEST = 64
"""Blanks that a filter may indent by."""


def render(template: str, variables: Mapping[str, Any], where: str) -> str:
    """The text of a template. Raises PretrainedError, in one line that begins with `where`, for any that fails."""
    import jinja2

    given = {name: plain(value, name) for name, value in variables.items()}
    try:
        return compiled(template).render(given)
    except jinja2.exceptions.SecurityError as problem:
        raise PretrainedError(f"{where} does what no template may ({problem}): look at who wrote it") from None
    except Exception as problem:  # whatever an expression of the template raises
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise PretrainedError(f"{where} cannot be rendered ({reason}): look at the messages, or the template") from None


def plain(value: Any, name: str) -> Any:
    """A copy of a JSON value; raises PretrainedError for any other, whose methods a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise PretrainedError(f"{name} of a chat is a {type(value).__name__}: give text, numbers, lists and dicts alone")


@functools.lru_cache(16)
def compiled(template: str) -> Any:
    return environment().from_string(template)


def sandbox() -> Any:
    """Jinja's sandbox, and two refusals more: results and formats of any size, and reading what is unsafe, where Jinja
    alone would print nothing."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%":
                check_narrow(left)
            times = [value for value in (left, right) if isinstance(value, int)]
            repeated = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
            if (operator == "**" and abs(right) > 64) or (repeated and times and repeated[0] * times[0] > LONGEST):
                raise jinja2.exceptions.SecurityError(f"{operator} with a result of more than {LONGEST} parts")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = isinstance(obj, str) and attr in ("center", "ljust", "rjust", "zfill", "expandtabs")
            return not padding and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            made = super().wrap_str_format(value)
            if made is not None:
                check_narrow(value.__self__)
            return made

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    return Sandbox


@functools.lru_cache(1)
def environment() -> Any:
    """The environment that transformers gives a template."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """{% generation %}, around what an assistant said, which only training asks about."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **fields: Any):
            self, *given = args
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*given, **fields).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace with the name {name!r}")
            super().__setitem__(name, value)

    made = sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.filters |= {
        "tojson": to_json,
        "indent": functools.partial(indented, made.filters["indent"]),
        "format": functools.partial(formatted, made.filters["format"]),
    }
    del made.filters["center"]  # Pads to any width; no published template is known to.
    del made.globals["lipsum"]  # Writes as much as it is told.
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": lambda *given, **fields: dict(*given, **fields),
        "namespace": Namespace,
    }
    return made


def raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter writes for HTML, with &, < and > escaped."""
    check_depth(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def indented(indent: Any, text: str, width: Any = 4, *rest: Any, **options: Any) -> str:
    check_depth(width)
    return indent(text, width, *rest, **options)


def formatted(fill_in: Any, text: Any, *values: Any, **named: Any) -> str:
    check_narrow(text)
    return fill_in(text, *values, **named)


def check_depth(width: Any) -> None:
    import jinja2

    if (width if isinstance(width, int) else len(width or "")) > DEEPEST:
        raise jinja2.exceptions.SecurityError(f"an indent of more than {DEEPEST}")


def check_narrow(text: Any) -> None:
    import jinja2

    if isinstance(text, str) and WIDE.search(text):
        raise jinja2.exceptions.SecurityError("a format of any width")
