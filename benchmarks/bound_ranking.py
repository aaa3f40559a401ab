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

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu, tpu_bound
from benchmarks.attention_cases import Case
from benchmarks.splash import Sizes, Splash
from benchmarks.tpu_bound import Part

CHIP = "v7x"
RECORDS = "data/autotuning/tpu7x/pallas_mosaic_tpu_flash_attention.json"


class Record(NamedTuple):
    """One measurement: a call, whether it gives residuals too, the configuration as JSON, and seconds."""

    call: Case
    residuals: bool
    config: str
    seconds: float

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that a causal mask leaves, over rows and heads."""
        return self.call.batch * self.call.heads * self.call.keys * (self.call.keys + 1) / 2


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
        call = Case("causal", b, length, length, heads, kv_heads, width, causal=True)
        for config, result in configs.items():
            seconds = float(np.median(result["evaluation_times_ms"])) / 1e3
            found.append(Record(call, given["return_residuals"], config, seconds))
    return found


def bound(record: Record) -> float:
    """Seconds; in a process that has compiled for no TPU yet."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

        call, config = record.call, json.loads(record.config)
        layouts = {name: splash.QKVLayout(config.pop(name)) for name in ("q_layout", "k_layout", "v_layout")}
        kernel = splash.make_splash_mha_single_device(
            masks.CausalMask((call.keys, call.keys)),
            config=splash.SplashConfig(**config, **layouts),
            save_residuals=record.residuals,
        )

        def run(q: Any, k: Any, v: Any) -> Any:
            """As tokamax.dot_product_attention calls it."""
            q, k, v = (x.swapaxes(1, 2) for x in (q * call.head_dim**-0.5, k, v))
            out = jax.vmap(kernel)(q, k, v)
            return (out[0].swapaxes(1, 2), out[1]) if record.residuals else out.swapaxes(1, 2)

        shapes = [
            jax.ShapeDtypeStruct((call.batch, call.keys, n, call.head_dim), jnp.bfloat16)
            for n in (call.heads, call.kv_heads, call.kv_heads)
        ]
        compiled = tpu.compile_for(CHIP, run, *shapes)
        sizes = Sizes(config["block_q"], config["block_kv"], config["block_kv_compute"])
        part = Part("splash", Splash.FORWARD, sizes.area, *Splash(call, sizes).forward(record.residuals))
        return tpu_bound.bound([part], tpu.programs(Path(folder)), compiled.as_text(), CHIP).total


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
        modelled, call = found[record,], record.call
        size = f"{call.batch} x {call.keys} x {call.heads}:{call.kv_heads} x {call.head_dim}"
        figures = f"{1e3 * record.seconds:.3f} | {1e3 * modelled:.3f} | {record.seconds / modelled:.2f}"
        print(f"| {size} | {'yes' if record.residuals else 'no'} | {figures} |")
    times, bounds = (np.array(x) for x in ([r.seconds for r in measured], [found[r,] for r in measured]))
    pairs = np.array([record.pairs for record in measured])
    print(f"\nrank correlation of times {correlation(times, bounds):.3f}, of times per pair "
          f"{correlation(times / pairs, bounds / pairs):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
