"""docs/migrating.md runs as it stands, on a checkpoint that transformers 4 wrote, and names what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

from zoo.cli import main
from zoo.models.bert import HEADS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migrating.md"


def test_the_page_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-flax-model").symlink_to(ROOT / "tests" / "parity" / "flax" / "gpt2")
    (command,) = re.findall(r"^    zoo (convert .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert main(command.split()) == 0
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=os.environ, check=False
    )
    assert result.returncode == 0, result.stderr
    losses = [float(line) for line in result.stdout.split()]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert (tmp_path / "my-tuned-model" / "model.safetensors").exists()


def test_it_names_every_head_of_bert() -> None:
    named = re.findall(r'^\| `FlaxBert.*head `"(\w+)"`', PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(HEADS)
