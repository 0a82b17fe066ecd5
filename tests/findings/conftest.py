"""Puts the unit tests' helpers on the path (`toys`, `pools` and the like), and this folder's own."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
UNIT = HERE.parent / "unit"

# The unit tests' folder comes first: its helpers mean its own conftest where they import `conftest`.
sys.path[:0] = [str(folder) for folder in (UNIT, UNIT / "controller", UNIT / "core", UNIT / "drafter", HERE)]
