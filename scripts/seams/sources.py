"""Where vLLM's source files are read from: an installed package, a checkout, a wheel or a source distribution."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "vllm"
VERSION = re.compile(r"^__version__ = version = ['\"]([^'\"]+)['\"]", re.MULTILINE)
SDIST_ENDING = ".tar.gz"


class SourceError(Exception):
    """What was named holds no vLLM; one line."""


@dataclass(frozen=True)
class Source:
    """vLLM's source files.

    Attributes:
        version: vLLM's version, without a local part: builds for other devices have the same Python files.
        read: Returns a file's text by its path in the distribution, such as ``vllm/outputs.py``; None where there is
            none.
    """

    version: str
    read: Callable[[str], str | None]

    def module(self, name: str) -> str | None:
        """Return a module's text; None where there is no such module."""
        path = name.replace(".", "/")
        text = self.read(f"{path}.py")
        return self.read(f"{path}/__init__.py") if text is None else text


def installed() -> Source:
    """Return the source of the vLLM that this Python would import; nothing of it is imported.

    Raises:
        SourceError: There is none.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SourceError("vLLM is not installed")
    return open_source(Path(spec.origin).parent)


def open_source(path: Path) -> Source:
    """Return the source at a path.

    Args:
        path: A folder that is, or has in it, the package ``vllm``; a wheel; or a source distribution.

    Raises:
        SourceError: There is no vLLM.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".whl" and path.is_file():
        return _of_wheel(path)
    if path.name.endswith(SDIST_ENDING) and path.is_file():
        return _of_sdist(path)
    raise SourceError(f"{path}: neither a folder nor a wheel (.whl) nor a source distribution ({SDIST_ENDING})")


def _of_folder(path: Path) -> Source:
    root = path.parent if path.name == PACKAGE and (path / "__init__.py").is_file() else path

    def read(name: str) -> str | None:
        file = root / name
        return file.read_text("utf-8") if file.is_file() else None

    if read(f"{PACKAGE}/__init__.py") is None:
        raise SourceError(f"{path}: no package {PACKAGE} in it")
    return Source(_version(path, read), read)


def _of_wheel(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{path}: {error}") from error
    names = frozenset(archive.namelist())
    # Read one by one: unpacked, most of a wheel is compiled code.
    read = lambda name: archive.read(name).decode("utf-8") if name in names else None  # noqa: E731
    return Source(_version(path, read), read)


def _of_sdist(path: Path) -> Source:
    try:
        with tarfile.open(path) as archive:
            members = (member for member in archive if member.isfile() and member.name.endswith(".py"))
            # A compressed tar has no directory, so all is read in one go.
            texts = {member.name.partition("/")[2]: _content(archive, member) for member in members}
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{path}: {str(error).splitlines()[0]}") from error
    texts = {name: text for name, text in texts.items() if name.startswith(f"{PACKAGE}/")}
    return Source(_version(path, texts.get), texts.get)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return "" if file is None else file.read().decode("utf-8")


def _version(path: Path, read: Callable[[str], str | None]) -> str:
    """The version of vLLM: as its build wrote it down, else as the file's name says."""
    written = VERSION.search(read(f"{PACKAGE}/_version.py") or "")
    named = re.match(rf"{PACKAGE}-(\d[^-+]*?)(?:[-+]|\.tar\.gz)", path.name)
    found = written or named
    if found is None:
        raise SourceError(f"{path}: vLLM's version is nowhere in it (no {PACKAGE}/_version.py)")
    return found[1].partition("+")[0]
