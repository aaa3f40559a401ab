"""`benchmarks` is no installed package: its tests find it at the root."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
