"""Statements of the standard library, and their syntax trees."""

import ast

import pytest

from zoo.train.data import python_trees
from zoo.train.data.pair_sources import pair_source


def parsed(text: str) -> list[tuple[str, str]]:
    found = python_trees.statements(text, ast.parse(text))
    return sorted((source, python_trees.tree(node)) for source, node in found)


def test_a_tree_has_no_words() -> None:
    assert parsed("def f(x):\n    'what it does'\n    return -x.a + g(1, *y)  # so\n") == [
        (
            "return -x.a + g(1, *y)",
            "Return(BinOp(UnaryOp(USub, Attribute(Name)), Add, Call(Name, Constant, Starred(Name))))",
        )
    ]


def test_simple_statements_on_one_line_alone() -> None:
    text = 'é = "é"; del é\nif x: pass\ny = (1,\n     2)\n' + "z = " + "1 + " * 40 + "1\n"
    assert parsed(text) == [("del é", "Delete(Name)"), ("pass", "Pass"), ('é = "é"', "Assign(Name, Constant)")]


def test_a_form_feed_ends_no_line() -> None:
    assert parsed("a = 1\n\f\nb = a\n") == [("a = 1", "Assign(Name, Constant)"), ("b = a", "Assign(Name, Name)")]


def test_the_library_of_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of its files; both sides of the split are parsed by the interpreter to their trees."""
    folder, files = python_trees.library()
    few = [file for file in files if file.parent.name == "json"]
    assert len(files) > 300 and len(few) == 5 and not any("site-packages" in str(file) for file in files)
    monkeypatch.setattr(python_trees, "library", lambda: (folder, few))
    monkeypatch.setattr(python_trees, "read", python_trees.read.__wrapped__)
    source = pair_source("python_trees", "source,target", 0.2)
    sides = []
    for split in ("train", "validation"):
        documents = list(source.documents(split))
        sides.append(dict(zip(documents[0::2], documents[1::2], strict=True)))
    assert len(sides[0]) > 2 * len(sides[1]) > 40 and not sides[0].keys() & sides[1].keys()
    pairs = sides[0] | sides[1]
    assert pairs["raise StopIteration(idx) from None"] == "Raise(Call(Name, Name), Constant)"
    alone = {text: tree for text, tree in pairs.items() if not text.startswith(("return", "yield", "nonlocal"))}
    assert all(python_trees.tree(ast.parse(text).body[0]) == tree for text, tree in alone.items() if text != "continue")
