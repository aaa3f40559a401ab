"""docs/attention.md runs from top to bottom on eight devices, and prints what it says."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_page_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) == 9
    program = "\n".join(examples)
    result = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    (said,) = re.findall(r"\nprints\n\n((?:    .*\n)+)", PAGE)
    assert result.stdout == textwrap.dedent(said)
