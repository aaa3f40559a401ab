"""docs/foreign_code.md runs as it stands, learns, and needs nothing of zoo.train."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "foreign_code.md"
CHECKS = """
import sys
assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
assert not [name for name in sys.modules if name.startswith("zoo.train")]
"""


def test_the_page_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    program = "\n".join(f"exec(compile({example + CHECKS!r}, 'foreign_code.md', 'exec'), {{}})" for example in examples)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
