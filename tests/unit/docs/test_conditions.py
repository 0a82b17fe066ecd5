"""What blocks say of small result files of further conditions, whose figures can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages.conditions import ONE_STREAM
from pages.results import Results
from pages.writers import writers

from vllm_wanspec.lab.compare.studies import STUDIES

BLOCKS = {
    "more one stream": "base",
    "more streams": "streams",
    "more rates": "rates",
    "more scale": "scale5",
    "more useless": "useless",
}


def row(arm: str, rtt_ms: float | None = None, concurrency: int = 1, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "rtt_ms": rtt_ms, "concurrency": concurrency, "rate": None, "tpot_ms": 40.0, **more}


def remote(low: float, high: float, concurrency: int = 1, **more: Any) -> dict[str, Any]:
    """Remote drafting without lookup whose time per token ÷ the co-located model's lies in an interval."""
    ends = {"ratio_to_draft_model": (low + high) / 2, "ratio_ci": [low, high]}
    return row("wanspec_no_lookup", 30.0, concurrency, **ends, **more)


def study(folder: Path, name: str, *rows: dict[str, Any], **changes: Any) -> None:
    data: dict[str, Any] = {
        "rows": list(rows),
        "commit": "abcdef1",
        "machine": "A machine",
        "time_scale": 1.25,
        "options": {"count": 24, "repeats": 1, "max_tokens": 128, "slo_ms": [500.0, 100.0]},
    }
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more" / f"{name}.json").write_text(json.dumps(data | changes), encoding="utf-8")


def block(folder: Path, name: str) -> str:
    return writers(Results(folder))[name]()


@pytest.mark.parametrize(("name", "file"), BLOCKS.items())
def test_what_has_no_file_has_not_been_measured(tmp_path: Path, name: str, file: str) -> None:
    assert block(tmp_path, name) == (
        f"This has not been measured yet: `make bench-more` writes `docs/results/more/{file}.json`."
    )


def test_every_study_has_its_place() -> None:
    assert {*ONE_STREAM, *BLOCKS.values()} == STUDIES.keys()


def test_one_thing_changed_is_held_against_nothing_changed(tmp_path: Path) -> None:
    study(
        tmp_path, "base", remote(0.5, 0.7), row("wanspec", 30.0, ratio_to_draft_model_lookup=1.0, lookup_ci=[0.9, 1.1])
    )
    study(
        tmp_path, "t10", remote(0.8, 0.9), row("wanspec", 30.0, ratio_to_draft_model_lookup=1.2, lookup_ci=[1.05, 1.3])
    )
    study(tmp_path, "loss", remote(1.1, 1.3))
    text = block(tmp_path, "more one stream")
    assert "| Sampling at T = 1 | 40.00 | 0.850 (0.800–0.900) | 40.00 | 1.200 (1.050–1.300) |" in text
    assert f"| {STUDIES['jitter'].title} | not measured | not measured | not measured | not measured |" in text
    told = [line for line in text.splitlines() if line.startswith("- ")]
    assert told == [
        "- One stream, nothing changed: remote drafting is faster than co-located drafting without lookup on either "
        "side and indistinguishable from it with our lookup on both sides.",
        "- Sampling at T = 1: remote drafting is faster than co-located drafting without lookup on either side and "
        "slower than it with our lookup on both sides. The ratios are higher than and indistinguishable from those "
        "with nothing changed, in this order.",
        "- One segment in a hundred lost: remote drafting is slower than co-located drafting without lookup on either "
        "side and not measured against it with our lookup on both sides. The ratio is higher than that with nothing "
        "changed.",
    ]
    assert text.endswith(
        "24 prompts once, time scale 1.25; A machine; all else as above. Source: "
        "[more/base.json](results:more/base.json), commit abcdef1; [more/t10.json](results:more/t10.json), commit "
        "abcdef1; [more/loss.json](results:more/loss.json), commit abcdef1."
    )


def test_the_whole_page_and_its_picture_are_named_once_they_are_there(tmp_path: Path) -> None:
    study(tmp_path, "base", remote(0.5, 0.7))
    (tmp_path / "more.md").touch()
    assert block(tmp_path, "more one stream").endswith("\n\nWhole tables: [more.md](results:more.md).")
    (tmp_path / "more.png").touch()
    assert block(tmp_path, "more one stream").endswith("against the ideal](results:more.png)")


