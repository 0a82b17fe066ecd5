"""``scripts/read_seams.py PATH_OR_WHEEL [--out FILE] [--against FILE]``: what a vLLM has at this project's seams.

Writes the file by which `tests/contract` holds a version to the contract that is not installed, and says what that
version lacks, and what is another than in the file of another version. Nothing of vLLM is imported.

Exit status: 0; 1 where the contract does not hold; 2 where there is no vLLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from seams.contract import differences, read_contract
from seams.fixtures import changes, dump, load, read_source
from seams.sources import SourceError, open_source

CONTRACT = Path(__file__).parents[1] / "tests" / "contract"


def main(arguments: list[str]) -> int:
    """Read, write and compare."""
    parser = argparse.ArgumentParser(prog="read_seams.py", description="Read what a vLLM has at our seams.")
    parser.add_argument("path", type=Path, help="folder with the package vllm, wheel, or source distribution")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: tests/contract/vllm-VERSION.json")
    parser.add_argument("--against", type=Path, metavar="FILE", help="tell what differs from this version's file")
    options = parser.parse_args(arguments)
    needs = read_contract(CONTRACT)
    try:
        source = open_source(options.path)
    except (SourceError, OSError) as error:
        sys.stderr.write(f"read_seams: {error}\n")
        return 2
    record = read_source(source, needs)
    path = options.out or CONTRACT / f"vllm-{source.version}.json"
    path.write_text(dump(record), "utf-8")
    if options.against is not None:
        for line in changes(load(options.against)["modules"], record["modules"]):
            sys.stdout.write(f"{line}\n")
    lacking = differences(needs, source.version, record["modules"])
    sys.stdout.write("".join(f"{one}\n\n" for one in lacking))
    sys.stdout.write(f"{path}: {len(record['modules'])} modules; {len(needs)} entries, {len(lacking)} differences\n")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
