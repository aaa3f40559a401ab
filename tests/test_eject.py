"""`zoo eject`: files of a family that run where there is no zoo, and give what zoo gives."""

import inspect
import json
import subprocess
import sys
from types import ModuleType
from typing import Any, get_type_hints

import jax
import numpy as np
import pytest
from flax import nnx

from zoo.cli import main
from zoo.commands.eject import eject
from zoo.models import FAMILIES, bert, gpt, llama, t5

SIZES = {"vocab_size": 150, "num_layers": 2, "width": 32, "num_heads": 4}
FAMILIES_RUN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gpt": (gpt, "GPTConfig", SIZES | {"max_length": 16, "windows": (None, 3)}),
    "bert": (bert, "BertConfig", SIZES | {"max_length": 16, "mlp_width": 48, "head": "masked_lm"}),
    "llama": (llama, "LlamaConfig", SIZES | {"max_length": 16, "mlp_width": 48, "num_kv_heads": 2}),
    "t5": (t5, "T5Config", SIZES | {"head_dim": 6, "mlp_width": 48}),
}
TOKENS = [[3, 141, 59, 26, 5, 35, 89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50, 28]]

RUN = """
import importlib.util, json, sys
import jax, numpy as np
from flax import nnx

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("zoo", "kernels", "train"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
found = {}
for family, (config, sizes) in json.loads(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location(f"my_{family}", f"my_{family}.py")
    mine = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mine
    spec.loader.exec_module(mine)
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    tokens = np.array(json.loads(sys.argv[2]), np.int32)
    given = (tokens, tokens) if family == "t5" else (tokens,)
    model = jax.jit(lambda: getattr(mine, config)(**sizes).build(nnx.Rngs(0)))()
    found[family] = jax.jit(lambda model: model(*given).logits)(model)
np.savez("logits.npz", **found)
"""


def test_ejected_families_give_the_same_logits_without_zoo(tmp_path) -> None:
    for family in FAMILIES_RUN:
        (tmp_path / f"my_{family}.py").write_text(eject(family))
    told = json.dumps({family: (config, sizes) for family, (_, config, sizes) in FAMILIES_RUN.items()})
    command = [sys.executable, "-c", RUN, told, json.dumps(TOKENS)]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = np.load(tmp_path / "logits.npz")
    tokens = np.array(TOKENS, np.int32)
    for family, (module, config, sizes) in FAMILIES_RUN.items():
        given = (tokens, tokens) if family == "t5" else (tokens,)
        model = jax.jit(lambda m=module, c=config, s=sizes: getattr(m, c)(**s).build(nnx.Rngs(0)))()
        expected = jax.jit(lambda model, g=given: model(*g).logits)(model)
        np.testing.assert_allclose(found[family], expected, atol=1e-5, err_msg=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole_and_names_nothing_of_zoo(family, monkeypatch) -> None:
    text, module = eject(family), ModuleType(f"ejected_{family}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, family, "exec"), module.__dict__)
    ours = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    assert len(ours) > 10
    for function in (f for one in ours for f in vars(one).values() if inspect.isfunction(f)):
        if function.__module__ == module.__name__:
            get_type_hints(function, vars(module))
    assert "from zoo" not in text.replace("from zoo.kernels import attention", "") and text.count(chr(34) * 3) >= 4


def test_what_a_person_gets_wrong(capsys) -> None:
    for arguments, message in (
        (["eject", "gtp"], "zoo: family 'gtp' is unknown: did you mean gpt? All: "),
        (["eject", "gpt", "bert"], "zoo: zoo eject takes one family, and got 2 arguments"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(message)
