"""Typed command-line flags over frozen dataclasses: tyro parses, and what is wrong is answered in one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from zoo.train.experiment import UserError

T = TypeVar("T")


def choose(kind: str, name: str, known: Mapping[str, T]) -> T:
    """`known[name]`; raises UserError with the nearest name."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown {kind} {name!r}: {hint}(zoo list shows all)")
    return known[name]


def parse(defaults: Sequence[Any], arguments: Sequence[str], *, prog: str, description: str) -> tuple[Any, ...]:
    """`defaults`, dataclass instances, with the flags in `arguments` applied.

    Their fields share one flat name space; a nested dataclass prefixes its own: `--model.num-layers 2`. `--help` prints
    the flags and exits. Raises UserError for anything that is not a flag or not a value of its type.
    """
    # A dataclass of them all, made here because its field types are only known here.
    fields = [(f"part{i}", typing.Annotated[_type(part), tyro.conf.arg(name="")]) for i, part in enumerate(defaults)]
    together = dataclasses.make_dataclass("Flags", fields, frozen=True)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), _wide_when_captured(arguments):
            parsed, unknown = tyro.cli(
                together,
                prog=prog,
                description=description,
                args=list(arguments),
                default=together(*defaults),
                return_unknown_args=True,
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_sentence(captured.getvalue())} ({prog} --help lists all flags)") from None
    if unknown:
        raise UserError(_unknown(unknown, [flag for part in defaults for flag in _flags(part)], prog))
    return tuple(getattr(parsed, field[0]) for field in fields)


def parse_none(arguments: Sequence[str], *, prog: str, description: str) -> None:
    """For a verb without flags of its own: `--help` prints and exits, anything else raises UserError."""
    parse((), arguments, prog=prog, description=description)


def _type(instance: Any) -> Any:
    """The type of a dataclass instance, its type parameters filled with the types of the fields they annotate."""
    kind: Any = type(instance)
    parameters = getattr(kind, "__parameters__", ())
    if not parameters:
        return kind
    of_field = {f.type: type(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
    return kind[tuple(of_field[parameter] for parameter in parameters)]


def _flags(instance: Any, prefix: str = "--") -> Iterator[str]:
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        name = f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if isinstance(value, bool):
                yield f"{prefix}no-{name}"


def _unknown(tokens: Sequence[str], known: list[str], prog: str) -> str:
    token = next((token for token in tokens if token.startswith("-")), None)
    if token is None:
        return f"unexpected {tokens[0]!r}: options are flags, a switch is --x or --no-x ({prog} --help lists all flags)"
    name = token.partition("=")[0].replace("_", "-")
    # The last part of a dotted flag finds its flag, and so do the first letters of its words: lr is learning-rate.
    last = name.lstrip("-").rpartition(".")[2]
    nearest = [flag for flag in known if last in _short_names(flag)]
    nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"unknown flag {name}: {hint}({prog} --help lists all flags)"


def _short_names(flag: str) -> tuple[str, str]:
    last = flag.lstrip("-").rpartition(".")[2]
    return last, "".join(word[0] for word in last.split("-"))


def _sentence(box: str) -> str:
    """The message in the box that tyro draws, by what the terminal can show: in colour, in UTF-8 or in ASCII."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    rules = [set(line) <= set("─-+╭╮╰╯├┤") for line in lines]
    # Between the title and the next rule.
    body = itertools.dropwhile(lambda pair: pair[1], list(zip(lines, rules, strict=True))[1:])
    words = [line for line, _ in itertools.takewhile(lambda pair: not pair[1], body)]
    message = " ".join(words).removeprefix("Error parsing ").partition("Got errors:")[0].strip().rstrip(".")
    # A dataclass that refuses its values is named by its place among the parts.
    message = re.sub(r"^part[0-9]+\.?(\S*): ", lambda found: f"--{found[1]}: " if found[1] else "", message)
    return message[:1].lower() + message[1:] if message else "the command line could not be read"


@contextlib.contextmanager
def _wide_when_captured(arguments: Sequence[str]) -> Iterator[None]:
    """Lets a message keep to one line; the help, which a person reads in a terminal, keeps the terminal's width."""
    if {"-h", "--help"} & set(arguments):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
