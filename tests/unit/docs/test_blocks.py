"""Marked blocks: found, filled, and nothing beside them touched."""

from pathlib import Path

import pytest
from pages.blocks import UnknownBlock, blocks, filled, way, without_blocks

PAGE = "a\n\n<!-- figures: one -->old<!-- end -->\n\n- b <!-- figures: two words --><!-- end --> c\n"


def test_what_blocks_say_and_what_is_beside_them() -> None:
    assert blocks(PAGE) == {"one": "old", "two words": ""}
    assert without_blocks(PAGE) == "a\n\n\n\n- b  c\n"


def test_a_block_is_filled_in_its_line_or_over_several_and_links_fit_the_page() -> None:
    writers = {"one": lambda: "| x |\n[f](results:f.json)", "two words": lambda: "2 ms"}
    text = filled(PAGE, writers, "../results")
    assert text == (
        "a\n\n<!-- figures: one -->\n| x |\n[f](../results/f.json)\n<!-- end -->\n\n"
        "- b <!-- figures: two words -->2 ms<!-- end --> c\n"
    )
    assert filled(text, writers, "../results") == text


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<!-- figures: three --><!-- end -->", "nobody writes three"),
        ("<!-- figures: one -->", "1 blocks begin, 0 have"),
        ("<!-- figures: One --><!-- end -->", "1 blocks begin, 0 have"),
        ("<!-- figures: one --> <!-- figures: one --><!-- end -->", "2 blocks begin, 1 have"),
    ],
)
def test_a_block_that_nobody_can_fill(text: str, wrong: str) -> None:
    with pytest.raises(UnknownBlock, match=wrong):
        filled(text, {"one": lambda: "1"}, "results")


def test_the_way_from_a_page_to_the_results() -> None:
    folder = Path("/r/docs/results")
    assert way(Path("/r/README.md"), folder) == "docs/results"
    assert way(Path("/r/docs/a.md"), folder) == "results"
    assert way(Path("/r/docs/reference/a.md"), folder) == "../results"
