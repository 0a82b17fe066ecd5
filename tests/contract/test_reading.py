"""What is read of a source file, from where, and what is said of two of them."""

import io
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import read_seams
from seams.contract import ContractError, Need, differences, read_contract
from seams.fixtures import changes, dump, load, read_source
from seams.reading import MEMBERS, READS, STEPS, TEXTS, Wanted, read_module
from seams.sources import Source, SourceError, installed, open_source

TEXT = '''
from typing import TYPE_CHECKING, overload
import numpy as np
from .there import helper as helped

if TYPE_CHECKING:
    from .types import Kind
GROUP: str = "a.group"
try:
    import torch
except ImportError:
    torch = None
else:
    FAST = True

class Base: ...

@kept(slots=True)
class Runner(Base, metaclass=type):
    """A runner."""
    limit: int = 3
    rows: list[int]
    KIND = "x"
    def __init__(self, config, *, device=None):
        self.config, self.device = config, device
        if config:
            self.part: Part = Part(config)
        self.part.inner = 1
        local = 1
    @property
    def size(self): return 1
    @size.setter
    def size(self, value): ...
    @overload
    def run(self, a: int) -> int: ...
    @overload
    def run(self, a: str) -> str: ...
    def run(self, a, /, b=(1, 2), *rest, c, d=None, **more):
        logger.info("begins")
        for row in self.rows_of(first(a)):
            self.part.ask(row)
            self.part.ask(row)
        with self.lock:
            drafts = self.part.propose(len(a))
            self.states.drafts[a.rows][0] = drafts
            self.states.count += other(GROUP)
            done = a + b
        return getattr(self.part, "more", None)

async def serve(a, *, b): ...
'''
WANTED = Wanted(
    {"GROUP", "Kind", "helped"},
    {"Runner": {MEMBERS, "self.part"}, "Base": set(), "Absent": {MEMBERS}},
    {"Runner.run": {STEPS, READS, TEXTS}, "serve": set(), "Runner.absent": set(), "absent": {STEPS}},
)


def test_what_is_read_of_a_module() -> None:
    read = read_module(TEXT, WANTED)
    assert read["names"] == ["Base", "FAST", "GROUP", "Kind", "Runner", "helped", "serve", "torch"]
    assert read["values"] == {"GROUP": "a.group"}
    assert read["classes"] == {
        "Base": {"methods": []},
        "Runner": {
            "methods": ["__init__", "run", "size"],
            "decorators": ["kept(slots=True)"],
            "bases": ["Base"],
            "fields": ["limit=3", "rows", "KIND='x'"],
            "attributes": ["config", "device", "part"],
            "asks": {"self.part": ["ask", "propose"]},
        },
    }
    assert sorted(read["functions"]) == ["Runner.run", "serve"]
    assert read["functions"]["serve"] == {"parameters": ["a", "*", "b"]}
    run = read["functions"]["Runner.run"]
    assert run["parameters"] == ["self", "a", "b=(1, 2)", "*rest", "c", "d=None", "**more"]
    assert run["steps"] == [
        "first",
        "self.rows_of",
        "self.part.ask",
        "self.part.propose",
        "drafts = self.part.propose",
        "self.states.drafts[][] = drafts",
        "other",
        "self.states.count = other",
    ]
    assert {"self.part.ask", "self.part", "a.rows", "GROUP", "self.lock", "drafts"} <= {*run["reads"]}
    assert not {"done", "self.states.count", "row.more"} & {*run["reads"]}
    assert run["texts"] == ["begins", "more"]


