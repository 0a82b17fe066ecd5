"""The compiler of the backend, which Triton wants to have and the interpreter does not ask."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Says that it is there; compiling ends in an error."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, opts: dict[str, Any]) -> dict[str, Any]:
        return opts

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any = None) -> None:
        raise RuntimeError("nothing compiles for the CPU here: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """It has none."""

    def get_module_map(self) -> dict[str, Any]:
        return {}
