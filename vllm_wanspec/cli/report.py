"""``wanspec report``: tables and plots of a result file, made again from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.options import MarkdownFile
from vllm_wanspec.lab.harness.running import (
    Outputs,
    check_outputs,
    check_plots,
    console_of_this_run,
    one_line_errors,
)

__all__ = ["report"]


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="What wanspec bench wrote with --json.")],
    markdown_file: MarkdownFile = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result file anew, its figures recomputed.")
    ] = None,
) -> None:
    """Compute the figures of a bench again from what it recorded, and show its tables and plots.

    Exit status: 0, or 2 when the file is not such a result.
    """
    # Only here: what measures is slow to import, and every command imports this module.
    from vllm_wanspec.lab.compare.report import bench_report
    from vllm_wanspec.lab.compare.result import Result

    with one_line_errors("wanspec report"):
        outputs = Outputs(json_file, markdown_file)
        check_outputs(outputs)
        if markdown_file is not None:
            check_plots()
        bench_report(Result.of_json(_read(file))).publish(outputs, console_of_this_run())


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or "records" not in data:
        raise ConfigError(f"{path} has no records: it is not a result of wanspec bench, or of an older one")
    return data
