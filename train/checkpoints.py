"""Checkpoints: saved in the background, complete when their manifest is, and read only where they verify.

A state is any pytree of arrays and nnx Variables. On disk it is a flat mapping from readable names
("model.blocks.attention.query.kernel") to arrays, so that no file knows of a module, a mesh or a number of hosts: a
checkpoint opens on another layout, and in part.

With several processes, each of them makes the same calls in the same order, and all of them see the folder.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np

from zoo.sharding import is_variable
from zoo.train import arrays, manifest
from zoo.train.arrays import DamagedError
from zoo.train.experiment import UserError
from zoo.train.manifest import Manifest
from zoo.train.processes import agreed, on_first

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
Result = TypeVar("Result")


class Restored(NamedTuple):
    """A state (or arrays by name), the step it was saved at, and what was saved with it."""

    state: Any
    step: int
    meta: dict[str, Any]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name: attributes, keys and indices from the root, joined with dots."""
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in result:
            raise ValueError(f"two arrays of the state are both named {name!r}: rename one of the tree's keys")
        result[name] = leaf.get_value() if is_variable(leaf) else leaf
    return result


class Checkpoints:
    """The checkpoints of one run, for what trains it.

    keep_last: how many of the newest to keep. keep_every: steps divisible by it are kept as well. say: receives, in one
    line, what a person should know though nothing stops for it, such as going back to an older checkpoint.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int | None = None, say: Say = _log.warning):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(f"keep_last={keep_last}, keep_every={keep_every}: choose whole numbers from 1")
        self.folder = Path(folder)
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._say = say
        self._current: int | None = None
        self._damaged: set[int] = set()
        self._background: threading.Thread | None = None
        self._failure = ""

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; whether each verifies is not looked at."""
        return steps(self.folder)

    def verify(self, step: int) -> list[str]:
        """What is wrong with the checkpoint, one line each; see `verify`."""
        return verify(self.folder, step)

    def save(self, step: int, state: Any, *, meta: dict[str, Any]) -> None:
        """Copies `state` to the host and returns; the writing goes on in the background, after that of the last save.

        `meta` is any JSON. The step that was saved or restored last is not written again. Raises UserError where the
        save before failed; then nothing was started, and the next call tries anew.
        """
        from zoo.train.saving import Save  # imports orbax, which reading does without

        self.wait()
        if step == self._current:
            return
        Manifest(step, meta, {}, {}).encode()  # raises here, not in the background, on what is not JSON
        values = {name: jax.numpy.asarray(value) for name, value in named(state).items()}
        for name, value in values.items():
            if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise TypeError(f"{name} is a typed random key: put jax.random.key_data of it into the state")
        under_way = Save(self.folder / manifest.folder_name(step), step, values, meta)

        def finish() -> None:
            self._failure = under_way.finish()
            if not self._failure:
                self._damaged.discard(step)
                if jax.process_index() == 0:
                    self._delete_old(step)

        self._current = step
        self._background = threading.Thread(target=finish, name="checkpoint")
        self._background.start()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises UserError, once, where it failed. Training may go on."""
        if self._background is None:
            return
        self._background.join()
        self._background = None
        if self._failure:
            step, self._current = self._current, None
            raise UserError(
                f"checkpoint {step} was not saved in {self.folder}: {self._failure}; those before it are as they were"
            )

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that verifies, laid out as `abstract_state` (see `sharding.with_shardings`) asks.

        None where there is no checkpoint at all. Says which ones it passed over, and why. Raises UserError where none
        verifies, or where the arrays are not those of `abstract_state` in name, shape and dtype: nothing is cast.
        """
        wanted = named(abstract_state)
        found = _read(self.folder, None, lambda stored: _matching(stored, wanted, ""), self._say, self._damaged.add)
        if found is None:
            return None
        self._current = found.step
        return found._replace(state=_rebuild(abstract_state, found.state))

    def _delete_old(self, step: int) -> None:
        """Deletes what is not to be kept up to `step`; a later one, passed over at the start, waits its turn."""
        past = [old for old in self.steps() if old <= step]
        good = [old for old in past if old not in self._damaged]
        kept = {*good[-self._keep_last :], *(old for old in good if self._keep_every and old % self._keep_every == 0)}
        for old in past:
            if old not in kept:
                try:
                    manifest.remove(self.folder / manifest.folder_name(old))
                except OSError as error:
                    self._say(f"checkpoint {old} could not be deleted: {error.strerror}")


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending."""
    found = manifest.checkpoint_folders(Path(folder))
    return [step for step, path in found.items() if (path / manifest.NAME).exists()]


def verify(folder: Path, step: int) -> list[str]:
    """Reads every byte of a checkpoint, a chunk at a time; one line for each thing that is not as it was written."""
    path = Path(folder) / manifest.folder_name(step)
    try:
        stored = manifest.read(path)
    except DamagedError as error:
        return [str(error)]
    found = list(manifest.problems(path, stored, stored.files))
    found += [f"{file} does not belong to it" for file in manifest.strangers(path, stored)]
    for name, array in stored.arrays.items():
        lines = arrays.damage(path / manifest.array_folder(name), array["shape"], array["chunks"])
        found += [f"{name}: {line}" for line in lines]
    return found


def load_arrays(
    folder: Path, names: Iterable[str] | None = None, step: int | None = None, *, say: Say = _log.warning
) -> Restored:
    """Arrays of a checkpoint in the memory of this host, whatever wrote them: numpy arrays by name, as `state`.

    names: an array's name, or the beginning of several up to a dot ("model"); None means all. step: None means the
    newest that verifies. Of the files, only those of the arrays named are opened. Raises UserError where there is none.
    """
    prefixes = None if names is None else tuple(names)

    def choose(stored: Manifest) -> dict[str, Any]:
        if prefixes is None:
            return dict.fromkeys(stored.arrays)
        for prefix in prefixes:
            if not any(_below(name, prefix) for name in stored.arrays):
                tops = sorted({name.split(".")[0] for name in stored.arrays})
                raise UserError(f"checkpoint {stored.step} has no array {prefix!r}: it has {', '.join(tops)}")
        return {name: None for name in stored.arrays if any(_below(name, prefix) for prefix in prefixes)}

    return _require(_read(Path(folder), step, choose, say), folder)


def load(folder: Path, abstract: Any, under: str, step: int | None = None, *, say: Say = _log.warning) -> Restored:
    """The part of a checkpoint named `under` ("model", "ema") as the tree `abstract`, on its shardings if it has any.

    Otherwise as `Checkpoints.restore`; raises UserError where there is no checkpoint.
    """
    wanted = {f"{under}.{name}" if name else under: leaf for name, leaf in named(abstract).items()}
    found = _require(_read(Path(folder), step, lambda stored: _matching(stored, wanted, under), say), folder)
    below = {name[len(under) + 1 :]: value for name, value in found.state.items()}
    return found._replace(state=_rebuild(abstract, below))


def _read(
    folder: Path,
    step: int | None,
    choose: Callable[[Manifest], dict[str, Any]],
    say: Say,
    passed_over: Callable[[int], None] = lambda step: None,
) -> Restored | None:
    """The arrays that `choose` names, from checkpoint `step` or else from the newest in which they verify.

    None where there is no checkpoint. All processes try the same ones, and go on to the next together.
    """
    # What the first process sees, for another may see a checkpoint come or go; the newest 400 fit into a message.
    present = [int(word) for word in on_first(lambda: " ".join(map(str, steps(folder)[-400:]))).split()]
    if step is not None and step not in present:
        raise UserError(f"{folder} has no checkpoint {step}: it has {', '.join(map(str, present)) or 'none'}")
    if not present:
        return None
    refused = []
    for candidate in [step] if step is not None else reversed(present):
        if refused:
            say(f"{refused[-1]}; going back to checkpoint {candidate}")
        try:
            return _read_one(folder / manifest.folder_name(candidate), choose, say)
        except DamagedError as error:
            passed_over(candidate)
            refused.append(f"checkpoint {candidate} does not verify: {error}")
    raise UserError(
        f"no checkpoint in {folder} can be used ({'; '.join(refused)}): bring back a copy, or begin in another folder"
    )


def _read_one(path: Path, choose: Callable[[Manifest], dict[str, Any]], say: Say) -> Restored:
    stored = _together(lambda: manifest.read(path))
    wanted = choose(stored)
    _together(lambda: _check_files(path, stored, wanted, say))
    folders = {name: path / manifest.array_folder(name) for name in wanted}
    values = _together(lambda: arrays.read(folders, wanted))
    return Restored(values, stored.step, stored.meta)


def _check_files(path: Path, stored: Manifest, wanted: Mapping[str, Any], say: Say) -> None:
    """Looks at the files behind `wanted`, each process at its share; raises DamagedError on one that is not right."""
    files = list(stored.files)
    if len(wanted) < len(stored.arrays):
        folders = {manifest.array_folder(name) for name in wanted}
        files = [file for file in files if "/".join(file.split("/")[:2]) in folders]
    for problem in manifest.problems(path, stored, files[jax.process_index() :: jax.process_count()]):
        raise DamagedError(problem)
    if jax.process_index() == 0 and (strangers := manifest.strangers(path, stored)):
        say(f"checkpoint {stored.step}: {len(strangers)} file(s) that do not belong to it are ignored ({strangers[0]})")


def _matching(stored: Manifest, wanted: dict[str, Any], under: str) -> dict[str, Any]:
    """`wanted`, if these are the arrays stored below `under`; raises UserError that names the first that is not."""
    held = {name: array for name, array in stored.arrays.items() if _below(name, under)}
    differences = []
    for name in sorted(held.keys() | wanted.keys()):
        has = f"{held[name]['dtype']}{held[name]['shape']}" if name in held else "nothing"
        wants = f"{np.dtype(wanted[name].dtype).name}{list(wanted[name].shape)}" if name in wanted else "nothing"
        if has != wants:
            differences.append(f"{name} is {has} in the checkpoint and {wants} here")
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"checkpoint {stored.step} does not fit: {differences[0]}{more}; give the flags it was made with"
        )
    return wanted


def _below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _rebuild(tree: Any, values: Mapping[str, Any]) -> Any:
    """`tree` with each leaf replaced by the array of its name."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_variable)
    arrived = (values[name] for name in named(tree))
    return jax.tree.unflatten(
        structure,
        [leaf.replace(value) if is_variable(leaf) else value for leaf, value in zip(leaves, arrived, strict=True)],
    )


def _require(found: Restored | None, folder: Path) -> Restored:
    if found is None:
        raise UserError(f"{folder} has no checkpoint: train first, or name another run")
    return found


def _together(action: Callable[[], Result]) -> Result:
    """The result of `action`; if it raises DamagedError in one process, every process raises it."""
    problem, result = "", None
    try:
        result = action()
    except DamagedError as error:
        problem = str(error) or "damaged"
    if problem := agreed(problem):
        raise DamagedError(problem)
    return cast(Result, result)
