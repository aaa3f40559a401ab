"""Damages checkpoints and counts what is noticed: python -m benchmarks.bit_flips [CHECKPOINTS] [--trials N]

CHECKPOINTS is the `checkpoints` folder of a run that has at least two of them; it is copied. Without it, a small one
is made. In the newest, one random bit of every file is flipped, N times over; then every file is truncated, extended,
zeroed and removed, and one is added. `verify` has to report each, and `restore` to go back to the checkpoint before (it
reports an added file and ignores it). The exit status is 1 if anything passed unnoticed.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from zoo.train import manifest
from zoo.train.checkpoints import Checkpoints, verify


def make(folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep_last=2)
    for step in (1, 2):
        key = jax.random.key(step)
        state = {
            "step": jnp.asarray(step),
            "model": {"kernel": jax.random.normal(key, (32, 16)), "scale": jnp.ones(16, jnp.bfloat16)},
            "ema": {"kernel": jnp.zeros((32, 16)), "scale": jnp.zeros(16, jnp.bfloat16)},
        }
        checkpoints.save(step, state, meta={"seed": 0, "learning_rate": 3e-4, "data": {"position": 17}})
    checkpoints.wait()


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "flipped bit": flip,
    "truncated by a byte": lambda file, draw: file.write_bytes(file.read_bytes()[:-1]),
    "truncated anywhere": lambda file, draw: file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)]),
    "a byte appended": lambda file, draw: file.write_bytes(file.read_bytes() + b"\0"),
    "zeros of the same size": lambda file, draw: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file, draw: file.unlink(),
}


def noticed(folder: Path) -> Iterator[str]:
    """Which of verify and restore see that the newest checkpoint is damaged."""
    *_, before, newest = manifest.checkpoint_folders(folder)
    if verify(folder, newest):
        yield "verify"
    stored = manifest.read(folder / manifest.folder_name(before)).arrays
    abstract = {name: jax.ShapeDtypeStruct(array["shape"], array["dtype"]) for name, array in stored.items()}
    said: list[str] = []
    restored = Checkpoints(folder, keep_last=1, say=said.append).restore(abstract)
    if restored is not None and restored.step == before:
        yield "restore"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="?")
    parser.add_argument("--trials", type=int, default=100, help="flipped bits for each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoints"
        if options.checkpoints is None:
            make(folder)
        else:
            if len(manifest.checkpoint_folders(options.checkpoints)) < 2:
                parser.error(f"{options.checkpoints} holds fewer than two checkpoints: name the folder of a longer run")
            shutil.copytree(options.checkpoints, folder)
        *_, path = manifest.checkpoint_folders(folder).values()
        files = sorted(file for file in path.rglob("*") if file.is_file())
        print(f"a checkpoint of {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
        print(f"{'damage':<24}{'trials':>8}{'verify':>8}{'restore':>8}")
        unnoticed = 0
        for kind, damage in DAMAGE.items():
            victims = files * (options.trials if kind == "flipped bit" else 1)
            seen: Counter[str] = Counter()
            for file in victims:
                original = file.read_bytes()
                damage(file, draw)
                seen.update(noticed(folder))
                file.write_bytes(original)
            unnoticed += 2 * len(victims) - seen.total()
            print(f"{kind:<24}{len(victims):>8}{seen['verify']:>8}{seen['restore']:>8}", flush=True)
        (path / manifest.ARRAYS / "added").write_bytes(b"?")
        added = verify(folder, int(path.name.split("_")[1])) == ["arrays/added does not belong to it"]
        print(f"{'a file added':<24}{1:>8}{int(added):>8}{'-':>8}")
    return 1 if unnoticed or not added else 0


if __name__ == "__main__":
    sys.exit(main())
