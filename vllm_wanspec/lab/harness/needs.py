"""What a measuring command needs that the base install does not bring: all that is missing, said before it starts."""

from __future__ import annotations

from importlib.util import find_spec

from vllm_wanspec.errors import ConfigError, UnsupportedError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import find_models


def check_needs(*, instead_of_demo_models: str | None, plots: bool = False) -> None:
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
    if plots and find_spec("matplotlib") is None:
        missing.append(
            "matplotlib is not installed, which --markdown draws its plots with: pip install 'vllm-wanspec[lab]'"
        )
    if missing:
        raise UnsupportedError("; ".join(missing))
