"""Pictures, where matplotlib is installed: one frame for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_wanspec.errors import WanspecError


def draw_panels(
    path: Path,
    draw: Callable[..., None],
    *,
    size: tuple[float, float],
    widths: tuple[float, ...],
    rows: int = 1,
    title: str = "",
) -> bool:
    """Draw panels into a PNG.

    Args:
        path: Its file.
        draw: Gets one axes object per panel.
        size: Inches.
        widths: Of the panels of a row, relative to each other.
        rows: Of so many panels each.
        title: Above all.

    Returns:
        Whether there is a picture; not without matplotlib.

    Raises:
        WanspecError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
    draw(*axes.flat)
    if title:
        figure.suptitle(title, fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise WanspecError(f"--markdown: cannot write {path}: {error.strerror}") from error
    return True
