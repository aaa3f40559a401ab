"""docs/pretrained.md runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from zoo import models

PAGE = Path(__file__).parents[2] / "docs" / "pretrained.md"


def test_the_page_runs(tmp_path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 5
    program = "\n".join(f"exec(compile({example!r}, 'pretrained.md', 'exec'), {{}})" for example in examples)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "fsdp" in result.stdout


def test_the_table_names_every_model_type() -> None:
    first_column = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert set(first_column) - {"model_type"} == set(models.PUBLISHED)
