"""Which function writes the block of which name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pages import comparison, conditions, costs, explained, serving
from pages.results import Results


def writers(results: Results) -> dict[str, Callable[[], str]]:
    """Return what writes the block of each name."""
    makers = {
        "five rows": comparison.five_rows,
        "crossover": comparison.crossover,
        "useless drafter": comparison.useless_drafter,
        "overhead step": costs.overhead_step,
        "tree bytes": costs.tree_bytes,
        "bench main": comparison.bench_main,
        "bench streams": comparison.bench_streams,
        "bench sources": comparison.bench_sources,
        "bench ideal": explained.bench_ideal,
        "bench kinds": comparison.kinds,
        "attribution": explained.attribution,
        "more one stream": conditions.one_stream,
        "more streams": conditions.streams,
        "more rates": conditions.rates,
        "more scale": conditions.scale,
        "more useless": conditions.useless,
        "capacity": serving.capacity,
        "dtype": serving.dtype,
        "sizing": comparison.sizing,
        "sizing trees": costs.sizing_trees,
        "trees": costs.trees,
        "trees caught": costs.trees_caught,
        "below one nat": costs.below_one_nat,
        "overhead": costs.overhead,
        "width": costs.width,
        "hotpath": costs.hotpath,
    }
    return {name: partial(make, results) for name, make in makers.items()}
