"""FLOPs of a traced program, counted from its equations: what a config's `forward_flops` is compared with."""

import math
from typing import Any

from jax.extend.core import jaxprs_in_params


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions; a multiply-add is two."""
    total = 0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [variable.aval.shape for variable in equation.invars]
        if name == "conv_general_dilated":
            total += 2 * equation.outvars[0].aval.size * math.prod(shapes[1][:3])
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "cond":  # one branch for each platform: any one of them runs
            total += product_flops(equation.params["branches"][0].jaxpr)
        else:
            for inner in jaxprs_in_params(equation.params):
                total += product_flops(inner) * equation.params.get("length", 1)
    return total
