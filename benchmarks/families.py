"""Every family and head: parity with the published implementation, round trips, caches, sharding, compiling for a pod.

    python -m benchmarks.families --out docs/models.md                   an hour and a half
    python -m benchmarks.families --out docs/models.md --only samplers   one table
    python -m benchmarks.families --out docs/models.md --kinds t5        one model_type, preset of diffusion, or class
    python -m benchmarks.families --out docs/models.md --kinds           no row, but speeds that were measured since

Cells come from runs on eight simulated CPU devices, over the golden files of tests/parity, which transformers and
diffusers on torch made, and over presets of published size. Parity is the largest difference of any output, relative to
its largest value or 1. Compiling needs the extra `aot` (libtpu): it is of the training step, on 8 chips of a v5e, mesh
fsdp=8, bfloat16. Speed is the newest result of `benchmarks.train_step --save` and `benchmarks.diffusion --save`, zoo
over torch, in rows that stay as well.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from benchmarks import diffusion_rows, family_table, sampler_rows, transformer_rows

TABLES = {
    "transformers": transformer_rows.table,
    "diffusion": diffusion_rows.networks,
    "pipelines": diffusion_rows.pipelines,
    "samplers": sampler_rows.table,
}


def main() -> None:
    tables = {title: make() for title, make in TABLES.items()}
    kinds = sorted({kind for table in tables.values() for kind in table.rows.values()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a page whose tables, between their marks, are written")
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables), help="tables; default: all")
    parser.add_argument("--kinds", nargs="*", choices=kinds, default=kinds, metavar="KIND", help="default: all")
    options = parser.parse_args()
    for title in options.only:
        page = family_table.rewritten(options.out.read_text(), title, tables[title], options.kinds)
        options.out.write_text(page)


if __name__ == "__main__":
    main()
