"""vLLM's source, as installed and as read of other versions, has what this project needs of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seams.contract import Need, differences, read_contract
from seams.fixtures import changes, digest, load, read_source
from seams.sources import installed

HERE = Path(__file__).parent
NEEDS = read_contract(HERE)
VERSIONS = {path.stem.removeprefix("vllm-"): load(path) for path in sorted(HERE.glob("vllm-*.json"))}
MODULES = sorted({need.module for need in NEEDS})
RUNNER = "vllm.v1.worker.gpu.model_runner"
ANEW = "made for another contract: make it anew (scripts/read_seams.py, `make compat-source`)"
Change = Callable[[dict[str, Any]], None]


def check(needs: list[Need], version: str, modules: dict[str, Any]) -> None:
    lacking = differences(needs, version, modules)
    if lacking:
        pytest.fail("\n\n".join([*lacking, f"{len(lacking)} differences"]), pytrace=False)


def test_the_versions_that_are_read() -> None:
    assert {"0.32.0", "0.33.0"} <= {*VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_s_file_is_of_this_contract(version: str) -> None:
    assert VERSIONS[version]["vllm"] == version
    assert VERSIONS[version]["asked"] == digest(NEEDS), ANEW


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("module", MODULES)
def test_a_version_has_what_is_needed(module: str, version: str) -> None:
    check([need for need in NEEDS if need.module == module], version, VERSIONS[version]["modules"])


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return read_source(installed(), NEEDS)


@pytest.mark.vllm
def test_the_installed_vllm_has_what_is_needed(here: dict[str, Any]) -> None:
    check(NEEDS, here["vllm"], here["modules"])


@pytest.mark.vllm
def test_the_installed_vllm_is_as_its_version_s_file_says(here: dict[str, Any]) -> None:
    if here["vllm"] not in VERSIONS:
        pytest.skip(f"no file of vLLM {here['vllm']}; it is held to the contract all the same")
    assert not [*changes(VERSIONS[here["vllm"]], here)], "a build with other sources, or a file that was edited"


# What a change of vLLM would look like: each of these, in a copy of what was read, must be told.


def class_of(modules: dict[str, Any], name: str = "GPUModelRunner", module: str = RUNNER) -> dict[str, Any]:
    found: dict[str, Any] = modules[module]["classes"][name]
    return found


def function(modules: dict[str, Any], name: str, module: str = RUNNER) -> dict[str, Any]:
    found: dict[str, Any] = modules[module]["functions"][name]
    return found


def rename_a_method(modules: dict[str, Any]) -> None:
    methods = class_of(modules)["methods"]
    methods[methods.index("prepare_inputs")] = "prepare_batch_inputs"
    functions = modules[RUNNER]["functions"]
    functions["GPUModelRunner.prepare_batch_inputs"] = functions.pop("GPUModelRunner.prepare_inputs")


def put_a_parameter_in_front(modules: dict[str, Any]) -> None:
    function(modules, "GPUModelRunner.add_requests")["parameters"].insert(1, "streams")


def swap_two_steps(modules: dict[str, Any]) -> None:
    steps = function(modules, "GPUModelRunner.execute_model")["steps"]
    first, second = steps.index("self.add_requests"), steps.index("self.prepare_inputs")
    steps[first], steps[second] = steps[second], steps[first]


def write_drafts_elsewhere(modules: dict[str, Any]) -> None:
    steps = function(modules, "GPUModelRunner.sample_tokens")["steps"]
    steps[steps.index("self.req_states.draft_tokens[] = draft_tokens")] = "self.drafts.gpu[] = draft_tokens"


def drop_an_import(modules: dict[str, Any]) -> None:
    modules[RUNNER]["names"].remove("init_speculator")


def ask_more_of_the_speculator(modules: dict[str, Any]) -> None:
    class_of(modules)["asks"]["self.speculator"].append("on_step_end")


def drop_a_field(modules: dict[str, Any]) -> None:
    fields = class_of(modules, "SchedulerOutput", "vllm.v1.core.sched.output")["fields"]
    fields.remove("num_spec_tokens_to_schedule=0")
    fields.append("num_draft_tokens_to_schedule=0")


def drop_an_attribute(modules: dict[str, Any]) -> None:
    class_of(modules, "RequestState", "vllm.v1.worker.gpu.states")["attributes"].remove("last_sampled_tokens")


def want_one_argument_more(modules: dict[str, Any]) -> None:
    function(modules, "Request.__init__", "vllm.v1.request")["parameters"].insert(6, "arrival_time")


def change_a_default(modules: dict[str, Any]) -> None:
    parameters = function(modules, "BaseSpeculator.propose", f"{RUNNER[:-13]}.spec_decode.speculator")["parameters"]
    parameters[parameters.index("dummy_run=False")] = "dummy_run=True"


def rename_a_plugin_group(modules: dict[str, Any]) -> None:
    modules["vllm.plugins"]["values"]["DEFAULT_PLUGINS_GROUP"] = "vllm.plugins"


def derive_from_something_else(modules: dict[str, Any]) -> None:
    class_of(modules, "CPUWorker", "vllm.v1.worker.cpu_worker")["bases"] = ["WorkerBase"]


def read_something_else(modules: dict[str, Any]) -> None:
    reads = function(modules, "GPUModelRunner.prepare_inputs")["reads"]
    reads[reads.index("self.req_states.draft_tokens")] = "self.req_states.drafts"


def close_a_class(modules: dict[str, Any]) -> None:
    class_of(modules, "ModelRunnerOutput", "vllm.v1.outputs")["decorators"] = ["dataclass(slots=True)"]


def say_something_else(modules: dict[str, Any]) -> None:
    name = "VllmConfig._get_v2_model_runner_unsupported_features"
    function(modules, name, "vllm.config.vllm")["texts"].remove("custom_class")


def drop_a_module(modules: dict[str, Any]) -> None:
    del modules["vllm.v1.worker.gpu.async_utils"]


CHANGES = [
    (rename_a_method, "prepare_inputs", "method prepare_inputs", "nearest: prepare_batch_inputs"),
    (
        put_a_parameter_in_front,
        "add_requests",
        "parameters that begin with (self, scheduler_output)",
        "(self, streams, scheduler_output)",
    ),
    (
        swap_two_steps,
        "execute_model",
        "in this order: self.finish_requests, self.add_requests, self.update_requests, self.prepare_inputs",
        "self.finish_requests, self.prepare_inputs, self.update_requests, self.add_requests",
    ),
    (
        write_drafts_elsewhere,
        "sample_tokens",
        "it does self.req_states.draft_tokens[] = draft_tokens",
        "self.drafts.gpu[] = draft_tokens",
    ),
    (drop_an_import, "init_speculator", "init_speculator", "no such name"),
    (ask_more_of_the_speculator, "GPUModelRunner", "nothing asked of self.speculator but", "on_step_end too"),
    (
        drop_a_field,
        "SchedulerOutput",
        "SchedulerOutput.num_spec_tokens_to_schedule=0",
        "nearest: num_draft_tokens_to_schedule=0",
    ),
    (drop_an_attribute, "RequestState", "RequestState.last_sampled_tokens", "nearest: "),
    (want_one_argument_more, "Request.__init__", "no argument beside self, request_id, ", "arrival_time too"),
    (change_a_default, "propose", "parameters dummy_run=False", "dummy_run=True"),
    (rename_a_plugin_group, "DEFAULT_PLUGINS_GROUP", "the value 'vllm.general_plugins'", "'vllm.plugins'"),
    (derive_from_something_else, "CPUWorker", "derived from Worker", "derived from WorkerBase"),
    (read_something_else, "prepare_inputs", "it reads self.req_states.draft_tokens", "self.req_states.drafts"),
    (
        close_a_class,
        "ModelRunnerOutput",
        "instances that take further attributes",
        "dataclass(slots=True)",
    ),
    (
        say_something_else,
        "_get_v2_model_runner_unsupported_features",
        "it says 'custom_class'",
        "nothing that resembles",
    ),
    (drop_a_module, "AsyncOutput", "the module", "no such module"),
]
"""What changes, which entry tells of it, what that says is needed, and what is there."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("change", "seam", "needed", "there"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES]
)
def test_a_change_is_told(change: Change, seam: str, needed: str, there: str, version: str) -> None:
    modules = copy.deepcopy(VERSIONS[version]["modules"])
    change(modules)
    told = [text.splitlines() for text in differences(NEEDS, version, modules)]
    found = [lines for lines in told if lines[0].endswith(f".{seam}") and lines[2].startswith(f"  needed:   {needed}")]
    assert found, told
    assert there in found[0][3]
    assert found[0][1].startswith("  for ")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_entry_can_fail(version: str) -> None:
    """By its name: without it each says so, and by itself."""
    for need in NEEDS:
        if not need.concerns(version):
            continue
        modules = copy.deepcopy({need.module: VERSIONS[version]["modules"][need.module]})
        owner, _, name = need.name.rpartition(".")
        (class_of(modules, owner, need.module)["methods"] if owner else modules[need.module]["names"]).remove(name)
        assert len(differences([need], version, modules)) == 1, need.seam
