"""`zoo eject FAMILY > my_model.py`: a family and the layers it uses as one file that needs no zoo, for you to own.

Modules are written one behind the other, each after those that it imports, and of each what the family needs. Their
text stays as it is, comments included, but for imports of each other, and for names that two of them bind, or that one
calls by its module's name: these take that name in front.
"""

import ast
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from zoo.models import FAMILIES
from zoo.train.experiment import UserError

HELP = f"""\
usage: zoo eject FAMILY > FILE

Prints one family of models, with the layers it uses, as a Python file of its own. It needs jax, flax, numpy and
einops.
Families: {", ".join(FAMILIES)}

  zoo eject gpt > my_gpt.py
"""

PLAIN = "zoo.kernels.plain"
"""The name of what stands for `zoo.kernels.dispatch`, which would bring every kernel along."""

PLAIN_ATTENTION = '''
from typing import Any

import jax

from zoo.kernels.mask import Mask
from zoo.kernels.problem import build
from zoo.kernels.reference import attend


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = Mask(), **options: Any) -> jax.Array:
    """softmax(scale q k^T + bias, masked) v [B, T, N, H]: the plain equation, in memory quadratic in length.

    flaxzoo's own `zoo.kernels.attention` takes the same arguments and needs linear memory.
    """
    return attend(build(q, k, v, mask, wants_lse=False, **options)).output
'''


