"""What runs attention in linear memory, forward and backward, and the one derivative that all such engines share.

The backward pass of any engine takes what the forward pass of any other gave, so that the choice between them can be
left to the platform that is compiled for.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import jax

from zoo.kernels import bias as biases
from zoo.kernels.mask import AttentionError
from zoo.kernels.memory import named
from zoo.kernels.problem import AttentionOutput, Problem


class Output(NamedTuple):
    """out [B, T, N, H'], normalised; lse [B, N, T], float32: log-sum-exp of each row's scores, -inf of an empty row."""

    out: jax.Array
    lse: jax.Array


class Learned(NamedTuple):
    """What gradients are taken of, or their gradients; the rest of a problem is integers."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: biases.Given


class Engine(Protocol):
    """Hashable: it is a static argument. Both passes take a problem whole and give the output or all gradients."""

    def forward(self, problem: Problem) -> Output: ...

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned: ...


class ByPlatform(NamedTuple):
    """The engine of the platform that is compiled for, settled at lowering; `default` where it has none of its own."""

    default: Engine
    tpu: Engine | None = None
    cuda: Engine | None = None

    def forward(self, problem: Problem) -> Output:
        special = {platform: engine.forward for platform, engine in self._special().items()}
        return jax.lax.platform_dependent(problem, default=self.default.forward, **special)

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        special = {platform: engine.backward for platform, engine in self._special().items()}
        return jax.lax.platform_dependent(problem, output, gradient, default=self.default.backward, **special)

    def _special(self) -> dict[str, Engine]:
        engines = {"tpu": self.tpu, "cuda": self.cuda}
        return {name: engine for name, engine in engines.items() if engine is not None and engine != self.default}


def attend(engine: Engine, problem: Problem) -> AttentionOutput:
    """Differentiable once, in reverse, through the output and through lse."""
    p = problem
    learned = Learned(p.q, p.k, p.v, p.bias)
    rest = p.replace(q=None, k=None, v=None, bias=None)
    output = cast(Output, _attend(engine, learned, rest))
    return AttentionOutput(output.out, output.lse.swapaxes(1, 2))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(engine: Engine, learned: Learned, rest: Problem) -> Output:
    return _attend_forward(engine, learned, rest)[0]


def _attend_forward(engine: Engine, learned: Learned, rest: Problem) -> tuple[Output, tuple]:
    out, lse = engine.forward(rest.replace(**learned._asdict()))
    output = Output(named(out, "attention_out"), named(lse, "attention_lse"))
    return output, (learned, rest, output)


def _attend_backward(engine: Engine, saved: tuple, gradient: Output) -> tuple[Learned, None]:
    learned, rest, output = saved
    return cast(Learned, _first_derivative(engine, rest.replace(**learned._asdict()), output, gradient)), None


_attend.defvjp(_attend_forward, _attend_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_derivative(engine: Engine, problem: Problem, output: Output, gradient: Output) -> Learned:
    return engine.backward(problem, output, gradient)


@_first_derivative.defjvp
def _second_derivative(engine: Engine, primals: Any, tangents: Any) -> Any:
    raise AttentionError("this attention has first derivatives alone: for second ones take impl='xla'")
