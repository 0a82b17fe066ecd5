"""What the exactness tests found, for the table in docs/results: one JSON line each, where a file is asked for."""

import json
import os
from pathlib import Path
from typing import Any

RECORDS_ENV = "WANSPEC_EXACTNESS"


def note(**figures: Any) -> None:
    """Append figures of the test that runs to the file that ``WANSPEC_EXACTNESS`` names, if it does."""
    path = os.environ.get(RECORDS_ENV)
    if path:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, **figures}) + "\n")
