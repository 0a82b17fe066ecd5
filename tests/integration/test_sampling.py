"""At temperature 1 the distribution is plain vLLM's, and this test would notice if it were not."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mrv2_env import mrv2_env
from scipy.stats import chi2_contingency

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels

from .fleet import ASYNC, MRV2, V1, Drafter, token_env
from .programs import Program
from .records import note

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

SAMPLES = 20_000
FAULTY_SAMPLES = 2_000
V2_SAMPLES = 400
"""Of Model Runner V2, whose kernels are interpreted: a hundred take three quarters of a minute."""
BIAS = {str(token): -2.0 for token in range(200, 400)}
PROMPTS = 4
LONGEST_PROMPT = 300
DECIDED_POSITIONS = (2, 4, 8)
POSITIONS = (1, *DECIDED_POSITIONS)
"""The first token is never drafted, but vLLM may pad the row that it comes from like a draft."""
PADDED_LENGTH = 97
"""Prompts of this length get padded: all but one token of them is in cached blocks."""
CLASSES = 50
LEAST_EXPECTED = 5.0
LEAST_P = 0.001
LEAST_DECIDED = 0.3
LEAST_DECIDED_ASYNC = 0.05
"""With async scheduling a step is laid out before the drafter can know what the one before it left the tree for: at
T = 1 most steps leave it, so that every other has no draft."""
LEAST_DRAFTS = 300
ARM_DEADLINE_S = 900.0
PLAIN_SEED, WANSPEC_SEED, FAULTY_SEED = 1_000_000, 2_000_000, 3_000_000


@dataclass(frozen=True)
class Arm:
    """What `sampling_arm.py` wrote."""

    continuations: list[list[list[int]]]
    decided: dict[str, int]
    accepted: int
    rejected: int

    @property
    def samples(self) -> int:
        return sum(map(len, self.continuations))


class Laboratory:
    """Runs arms against the shared drafter."""

    def __init__(self, models: DemoModels, drafter: Drafter, prompts: Sequence[Sequence[int]], folder: Path) -> None:
        self.models = models
        self.folder = folder
        self.prompts = folder / "prompts.json"
        self.prompts.write_text(json.dumps(prompts), "utf-8")
        self.config = folder / "waiting.yaml"
        endpoints = [{"name": "main", "url": drafter.url}]
        # These arms wait for drafts, and ask for no more than they verify: being in time is not what is tested here.
        config = {"draft_endpoints": endpoints, "late": {"policy": "fixed", "max_wait_ms": 500}}
        config["tree"] = {"lookahead_tokens": 4, "max_branches": 2}
        config["length"] = {"policy": "fixed", "shut_off": False}
        self.config.write_text(yaml.safe_dump(config), "utf-8")

    def run(self, name: str, samples: int, first_seed: int, *extra: str, env: Mapping[str, str] | None = None) -> Arm:
        core = machine.pin_cores()[0]
        out = self.folder / f"{name}.json"
        argv = [sys.executable, str(Path(__file__).with_name("sampling_arm.py")), "--model", str(self.models.target)]
        argv += ["--out", str(out), "--prompts", str(self.prompts), "--samples", str(samples)]
        argv += ["--first-seed", str(first_seed), "--engine", json.dumps(engine_arguments()), *extra]
        env = machine.server_env(core) | token_env() | dict(env or {})
        ended = Program(name, argv, env, self.folder, core).end(ARM_DEADLINE_S)
        assert ended.code == 0, f"{name} ended with {ended.code}: {ended.stderr[-1500:]}"
        arm = Arm(**json.loads(out.read_text("utf-8")))
        print(f"{name}: {arm.samples} samples in {ended.seconds:.0f} s, decided {arm.decided}", end=" ")
        print(f"accepted {arm.accepted}, rejected {arm.rejected}")
        return arm

    def run_wanspec(
        self, name: str, samples: int, first_seed: int, *extra: str, env: Mapping[str, str] | None = None
    ) -> Arm:
        return self.run(name, samples, first_seed, "--wanspec", str(self.config), *extra, env=env)


@pytest.fixture(scope="module")
def laboratory(
    models: DemoModels,
    pair: tuple[Drafter, object, object],
    prompts: list[tuple[int, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Laboratory:
    chosen = [prompt for prompt in prompts if PADDED_LENGTH <= len(prompt) <= LONGEST_PROMPT][:PROMPTS]
    chosen[0] = chosen[0][:PADDED_LENGTH]
    return Laboratory(models, pair[0], chosen, tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def plain_arm(laboratory: Laboratory) -> Arm:
    return laboratory.run("plain", SAMPLES, PLAIN_SEED)


def test_the_distribution_is_plain_vllms(laboratory: Laboratory, plain_arm: Arm) -> None:
    arm = laboratory.run_wanspec("wanspec", SAMPLES, WANSPEC_SEED)
    assert plain_arm.samples == arm.samples == SAMPLES
    check_like(plain_arm, arm, V1)


def check_like(expected: Arm, arm: Arm, runner: str) -> None:
    """Fail unless an arm's tokens are distributed as the expected ones, and drafts decided about many of them."""
    decided = {position: arm.decided[str(position)] / arm.samples for position in DECIDED_POSITIONS}
    least = LEAST_DECIDED_ASYNC if runner == ASYNC else LEAST_DECIDED
    for position, share in decided.items():
        assert share >= least, f"vacuous: only {share:.0%} decided against a draft at position {position}"
    assert min(arm.accepted, arm.rejected) >= LEAST_DRAFTS
    least_p = corrected_p(expected, arm)
    note(runner=runner, samples=arm.samples, least_p=least_p, decided=min(decided.values()))
    note(accepted=arm.accepted, rejected=arm.rejected)
    assert least_p > LEAST_P


