"""Packaging of vllm-wanspec; the settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def read_version() -> str:
    """Take the version from the package without importing it; 0.1.0 is the first release."""
    init = ROOT / "vllm_wanspec" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"', init.read_text("utf-8"), re.MULTILINE) if init.exists() else None
    return found.group(1) if found else "0.1.0"


setup(
    name="vllm-wanspec",
    version=read_version(),
    description="Speculative decoding for vLLM with the draft model in another site, across a WAN",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="vllm-wanspec developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vllm", "speculative decoding", "LLM inference", "WAN", "draft tree"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_wanspec", "vllm_wanspec.*"]),
    package_data={"vllm_wanspec": ["py.typed"], "vllm_wanspec.trace": ["*.html", "*.css", "*.js"]},
    # The base install works without vLLM and torch.
    install_requires=[
        "aiohttp>=3.9",
        "msgpack>=1.1",
        "numpy>=1.26",
        "prometheus-client>=0.19",
        "pydantic>=2.5",
        "PyYAML>=6.0",
        "rich>=13.0",
        "typer>=0.12",
    ],
    extras_require={
        "vllm": ["vllm>=0.26,<0.34"],
        "plots": ["matplotlib>=3.8"],
        "profile": ["py-spy>=0.4"],
        "test": [
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "mypy>=1.10",
            "pandas>=2.0",  # wanted by `vllm bench serve`
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "scipy>=1.11",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["wanspec = vllm_wanspec.cli.main:run"],
        # The same name in both groups: VLLM_PLUGINS selects by name and guards both.
        "vllm.general_plugins": ["wanspec = vllm_wanspec.plugin:register"],
        "vllm.endpoint_plugins": ["wanspec = vllm_wanspec.drafter.routes:WanspecRoutes"],
    },
)