def package(folder: Path, name: str = "runner", version: str | None = "0.41.0") -> Path:
    (folder / "vllm" / "inner").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("")
    (folder / "vllm" / "inner" / "__init__.py").write_text(f"class {name.title()}: ...\n")
    (folder / "vllm" / f"{name}.py").write_text(TEXT)
    if version is not None:
        (folder / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    return folder


def wheel(folder: Path, files: Path) -> Path:
    path = folder / "vllm-0.41.0-cp38-abi3-manylinux1_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in files.rglob("*.py"):
            archive.write(file, file.relative_to(files))
        archive.writestr("vllm/_C.abi3.so", b"\x00\xff")
    return path


def sdist(folder: Path, files: Path) -> Path:
    path = folder / "vllm-0.41.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file in files.rglob("*.py"):
            archive.add(file, Path("vllm-0.41.0") / file.relative_to(files))
        binary = tarfile.TarInfo("vllm-0.41.0/vllm/weights.bin")
        binary.size = 2
        archive.addfile(binary, io.BytesIO(b"\x00\xff"))
    return path


@pytest.mark.parametrize("version", ["0.41.0", None])
def test_folder_wheel_and_source_distribution_read_alike(tmp_path: Path, version: str | None) -> None:
    files = package(tmp_path / "files", version=version)
    sources = [open_source(wheel(tmp_path, files)), open_source(sdist(tmp_path, files))]
    sources += [open_source(files), open_source(files / "vllm")] if version else []
    for source in sources:
        assert source.version == "0.41.0"
        assert source.module("vllm.runner") == TEXT
        assert source.module("vllm.inner") == "class Runner: ...\n"
        assert source.module("vllm.absent") is None


def test_a_build_s_own_part_of_the_version_is_left_out(tmp_path: Path) -> None:
    assert open_source(package(tmp_path, version="0.41.0+cu130")).version == "0.41.0"


@pytest.mark.parametrize("what", ["absent", "empty", "vllm.whl", "vllm-1.0.tar.gz", "notes.txt", "nameless"])
def test_what_is_no_vllm_is_said_in_one_line(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "nameless":
        package(path, version=None)
    elif what != "absent":
        path.write_text("not what its name says")
    with pytest.raises(SourceError):
        open_source(path)
    assert read_seams.main([str(path), "--out", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"read_seams: {path}: ") and said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def need(**values: object) -> Need:
    return Need(module="vllm.runner", by="us, called", why="it runs", **values)  # type: ignore[arg-type]


def source() -> Source:
    return Source("0.41.0", {"vllm/runner.py": TEXT}.get)


def lacking(*needs: Need) -> list[str]:
    return differences(needs, "0.41.0", read_source(source(), needs)["modules"])


def test_a_contract_that_holds() -> None:
    assert (
        lacking(
            need(name="helped"),
            need(name="GROUP", value="a.group"),
            need(name="Base", open=True),
            need(name="Runner", has=("limit=3", "rows", "size", "part", "run"), bases=("Base",)),
            need(name="Runner", asks="self.part", only=("ask", "propose", "more")),
            need(name="Runner.run", says=("more", "begins")),
            need(name="Runner.run", begins=("self", "a", "b"), takes=("c", "d=None"), called=True),
            need(name="Runner.run", order=("first", "self.part.propose", "other"), reads=("self.part", "self.lock")),
            need(name="serve", begins=("a",), takes=("b",), called=True),
        )
        == []
    )


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (need(name="Bass"), "needed:   Bass\n  there is: no such name; nearest: Base"),
        (need(name="Kind", has=("x",)), "needed:   class Kind\n  there is: a name that is not bound by a class stat"),
        (need(name="torch", called=True), "needed:   function torch\n  there is: a name that is not bound by a def st"),
        (need(name="Runer.run"), "needed:   class Runer\n  there is: no such class; nearest: Runner"),
        (need(name="Runner", has=("limit=4",)), "needed:   Runner.limit=4\n  there is: nearest: limit=3"),
        (need(name="Runner.run", begins=("self", "b")), "begin with (self, b)\n  there is: (self, a, b=(1, 2), *rest"),
        (need(name="Runner.run", begins=("self", "a", "b=3")), "begin with (self, a, b=3)"),
        (need(name="Runner.run", takes=("d=1",)), "needed:   parameters d=1"),
        (need(name="Runner.run", begins=("self", "a"), called=True), "no argument beside self, a\n  there is: (self, "),
        (need(name="serve", begins=("a", "b", "c")), "parameters that begin with (a, b, c)\n  there is: (a, *, b)"),
        (need(name="Runner.run", order=("other", "first")), "in this order: other, first\n  there is: first, other"),
        (need(name="Runner.run", reads=("self.par",)), "it reads self.par\n  there is: nearest: self.part"),
        (need(name="Runner.run", says=("begin",)), "it says 'begin'\n  there is: nearest: begins"),
        (need(name="Runner", open=True), "instances that take further attributes\n  there is: kept(slots=True)"),
    ],
)
def test_what_is_missing_is_said(entry: Need, told: str) -> None:
    (said,) = lacking(entry)
    assert said.startswith(f"vLLM 0.41.0: vllm.runner.{entry.name}\n  for us, called: it runs\n  needed:   ")
    assert told in said


def test_an_entry_may_be_of_some_versions() -> None:
    assert not lacking(need(name="absent", versions=("0.4", "0.40")))
    assert lacking(need(name="absent", versions=("0.41",)))
    assert not lacking(need(name="absent", versions=("0.40",), gone=("0.41",)))
    (said,) = lacking(need(name="Base", versions=("0.40",), gone=("0.41",)))
    assert "there is: it is there: what was built for its sake can go" in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- name: f", "expected modules"),
        ("m:\n- {name: f, by: us}", "m.f: .*'why'"),
        ("m:\n- {name: f, by: us, why: it is, begin: [a]}", "m.f: .*'begin'"),
        ("m:\n- {name: f, by: us, why: it is, begins: self}", "a text where a list belongs"),
        ("m:\n- {name: f, by: us, why: a}\n- {name: f, by: us, why: b}", "m.f: two entries for us"),
        (None, "no contract in it"),
    ],
)
def test_a_contract_that_cannot_be_read(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ContractError, match=problem):
        read_contract(tmp_path)


def test_changes_between_versions() -> None:
    needs = [need(name="Runner", has=("rows",)), need(name="serve", begins=("a",))]
    before = read_source(source(), needs)["modules"]
    other = TEXT.replace("rows: list[int]", "lines: list[int]").replace("serve(a, *", "serve(b, a, *")
    after = read_source(Source("0.42.0", {"vllm/runner.py": other}.get), needs)["modules"]
    assert [*changes(before, before)] == []
    assert [*changes(before, after)] == [
        "vllm.runner: classes: Runner: fields: gone rows; new lines",
        "vllm.runner: functions: serve: parameters: another order",
    ]
    assert [*changes(before, {})] == ["vllm.runner: gone"]


def test_a_file_holds_what_was_read(tmp_path: Path) -> None:
    record = read_source(source(), [need(name="Runner.run", order=("other",), reads=("self.part",))])
    path = tmp_path / "vllm-0.41.0.json"
    path.write_text(dump(record))
    assert load(path) == record
    assert max(map(len, path.read_text().splitlines())) <= 120


@pytest.mark.vllm
def test_the_command_writes_the_installed_version_s_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, (folder,) = tmp_path / "here.json", find_spec("vllm").submodule_search_locations  # type: ignore[union-attr]
    assert read_seams.main([folder, "--out", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.endswith(" entries, 0 differences\n") and told.startswith(f"{path}: ")
    assert load(path) == read_source(installed(), read_contract(read_seams.CONTRACT))
    assert read_seams.main([folder, "--out", str(path), "--against", str(path)]) == 0
    assert capsys.readouterr().out == told
