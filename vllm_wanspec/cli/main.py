"""``wanspec``: the command line."""

import sys
from typing import Annotated

import typer

from vllm_wanspec import __version__
from vllm_wanspec.cli.bench import bench
from vllm_wanspec.cli.demo import demo
from vllm_wanspec.cli.drafter import drafter
from vllm_wanspec.cli.report import report
from vllm_wanspec.cli.serve import serve
from vllm_wanspec.cli.trace import trace
from vllm_wanspec.cli.wan import wan
from vllm_wanspec.errors import WanspecError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(bench)
app.command()(demo)
app.command(context_settings=PASS_ON, options_metavar="MODEL [OPTIONS OF VLLM SERVE]")(drafter)
app.command()(report)
app.command(context_settings=PASS_ON, options_metavar="--wanspec FILE MODEL [OPTIONS]")(serve)
app.command()(trace)
app.command()(wan)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wanspec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Remote speculative drafting for vLLM."""


def run() -> None:
    """Run the command line; what is wrong on this side is one line and exit status 2."""
    try:
        app()
    except WanspecError as error:
        sys.stderr.write(f"wanspec: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    run()
