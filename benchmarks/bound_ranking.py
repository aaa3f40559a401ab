"""Whether the modelled bound ranks tokamax's attention kernels as tokamax's own measurements on a TPU do.

    python -m benchmarks.bound_ranking        (needs what benchmarks.attention_bound does)

tokamax ships the times of its tuned configurations on a TPU v7x. Of those that are causal, in bfloat16 and of one head
size, this prints the measured time, the bound for the same block sizes and layouts, and the rank correlations
(Spearman) of all times, and of times per pair of a query and a key: the latter do not follow from sizes alone.
"""

import importlib.resources
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import tpu, tpu_bound
from benchmarks.tpu_walks import Call, Sizes, Splash

CHIP = "v7x"
RECORDS = "data/autotuning/tpu7x/pallas_mosaic_tpu_flash_attention.json"


class Record(NamedTuple):
    """One measurement: a call, whether it gives residuals too, the configuration as JSON, and seconds."""

    batch: int
    call: Call
    residuals: bool
    config: str
    seconds: float

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that a causal mask leaves, over rows and heads."""
        return self.batch * self.call.heads * self.call.length * (self.call.length + 1) / 2


def records() -> list[Record]:
    text = (importlib.resources.files("tokamax") / RECORDS).read_text()
    found = []
    for key, configs in json.loads(text).items():
        given = json.loads(key)
        shapes = [re.fullmatch(r"bf16\[(\d+),(\d+),(\d+),(\d+)\]", given[name]) for name in "qkv"]
        if None in shapes or not given["mask"]["is_causal"]:
            continue
        (b, length, heads, width), (_, _, kv_heads, _), (*_, value) = (tuple(map(int, x.groups())) for x in shapes if x)
        if width != value:
            continue
        call = Call(f"{b} x {length} x {heads}:{kv_heads} x {width}", length, heads, kv_heads, width)
        for config, result in configs.items():
            seconds = float(np.median(result["evaluation_times_ms"])) / 1e3
            found.append(Record(b, call, given["return_residuals"], config, seconds))
    return found


def bound(record: Record) -> float:
    """Seconds; in a process that has not imported jax yet."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        import jax
        import jax.numpy as jnp
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

        call, config = record.call, json.loads(record.config)
        layouts = {name: splash.QKVLayout(config.pop(name)) for name in ("q_layout", "k_layout", "v_layout")}
        kernel = splash.make_splash_mha_single_device(
            masks.CausalMask((call.length, call.length)),
            config=splash.SplashConfig(**config, **layouts),
            save_residuals=record.residuals,
        )

        def run(q: Any, k: Any, v: Any) -> Any:
            """As tokamax.dot_product_attention calls it."""
            q, k, v = (x.swapaxes(1, 2) for x in (q * call.head_dim**-0.5, k, v))
            out = jax.vmap(kernel)(q, k, v)
            return (out[0].swapaxes(1, 2), out[1]) if record.residuals else out.swapaxes(1, 2)

        shapes = [
            jax.ShapeDtypeStruct((record.batch, call.length, n, call.head_dim), jnp.bfloat16)
            for n in (call.heads, call.kv_heads, call.kv_heads)
        ]
        compiled = tpu.compile_for(CHIP, run, *shapes)
        program = next(iter(tpu.programs(Path(folder), "splash")))
    core = tpu_bound.Core.of(CHIP)
    rows = Call(call.name, call.length, record.batch * call.heads, record.batch * call.kv_heads, call.head_dim)
    walk = Splash(rows, Sizes(config["block_q"], config["block_kv"], config["block_kv_compute"]))
    operands, steps = walk.forward(record.residuals)
    total = tpu_bound.cycles(program, Splash.FORWARD, operands, steps, core) + tpu_bound.around(compiled.as_text())
    return total / core.clock


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    measured = records()
    found = tpu.in_processes(bound, [(record,) for record in measured], share=1)
    print("| rows x length x heads x size | residuals | measured, ms | bound, ms | ratio |")
    print("|---|---|---:|---:|---:|")
    for record in measured:
        modelled = found[record,]
        print(
            f"| {record.call.name} | {'yes' if record.residuals else 'no'} | {1e3 * record.seconds:.3f} | "
            f"{1e3 * modelled:.3f} | {record.seconds / modelled:.2f} |"
        )
    times, bounds = (np.array(x) for x in ([r.seconds for r in measured], [found[r,] for r in measured]))
    pairs = np.array([record.pairs for record in measured])
    print(f"\nrank correlation of times {correlation(times, bounds):.3f}, of times per pair "
          f"{correlation(times / pairs, bounds / pairs):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
