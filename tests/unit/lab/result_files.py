"""What result files hold, compared with those that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def committed(name: str) -> Any:
    """The committed result file of a bench."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def key_paths(value: Any, path: str = "") -> set[str]:
    """All keys of nested objects and lists, as in ``rows/rounds/ours``."""
    parts = []
    if isinstance(value, dict):
        parts = [{f"{path}/{key}"} | key_paths(part, f"{path}/{key}") for key, part in value.items()]
    elif isinstance(value, list):
        parts = [key_paths(part, path) for part in value]
    return set().union(*parts)
