"""Real pairs that every install has: statements of Python's standard library, and the syntax tree of each.

    self.count = len(names) + 1        Assign(Attribute(Name), BinOp(Call(Name, Name), Add, Constant))

A tree written as a sequence leaves its words out, as in Vinyals et al. 2014, "Grammar as a Foreign Language", and in
section 6.3 of Vaswani et al. 2017. It is what `ast.parse` gives, so that a translation can be checked by the
interpreter.
"""

import ast
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from zoo.train.experiment import UserError

VERSION = "1.0.0"
LONGEST = 64  # characters of a statement
_ELSEWHERE = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "dist-packages"}
"""Folders that are not the library, or that some installs lack."""


def version() -> str:
    return f"{VERSION} python{platform.python_version()}"


def library() -> tuple[Path, list[Path]]:
    """The folder of the standard library, and its files of Python in order; UserError where it comes without source."""
    folder, files = Path(sysconfig.get_path("stdlib")), []
    for below, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _ELSEWHERE)
        files += [Path(below, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(
            f"this Python ({sys.executable}) comes without the source of its library in {folder}, which python_trees "
            "reads: install it, or give --data.source a .tsv file"
        )
    return folder, files


@cache
def read() -> list[tuple[str, str]]:
    """Each simple statement of the library that stands on one line, once, with its tree; in the order of files."""
    pairs: dict[str, str] = {}
    for file in library()[1]:
        try:
            text = file.read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):  # of escapes that old files have
                module = ast.parse(text)
        except (OSError, ValueError, SyntaxError):
            continue
        for source, node in statements(text, module):
            pairs.setdefault(source, tree(node))
    return list(pairs.items())


def statements(text: str, module: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The simple statements of `text` on one line, of at most LONGEST characters; docstrings are none."""
    lines = text.split("\n")
    for node in ast.walk(module):
        if not isinstance(node, ast.stmt) or hasattr(node, "body") or node.lineno != node.end_lineno:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        source = lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()
        if len(source) <= LONGEST:
            yield source, node


def tree(node: ast.AST) -> str:
    """The names of the node's class and of its children's, without identifiers and values."""
    children = [tree(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
    return type(node).__name__ + (f"({', '.join(children)})" if children else "")
