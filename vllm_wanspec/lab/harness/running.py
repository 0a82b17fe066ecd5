"""What every long measuring command needs around it: needs and outputs checked early, errors in one line, logs kept."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.console import Console

from vllm_wanspec.errors import ConfigError, UnsupportedError, WanspecError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import find_models

INTERRUPTED = 130
NO_PLOTS = "matplotlib is not installed, which --markdown draws its plots with: pip install 'vllm-wanspec[lab]'"
LOG_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the results go besides the console; None writes nothing, and keeps logs only after a failure."""

    json_path: Path | None = None
    markdown_path: Path | None = None
    log_dir: Path | None = None


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn whatever ends a command into one line and an exit status: 2 for what is wrong here, 1, or 130 for Ctrl-C.

    Args:
        command: Its name, which the line begins with.
    """

    def failed(message: str, status: int) -> typer.Exit:
        typer.echo(f"{command}: {message}", err=True)
        return typer.Exit(status)

    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        raise failed(str(error), 2) from None
    except WanspecError as error:
        raise failed(str(error), 1) from None
    except KeyboardInterrupt:
        raise failed("interrupted; everything is stopped", INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # a bug of ours, but the user still gets one line
        raise failed(f"unexpected {type(error).__name__}: {error}", 1) from error


@contextlib.contextmanager
def log_folder(given: Path | None, option: str, console: Console) -> Iterator[Path]:
    """Yield a folder for logs and statistics: the given one, or a temporary one that only a failure keeps.

    Args:
        given: What the user named.
        option: How, for the error message.
        console: Where to say which folder is kept.

    Raises:
        ConfigError: The given folder cannot be made.
    """
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{option}: cannot create {given}: {error.strerror}") from error
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="wanspec-"))
    try:
        yield folder
    except Exception as error:
        if not isinstance(error, WanspecError):
            (folder / "error.txt").write_text(traceback.format_exc(), "utf-8")
        console.print(f"the servers' logs are in {folder}", style="dim", highlight=False)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def check_outputs(outputs: Outputs) -> None:
    """Find out before a long run that its results could not be written.

    Raises:
        ConfigError: They could not.
    """
    for option, path in (("--json", outputs.json_path), ("--markdown", outputs.markdown_path)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ConfigError(f"{option}: cannot write {path}: it is a folder, or its folder does not exist")


def check_needs(*, instead_of_demo_models: str | None = None, plots: bool = False) -> None:
    """Check that vLLM, the demo models and the plots' library are there, as far as they are needed.

    Args:
        instead_of_demo_models: What to give where there is no checkout; None where the demo models are not needed.
        plots: Whether plots are to be drawn.

    Raises:
        UnsupportedError: Something is missing; one line names all of it, each with its remedy.
    """
    missing = [problem] if (problem := machine.missing_vllm()) else []
    if instead_of_demo_models is not None:
        try:
            find_models(None)
        except ConfigError:
            where = "a checkout has them in examples/demo_models"
            missing.append(f"the demo models are not here: give {instead_of_demo_models} ({where})")
    missing += [NO_PLOTS] if plots and find_spec("matplotlib") is None else []
    if missing:
        raise UnsupportedError("; ".join(missing))


def check_plots() -> None:
    """Check that plots can be drawn.

    Raises:
        UnsupportedError: They cannot.
    """
    if find_spec("matplotlib") is None:
        raise UnsupportedError(NO_PLOTS)


def console_of_this_run() -> Console:
    """Return the console: as wide as the terminal, or as the tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)


def write_output(option: str, path: Path, text: str) -> None:
    """Write a result, whole or not at all, making its folder if need be.

    Raises:
        WanspecError: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise WanspecError(f"{option}: cannot write {path}: {error.strerror}") from error