@pytest.mark.parametrize("runner", [MRV2, ASYNC], indirect=True, scope="package")
def test_the_distribution_is_plain_vllms_on_model_runner_v2(
    laboratory: Laboratory, plain_arm: Arm, runner: str
) -> None:
    arm = laboratory.run_wanspec(f"wanspec-{runner}", V2_SAMPLES, WANSPEC_SEED, env=v2_env(runner))
    check_like(plain_arm, arm, runner)


def test_min_p_and_logit_bias_act_on_drafted_rows(laboratory: Laboratory) -> None:
    """Model Runner V2's verification applies them; vLLM's front door lets them through for us there."""
    asked: dict[str, object] = {"min_p": 0.15, "logit_bias": BIAS}
    plain = {
        name: laboratory.run(f"plain-{name}", FAULTY_SAMPLES, PLAIN_SEED, "--sampling", json.dumps(sampling))
        for name, sampling in [*((name, {name: value}) for name, value in asked.items()), ("both", asked)]
    }
    extra = ("--sampling", json.dumps(asked))
    arm = laboratory.run_wanspec("wanspec-both", V2_SAMPLES, WANSPEC_SEED, *extra, env=v2_env(ASYNC))
    check_like(plain["both"], arm, ASYNC)
    for name in asked:  # without the other it would be noticed
        assert corrected_p(plain[name], arm) < LEAST_P / 1000


def v2_env(runner: str) -> dict[str, str]:
    return mrv2_env(async_scheduling=runner == ASYNC)


def test_accepting_every_draft_would_be_noticed(laboratory: Laboratory, plain_arm: Arm) -> None:
    arm = laboratory.run_wanspec("accepting", FAULTY_SAMPLES, FAULTY_SEED, "--fault", "accept")
    assert arm.accepted > 0
    assert corrected_p(plain_arm, arm) < LEAST_P / 1000


def test_the_cpu_builds_fault_would_be_noticed(laboratory: Laboratory, plain_arm: Arm) -> None:
    if machine.has_gpu():
        pytest.skip("the fault is the CPU build's")
    arm = laboratory.run_wanspec("faulty", FAULTY_SAMPLES, FAULTY_SEED, "--fault", "expand")
    assert corrected_p(plain_arm, arm) < LEAST_P / 1000


def test_two_plain_arms_agree(laboratory: Laboratory, plain_arm: Arm) -> None:
    arm = laboratory.run("plain-again", FAULTY_SAMPLES, FAULTY_SEED)
    assert corrected_p(plain_arm, arm) > LEAST_P


def corrected_p(left: Arm, right: Arm) -> float:
    """The smallest p-value over prompts and positions, times their number (Bonferroni)."""
    values = []
    for prompt, (ours, theirs) in enumerate(zip(left.continuations, right.continuations, strict=True)):
        for position in POSITIONS:
            p = homogeneity_p([c[position - 1] for c in ours], [c[position - 1] for c in theirs])
            print(f"prompt {prompt} position {position}: p = {p:.3g}")
            values.append(p)
    return min(1.0, min(values) * len(values))


def homogeneity_p(left: Sequence[int], right: Sequence[int]) -> float:
    """P-value of the chi-square test that two samples of tokens come from one distribution."""
    ours, theirs = Counter(left), Counter(right)
    total = ours + theirs
    smaller = min(len(left), len(right)) / (len(left) + len(right))
    frequent = [token for token, count in total.most_common(CLASSES) if count * smaller >= LEAST_EXPECTED]
    table = [[counts[token] for token in frequent] for counts in (ours, theirs)]
    rest = [len(left) - sum(table[0]), len(right) - sum(table[1])]
    if sum(rest) * smaller >= LEAST_EXPECTED:
        table = [[*row, other] for row, other in zip(table, rest, strict=True)]
    elif sum(rest):
        table = [[*row[:-1], row[-1] + other] for row, other in zip(table, rest, strict=True)]
    if len(table[0]) < 2:
        return 1.0
    return float(chi2_contingency(table, correction=False).pvalue)


def engine_arguments() -> dict[str, object]:
    """The arguments of ``vllm.LLM`` that small machines need, as `machine.server_flags` has them for the server."""
    if machine.has_gpu():
        return {"gpu_memory_utilization": 0.2}
    return {"distributed_executor_backend": "uni", "block_size": 32}
