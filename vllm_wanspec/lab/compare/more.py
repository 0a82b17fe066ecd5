"""``make bench-more``: the bench under further conditions, one changed at a time around one stream at R = 30 ms.

``python -m vllm_wanspec.lab.compare.more --help`` lists the settings. Each condition is a run of its own, with a result
file of its own, and interrupted ones go on: the same command again measures what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.more_report import more_report
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.report import bench_report, shown_options
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.run import run_compare
from vllm_wanspec.lab.compare.studies import STUDIES, base_options, study_options
from vllm_wanspec.lab.harness.models import find_models, read_prompts
from vllm_wanspec.lab.harness.options import LogFolder, MarkdownFile, ModelsFolder, listed
from vllm_wanspec.lab.harness.provenance import git_commit
from vllm_wanspec.lab.harness.running import Outputs, check_needs, check_outputs, console_of_this_run, one_line_errors

PROGRAM = "python -m vllm_wanspec.lab.compare.more"


def measured(path: Path, options: Options, commit: str | None) -> Result | None:
    """Return a study's result if its file has one that is complete, of these settings and of this commit."""
    try:
        found = Result.of_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ConfigError):
        return None
    same = found.options.as_json() == shown_options(options) and found.provenance.commit == commit
    return found if same and found.ended_by is None else None


def run_studies(
    names: tuple[str, ...], base: Options, folder: Path, logs: Path | None, console: Console
) -> dict[str, Result]:
    """Measure what is missing of some studies; results by name.

    Args:
        names: Of the studies.
        base: Settings with nothing changed.
        folder: Existing folder of the result files.
        logs: Where the servers' logs are kept; None keeps them only after a failure.
        console: Where to show progress.

    Raises:
        ConfigError: Prompts or a path are missing or wrong.
        UnsupportedError: No vLLM that could be started.
        WanspecError: A server or a request failed.
    """
    commit, prompts = git_commit(), read_prompts(base.prompts, None)
    results = {}
    for name in names:
        study = STUDIES[name]
        options, path = study_options(study, base), folder / f"{name}.json"
        found = measured(path, options, commit)
        if found is None:
            console.rule(f"{study.title} ({name})")
            outputs = Outputs(path, None, logs and logs / name)
            found = run_compare(options, prompts, outputs, console, name=name, program=PROGRAM, report=bench_report)
        else:
            console.print(f"{name}: measured already, in {path}", style="dim", highlight=False)
        results[name] = found
    return results


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the result files, one for each condition.")],
    only: Annotated[str, typer.Option(metavar="NAMES", help="Which conditions.", show_default="all")] = ",".join(
        STUDIES
    ),
    count: Annotated[int, typer.Option(min=1, help="Prompts whose texts are long enough.")] = 24,
    time_scale: Annotated[
        float, typer.Option(help="Make paces and round trips this many times as long, where no condition says so.")
    ] = 1.25,
    models: ModelsFolder = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
) -> None:
    """Measure remote drafting and its peers under further conditions, one at a time.

    Exit status: 0 when all figures are valid and all outputs right, 1 when not or when something failed, 2 when this
    machine lacks something or an option is wrong, 130 after Ctrl-C.
    """
    with one_line_errors("bench-more"):
        check_needs(plots=markdown_file is not None)
        check_outputs(Outputs(None, markdown_file))
        if not folder.is_dir():
            raise ConfigError(f"--folder: {folder} is not a folder")
        console, found = console_of_this_run(), find_models(models)
        base = base_options(
            str(found.target), str(found.draft), found.bench_prompts, count=count, time_scale=time_scale
        )
        results = run_studies(listed("--only", only, tuple(STUDIES)), base, folder, keep_log, console)
        more_report(results).publish(Outputs(None, markdown_file), console)
    if any(result.faults() or result.wrong for result in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