@dataclass
class Module:
    """A module of ours.

    bound: the names that its top level binds.  imported: local names of what it takes from others of ours, as (module,
    name), name None for the module itself.  externals: (module, name, local name) of what it takes from elsewhere.
    """

    name: str
    source: str
    tree: ast.Module = field(init=False)
    bound: set[str] = field(init=False)
    imported: dict[str, tuple[str, str | None]] = field(init=False)
    externals: list[tuple[str, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)
        self.imported, self.externals = {}, []
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zoo":
                for one in node.names:
                    self.imported[one.asname or one.name] = _origin(node.module or "", one.name)
            elif isinstance(node, ast.Import):
                self.externals += [("", one.name, one.asname or one.name) for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                self.externals += [(node.module or "", one.name, one.asname or one.name) for one in node.names]
        self.bound = set(_bound(self.tree.body))

    @property
    def needs(self) -> list[str]:
        return list(dict.fromkeys(module for module, _ in self.imported.values()))


def _path(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _origin(module: str, name: str) -> tuple[str, str | None]:
    """Where a name that is imported from one of our modules is bound: there, in a module below, or one itself."""
    if module == "zoo.kernels" and name == "attention":
        return PLAIN, "attention"
    if find_spec(module) is not None and _path(module).name == "__init__.py":
        if find_spec(f"{module}.{name}") is not None:
            return f"{module}.{name}", None
        for node in ast.parse(_path(module).read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and any(name == one.name for one in node.names):
                return node.module, name
    return module, name


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that statements of a top level bind, imports of ours left out."""
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield from (
                one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
            )


def modules(root: str) -> list[Module]:
    """A module and all of ours that it needs, each behind those that it needs itself."""
    found: dict[str, Module] = {}

    def add(name: str) -> None:
        if name not in found:
            module = Module(name, PLAIN_ATTENTION if name == PLAIN else _path(name).read_text())
            found[name] = module
            for needed in module.needs:
                add(needed)
            found[name] = found.pop(name)

    add(root)
    return list(found.values())


def renamed(found: Sequence[Module]) -> dict[tuple[str, str], str]:
    """The name in the one file of every name that a module binds."""
    counts = Counter(name for module in found for name in module.bound)
    counts.update({local.partition(".")[0] for module in found for _, _, local in module.externals})
    # Called by their module's name, they may be bound again where they are called.
    dotted = {
        (origin, node.attr)
        for module in found
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        for origin, theirs in [module.imported.get(node.value.id, ("", ""))]
        if theirs is None
    }
    taken = {}
    for module in found:
        short = module.name.rpartition(".")[2]
        for name in module.bound:
            unique = f"_{short}{name}" if name.startswith("_") else f"{short}_{name}"
            alone = counts[name] == 1 and (module.name, name) not in dotted
            taken[module.name, name] = name if alone else unique
    return taken


class Uses(ast.NodeVisitor):
    """Collects (node, new text) for every use of a name of ours in a module, with regard to what functions bind."""

    def __init__(self, module: Module, names: dict[tuple[str, str], str]):
        self.module, self.names = module, names
        self.edits: list[tuple[int, int, int, str]] = []
        self.local: list[set[str]] = []

    def new_name(self, name: str) -> str | None:
        """What a name of the module's top level is called now; None for one that is not ours."""
        if any(name in local for local in self.local):
            return None
        if name in self.module.bound:
            return self.names[self.module.name, name]
        origin, theirs = self.module.imported.get(name, (None, None))
        return None if origin is None or theirs is None else self.names[origin, theirs]

    def visit_Name(self, node: ast.Name) -> None:
        new = self.new_name(node.id)
        if new is not None and new != node.id:
            self.edits.append((node.lineno, node.col_offset, node.end_col_offset or 0, new))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = node.value
        if isinstance(value, ast.Name) and not any(value.id in local for local in self.local):
            origin, theirs = self.module.imported.get(value.id, (None, None))
            if origin is not None and theirs is None:
                self.edits.append(
                    (node.lineno, node.col_offset, node.end_col_offset or 0, self.names[origin, node.attr])
                )
                return
        self.visit(value)

    def _definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        new = self.new_name(node.name) if not self.local and node in self.module.tree.body else None
        if new is not None and new != node.name:
            start = node.col_offset + (4 if isinstance(node, ast.FunctionDef) else 6)
            self.edits.append((node.lineno, start, start + len(node.name), new))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._definition(node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._definition(node)
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self._annotation(argument.annotation)
        self._annotation(node.returns)
        self.local.append(_locals(node))
        for statement in node.body:
            self.visit(statement)
        self.local.pop()

    def _annotation(self, node: ast.expr | None) -> None:
        """A class is named in quotes within its own body."""
        for one in ast.walk(node) if node is not None else ():
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                for word in re.finditer(r"\w+", one.value):
                    new, start = self.new_name(word[0]), one.col_offset + 1
                    if new is not None and new != word[0]:
                        self.edits.append((one.lineno, start + word.start(), start + word.end(), new))
        if node is not None:
            self.visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.local.append(_locals(node))
        self.visit(node.body)
        self.local.pop()


def _locals(function: ast.FunctionDef | ast.Lambda) -> set[str]:
    """Names that a function binds, those of functions within it included: none of ours has such a name and is used."""
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef) and node is not function:
            names.add(node.name)
    return names


class Part(NamedTuple):
    """A statement of a top level as it is written.  binds, uses: names of the one file, and of what is imported.

    owner: the name that it completes, as f does `f.defvjp(forward, backward)` and a function under `@f.defjvp`.
    """

    text: str
    binds: set[str]
    uses: set[str]
    owner: str | None

    def is_needed(self, kept: set[str]) -> bool:
        return bool(self.binds & kept) or self.owner in kept


def parts(module: Module, names: dict[tuple[str, str], str]) -> list[Part]:
    """A module's statements and the comments before them, without docstring and imports."""
    uses = Uses(module, names)
    uses.visit(module.tree)
    lines = [line.encode() for line in module.source.splitlines()]
    for row, start, end, new in sorted(uses.edits, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = line[:start] + new.encode() + line[end:]
    made, written = [], 0
    for node in module.tree.body:
        end = node.end_lineno or 0
        chunk = "\n".join(line.decode() for line in lines[written:end]).strip("\n")
        written = end
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or (text and node is module.tree.body[0]):
            continue
        if text:  # It says what the name before it is.
            made[-1] = made[-1]._replace(text=f"{made[-1].text}\n{chunk}")
            continue
        binds = {names[module.name, name] for name in _bound([node])}
        tree = ast.parse(chunk)
        used = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name)}
        owner = _owner(tree.body[0])
        made.append(Part(chunk, binds, used - binds, owner if owner in names.values() else None))
    return made


def _owner(node: ast.stmt) -> str | None:
    completing = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        completing = [node.value.func]
    names = [x.value.id for x in completing if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name)]
    return names[0] if names else None


def needed(found: Sequence[list[Part]]) -> list[list[Part]]:
    """Of each module's parts those that the last one needs."""
    kept = set().union(*(part.binds | part.uses for part in found[-1]))
    grown = True
    while grown:
        size = len(kept)
        for part in (part for module in found for part in module):
            if part.is_needed(kept):
                kept |= part.binds | part.uses
        grown = len(kept) > size
    return [[part for part in module if part.is_needed(kept)] for module in found]


def imports(found: Sequence[Module], used: set[str]) -> str:
    """The import statements of what is not ours, and used."""
    wanted: dict[str, set[str]] = {}
    for origin, name, local in {one for module in found for one in module.externals}:
        if local.partition(".")[0] in used:
            shown = name if name == local else f"{name} as {local}"
            wanted.setdefault(origin, set()).add(shown)
    whole = [f"import {name}" for name in sorted(wanted.pop("", set()))]
    return "\n".join(whole + [f"from {origin} import {', '.join(sorted(wanted[origin]))}" for origin in sorted(wanted)])


def eject(family: str) -> str:
    """The file of a family."""
    found = modules(f"zoo.models.{family}")
    names = renamed(found)
    kept = [part for module in needed([parts(module, names) for module in found]) for part in module]
    head = ast.get_docstring(found[-1].tree, clean=False)
    origin = "Made by `zoo eject` of flaxzoo (Apache-2.0). Attention is the plain equation; the rest is as it was."
    used = set().union(*(part.uses for part in kept))
    return "\n\n\n".join([f'"""{head}\n{origin}\n"""', imports(found, used), *(part.text for part in kept)]) + "\n"


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if len(arguments) != 1:
        raise UserError(f"zoo eject takes one family, and got {len(arguments)} arguments")
    if arguments[0] not in FAMILIES:
        nearest = difflib.get_close_matches(arguments[0], FAMILIES, n=1, cutoff=0.0)[0]
        raise UserError(f"family {arguments[0]!r} is unknown: did you mean {nearest}? All: {', '.join(FAMILIES)}")
    print(eject(arguments[0]), end="")
    return 0
