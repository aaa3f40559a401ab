"""Which attention calls compile for TPUs that are not there: head size x feature x chip, forward and backward.

    pip install -e ".[aot]" && python -m benchmarks.tpu_grid

2 rows of 2048 queries and keys, 8 query heads over 2 key/value heads, bfloat16 where the feature names no other.
`compiles` means that the compiler for that chip made a program of it within the chip's memories; nothing was run.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import tpu

HEAD_DIMS = (64, 80, 96, 128, 256)
FEATURES = ("none", "causal", "window", "prefix", "segments", "positions", "lengths", "where", "soft_cap", "bound",
            "alibi", "t5", "absolute", "array", "dropout", "odd_lengths", "all",
            "float32", "float32_array", "float32_all")  # fmt: skip
BATCH, LENGTH, HEADS, KV_HEADS = 2, 2048, 8, 2


def masked(feature: str, rows: Any) -> Any:
    """The mask of a feature; rows: integers [B, L]."""
    from zoo.kernels import Mask

    parts = {
        "causal": Mask(causal=True),
        "window": Mask(window=512),
        "prefix": Mask(causal=True, prefix=rows[:, 0]),
        "segments": Mask(segments=rows),
        "positions": Mask(causal=True, positions=rows),
        "lengths": Mask(lengths=rows[:, 0]),
        "where": Mask(where=lambda q, k: (q + k) % 3 != 0),
    }
    whole = Mask()
    for name, part in parts.items():
        whole = whole & part if feature in (name, "all") else whole
    return whole


def call(feature: str, head_dim: int) -> tuple[Any, list[Any]]:
    """A function of q, k, v and integers [B, L], and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from zoo.kernels import Bias, attention

    dtype = jnp.float32 if feature.startswith("float32") else jnp.bfloat16
    feature = feature.removeprefix("float32_")

    def alibi(slopes: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        return slopes[head] * (key - query)

    def t5(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        distance = jnp.abs(key - query)
        far = 8 + (2 * jnp.log2(jnp.maximum(distance, 1) / 8)).astype(jnp.int32)
        return table[jnp.where(key > query, 16, 0) + jnp.where(distance < 8, distance, jnp.minimum(far, 15)), head]

    def absolute(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        return table[key % 32, head] * (query % 7)

    options: dict[str, Any] = {}
    if feature in ("soft_cap", "all"):
        options["soft_cap"] = 100.0
    if feature == "bound":
        options["logits_bound"] = 20.0
    if feature in ("dropout", "all"):
        options |= {"dropout": 0.1, "dropout_key": jax.random.key(0)}

    biases: dict[str, Any] = {
        "alibi": Bias(alibi, jnp.ones(HEADS)),
        "absolute": Bias(absolute, jnp.ones((32, HEADS))),
        "array": jnp.ones((1, HEADS, LENGTH, LENGTH), dtype),
        **dict.fromkeys(("t5", "all"), Bias(t5, jnp.ones((32, HEADS)))),
    }

    def step(q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any) -> jax.Array:
            return attention(q, k, v, masked(feature, rows), bias=bias, impl="tpu_flash", **options)

        out, pull = jax.vjp(attend, q, k, v, biases.get(feature))
        return out, pull(out)

    length = 1700 if feature == "odd_lengths" else LENGTH
    heads = [jax.ShapeDtypeStruct((BATCH, length, n, head_dim), dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return step, [*heads, jax.ShapeDtypeStruct((BATCH, length), jnp.int32)]


def compiles(chip: str, head_dim: int, feature: str) -> str:
    """ "compiles", or the first line of what the compiler said."""
    tpu.prepare()
    from benchmarks.attention_cases import reason

    step, shapes = call(feature, head_dim)
    try:
        tpu.compile_for(chip, step, *shapes)
    except Exception as error:  # Whatever the compiler raises is the answer.
        return reason(error)[:200]
    return "compiles"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"], choices=tpu.TOPOLOGIES)
    parser.add_argument("--features", nargs="+", default=FEATURES, choices=FEATURES)
    given = parser.parse_args()
    chips, features = given.chips, given.features
    cases = [(chip, head_dim, feature) for chip in chips for feature in features for head_dim in HEAD_DIMS]
    answers = tpu.in_processes(compiles, cases, share=20)
    print("\n".join(table(answers, chips, features)))


def table(answers: dict[tuple, str], chips: Sequence[str], features: Sequence[str]) -> list[str]:
    """Markdown: the head sizes that compile by feature and chip, and below what the compiler said of the others."""
    lines = ["| feature | " + " | ".join(chips) + " |", "|---|" + "---|" * len(chips)]
    for feature in features:
        good = [[str(h) for h in HEAD_DIMS if answers[chip, h, feature] == "compiles"] for chip in chips]
        lines.append(f"| {feature} | " + " | ".join(", ".join(sizes) or "-" for sizes in good) + " |")
    refused = {case: answer for case, answer in answers.items() if answer != "compiles"}
    lines += ["", f"{len(answers) - len(refused)} of {len(answers)} compile"]
    return lines + [f"- {chip}, H = {h}, {feature}: {answer}" for (chip, h, feature), answer in refused.items()]


if __name__ == "__main__":
    main()