def test_a_study_that_does_not_count_says_so(tmp_path: Path) -> None:
    study(tmp_path, "base", remote(0.5, 0.7))
    study(tmp_path, "loss", remote(0.5, 0.7), valid=False)
    study(tmp_path, "cut8", remote(0.5, 0.7), complete=False)
    assert "**This run is incomplete or invalid.** (loss and cut8)" in block(tmp_path, "more one stream")


def test_streams(tmp_path: Path) -> None:
    speeds = {1: (41.0, 38.0), 2: (70.0, 70.04), 16: (250.0, 300.0)}
    ends = {1: (0.8, 0.9), 2: (0.9, 1.1), 16: (1.2, 1.3)}
    rows = [remote(*ends[load], load, throughput_tok_s=speeds[load][0]) for load in speeds]
    rows += [row("draft_model", None, load, throughput_tok_s=speeds[load][1]) for load in speeds]
    study(tmp_path, "streams", row("none", throughput_tok_s=20.5), *rows)
    text = block(tmp_path, "more streams")
    assert "| 1 | 20.5 | 38.0 | 41.0 | 0.850 (0.800–0.900) | not measured | not measured | not measured |" in text
    assert (
        "- Without lookup on either side a token of remote drafting is, beside a co-located one, faster with 1 stream; "
        "indistinguishable with 2 streams; slower with 16 streams. Tokens per second, which have no interval, are "
        "higher with 1 stream; equal with 2 streams; lower with 16 streams." in text
    )
    assert "beside a co-located one, not measured with 1, 2 and 16 streams." in text


def test_goodput_at_rates(tmp_path: Path) -> None:
    goods = {
        ("wanspec", 1.0): 0.9,
        ("draft_model_lookup", 1.0): 0.9,
        ("wanspec", 3.0): 1.5,
        ("draft_model_lookup", 3.0): 2.0,
    }
    rows = [
        row(arm, 30.0 if arm == "wanspec" else None, 0) | {"rate": rate, "goodput": good}
        for (arm, rate), good in goods.items()
    ]
    study(tmp_path, "rates", *rows)
    text = block(tmp_path, "more rates")
    assert "| 3 | not measured | not measured | 2.00 | 1.50 |" in text
    assert (
        "- With our lookup on both sides the goodput of remote drafting is, beside that of co-located drafting, equal "
        "at 1 request per second and lower at 3 requests per second." in text
    )
    assert "first token came within 625 ms and 95 % of the others within 125 ms" in text  # 1.25 times the limits


def test_long_paces(tmp_path: Path) -> None:
    near = remote(0.5, 0.6, ratio_to_ideal=1.1, ideal_ci=[1.05, 1.15], ideal_tpot_ms=36.4) | {"rtt_ms": 0.0}
    here = remote(0.9, 1.1, ratio_to_ideal=1.2, ideal_ci=[1.15, 1.25])
    study(tmp_path, "scale5", near, here, time_scale=5.0)
    text = block(tmp_path, "more scale")
    assert "| 0 | 40.0 | 0.550 (0.500–0.600) | 36.4 | 1.100 (1.050–1.150) | not measured |" in text
    assert "faster at R = 0 ms and indistinguishable at R = 30 ms." in text
    assert "of the other conditions" not in text
    assert "(R = 30 ms took 150 ms)" in text
    study(tmp_path, "base", remote(0.8, 0.9, ratio_to_ideal=1.5, ideal_ci=[1.4, 1.6]))
    assert (
        "- At R = 30 ms it takes 1.20 times the ideal's, lower than the 1.50 times at the time scale of the other "
        "conditions." in block(tmp_path, "more scale")
    )


def test_useless_drafters(tmp_path: Path) -> None:
    rows = [
        row("wanspec_dead", None, streams, ratio_to_none=1.01, none_ci=ends)
        for streams, ends in ((1, [0.99, 1.02]), (8, [1.005, 1.02]))
    ]
    study(tmp_path, "useless", row("none"), *rows)
    text = block(tmp_path, "more useless")
    assert "| remote, nobody answers | 8 | 40.00 | 1.010 (1.005–1.020) |" in text
    assert (
        "- Remote, nobody answers: beside plain vLLM a token is indistinguishable with 1 stream and slower with 8 "
        "streams." in text
    )
