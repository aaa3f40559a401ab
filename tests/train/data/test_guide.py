"""The code in docs/data.md runs as it stands there."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_guide_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})
    output = capsys.readouterr().out
    assert "DataInfo" in output and "gzip -9" in output
