"""Remote speculative drafting for vLLM: drafts from a model in another site, used when they are in time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_wanspec.controller.v1.proposer import RemoteProposer

__version__ = "0.1.0"
__all__ = ["RemoteProposer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `RemoteProposer` on first use: the base install works without vLLM."""
    if name == "RemoteProposer":
        from vllm_wanspec.controller.v1.proposer import RemoteProposer

        return RemoteProposer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
