"""Section 4: what the pages and the results say, against the numbers that lie beside them."""

import re

import pytest
from finding import finding
from readme import figures, page, readme, words


def line_of(arm: str) -> str:
    """What bench.md says that an arm is."""
    [line] = [line for line in words("bench").splitlines() if line.startswith(f"- `{arm}`: ")]
    return line


def test_the_demo_s_figures_name_their_commit() -> None:
    commit = figures("demo").get("commit") or ""
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit)
    assert all(commit.startswith(said) for said in re.findall(r"demo\.json\), commit ([0-9a-f]+)", readme()))


DIRTY = finding("4", "stamped dirty: taken before the commit was asked for at the beginning")


@pytest.mark.parametrize(
    "name", ["bench", "trees", *(pytest.param(name, marks=DIRTY) for name in ("overhead", "width"))]
)
def test_a_result_is_of_a_commit_and_of_nothing_else(name: str) -> None:
    stamps = [*re.findall(r"commit ([0-9a-f]{7,40}[a-z-]*)", words(name)), figures(name)["commit"]]
    assert len(set(stamps)) == 1, stamps
    assert not stamps[0].endswith("-dirty")


def test_the_bench_says_that_remote_drafting_has_lookup_too() -> None:
    assert "lookup" in line_of("wanspec")


def test_the_bench_says_which_arms_have_async_scheduling() -> None:
    assert "async" in line_of("none")
    assert "async" in line_of("draft_model")


def test_the_overhead_in_readme_is_the_measured_one() -> None:
    rows = {row["case"]: row for row in figures("overhead")["rows"]}
    silent, dead = rows["silent drafter"], rows["dead drafter"]
    said = re.search(r"costs ([\d.]+) % of a ([\d.]+) ms step, a dead one ([−-]?[\d.]+) %", readme())
    assert said is not None
    useless, step_ms, unreachable = (float(number.replace("−", "-")) for number in said.groups())
    assert useless == pytest.approx(100 * (silent["ratio"] - 1), abs=0.5)
    assert step_ms == pytest.approx(silent["base"], abs=0.1)
    assert unreachable == pytest.approx(100 * (dead["ratio"] - 1), abs=0.5)


def test_the_round_trip_in_target_steps() -> None:
    pacing = figures("demo")["pacing"]
    steps = 100.0 / (pacing["target_ms"] + pacing["target_ms_per_token"])
    [said] = re.findall(r"R = 100 ms is ([\d.]+) target steps", readme())
    assert float(said) == pytest.approx(steps, abs=0.01)
    assert "two and a half" not in readme()


def test_what_branches_below_one_nat_catch() -> None:
    arms = {arm["name"]: arm["counters"]["positions"] for arm in figures("trees")["arms"]}
    below = [arms["theta-0"][span] for span in ("0-0.25", "0.25-0.5", "0.5-1")]
    caught = sum(span["branch"] for span in below)
    missed = sum(span["branch"] + span["leaf"] + span["outside"] for span in below)
    for text in (page("docs/research.md"), page("docs/performance.md")):
        [said] = re.findall(r"θ = 0\), they caught (\d+) % of these", text)
        assert float(said) == pytest.approx(100 * caught / missed, abs=0.5), f"{caught:.0f} of {missed:.0f} caught"
    assert "catch nothing" not in readme()


@pytest.mark.parametrize("name", ["trees", "exactness"])
def test_results_say_whether_lookup_was_on(name: str) -> None:
    assert re.search(r"lookup|fallback", words(name))
