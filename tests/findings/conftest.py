"""Puts this folder and the unit tests' helpers on the path."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
_FOLDERS = ("unit", "unit/controller", "unit/core", "unit/drafter", "findings")

sys.path[:0] = [str(_TESTS / folder) for folder in _FOLDERS]
