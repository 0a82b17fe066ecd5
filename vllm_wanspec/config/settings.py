"""The YAML file as frozen models; every error names the file, the key, the value and what would be right."""

import os
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from vllm_wanspec.config.addresses import same_place
from vllm_wanspec.config.endpoints import NO_VARIABLE, DraftEndpoint
from vllm_wanspec.config.sections import Line as _Line
from vllm_wanspec.config.sections import Section as _Section
from vllm_wanspec.config.sections import unless_off as _unless_off
from vllm_wanspec.config.tls import TlsFiles
from vllm_wanspec.config.yamlfile import other_form, read_yaml
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import masked, masked_url, printable

CONFIG_ENV = "WANSPEC_CONFIG"
EVENTS_ENV = "WANSPEC_EVENTS"
WIDTH_ENV = "WANSPEC_RUNNING_BRANCHES"
HOST_ENV = "WANSPEC_DRAFT_HOST"
TOKEN_FILE_ENV = "WANSPEC_TOKEN_FILE"
OTHER_ROUTES_ENV = "WANSPEC_OTHER_ROUTES"
PROPOSER = "vllm_wanspec.RemoteProposer"
"""What ``--speculative-config`` names as ``model``."""
MAX_ENTROPY_NATS = 100.0


MAX_ERRORS = 10
"""That are told of one file or request."""


def _entropy(value: float) -> float:
    if not (0.0 <= value <= MAX_ENTROPY_NATS or value == inf):
        raise ValueError(f"must be adaptive, .inf (never branch) or 0 to {MAX_ENTROPY_NATS:g} nats")
    return value


class TreeSettings(_Section):
    """What a session asks of the drafter: how far ahead it drafts, and how wide."""

    entropy_threshold_nats: Literal["adaptive"] | Annotated[float, AfterValidator(_entropy)] = 1.0
    max_branches: int = Field(default=4, ge=1, le=64)
    running_branches: int = Field(default=16, ge=1, le=1024)
    branch_depth: int = Field(default=8, ge=1, le=64)
    min_probability: float = Field(default=0.02, ge=0.0, le=1.0)
    max_nodes: int = Field(default=512, ge=8, le=65536)
    lookahead_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"

    def overridden(self, text: str) -> "TreeSettings":
        """These settings with some of them replaced, as a request may ask for.

        Args:
            text: Such as ``max_branches=1,entropy_threshold_nats=0.5``.

        Raises:
            ConfigError: Not such a list, an unknown key, or a value out of range.
        """
        values: dict[str, str] = {}
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise ConfigError(f'wanspec: {item!r:.80}: expected "off" or key=value,…, as in max_branches=1')
            if key in values:
                raise ConfigError(f"wanspec: {printable(key, 60)} is given twice; keep one of them")
            if wrong := other_form(value):
                raise ConfigError(f"wanspec: {printable(key, 60)}: {wrong}")
            values[key] = value
        try:
            return TreeSettings.model_validate({**self.model_dump(), **values}, strict=False)
        except ValidationError as error:
            raise ConfigError(f"wanspec: {_explained(error, TreeSettings)}") from error


class LengthSettings(_Section):
    """How many tokens to verify per step: never more than ``max`` nor than vLLM's ``num_speculative_tokens``.

    With ``shut_off`` a step's drafts are withheld where they would cost more than they yield.
    """

    policy: Literal["fixed", "marginal", "awc"] = "marginal"
    shut_off: bool = True
    max: int = Field(default=64, ge=1, le=64)


class LateSettings(_Section):
    """Whether to wait for drafts about to arrive, and for how long at most.

    ``none``; ``adaptive``: where the wait yields more than it costs; ``fixed``: always while a request has none.
    """

    policy: Annotated[Literal["none", "adaptive", "fixed"], _unless_off("none")] = "adaptive"
    max_wait_ms: float = Field(default=15.0, ge=0.0, le=1000.0)


class MetricsSettings(_Section):
    """Where the controller serves its Prometheus metrics."""

    port: int = Field(ge=1, le=65535)
    host: _Line = "127.0.0.1"


class Settings(_Section):
    """The whole file; ``fallback``: where drafts come from for a step that no drafter has served.

    ``vocabulary_may_differ``: ids that a drafter may have other tokens for; they are never sent nor taken from one.
    """

    draft_endpoints: tuple[DraftEndpoint, ...] = Field(min_length=1, max_length=64, strict=False)
    tree: TreeSettings = TreeSettings()
    length: LengthSettings = LengthSettings()
    late: LateSettings = LateSettings()
    fallback: Annotated[tuple[Literal["ngram"], ...], _unless_off(()), Field(strict=False)] = ("ngram",)
    vocabulary_may_differ: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=256, strict=False)
    metrics: Annotated[MetricsSettings | None, _unless_off(None)] = None
    events: Annotated[_Line | None, _unless_off(None)] = None


def load_settings(path: str | Path) -> Settings:
    """Read and check a configuration file.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong; one line.
    """
    data = read_yaml(path)
    shown = printable(str(path), 1000)
    if not isinstance(data, dict):
        raise ConfigError(f"{shown}: must be a mapping with the key draft_endpoints, not {type(data).__name__}")
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{shown}: {_explained(error)}") from None
    try:
        _check_endpoints(settings.draft_endpoints)
    except ConfigError as error:
        raise ConfigError(f"{shown}: {error}") from error
    return settings


def settings_path(additional_config: Any) -> str:
    """The configuration file named by vLLM's ``--additional-config`` or by ``WANSPEC_CONFIG``.

    Raises:
        ConfigError: Neither names one.
    """
    given = additional_config.get("wanspec") if isinstance(additional_config, dict) else None
    path = given or os.environ.get(CONFIG_ENV)
    if not isinstance(path, str) or not path:
        raise ConfigError(
            'no configuration: give --additional-config \'{"wanspec": "wanspec.yaml"}\' (a path) '
            f"or set {CONFIG_ENV}" + (f"; got {masked(given)}" if given else "")
        )
    return path


def _check_endpoints(endpoints: tuple[DraftEndpoint, ...]) -> None:
    """What no endpoint shows alone, or only with the environment.

    Raises:
        ConfigError: Two have one name or one url, or one has keys that do not go together or name what cannot be used.
    """
    names = [endpoint.name for endpoint in endpoints]
    places: dict[tuple[str, str, int, str], str] = {}
    for endpoint in endpoints:
        if names.count(endpoint.name) > 1:
            raise ConfigError(f"draft_endpoints: the name {endpoint.name!r} is given twice; names must differ")
        first = places.setdefault(same_place(endpoint.url), endpoint.name)
        if first != endpoint.name:
            raise ConfigError(f"draft_endpoints: {first} and {endpoint.name} have the same url; keep one of them")
    for endpoint in endpoints:
        endpoint.check()


def _explained(error: ValidationError, model: type[_Section] | None = None) -> str:
    """What is wrong, in one line: the first `MAX_ERRORS` of it, and how much more there is."""
    errors = _innermost(error.errors(include_url=False))
    more = [f"and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
    return "; ".join([*(_explain(item, model) for item in errors[:MAX_ERRORS]), *more])


def _innermost(errors: list[Any]) -> list[Any]:
    """Without those of lists and sections that only follow from an error inside them."""
    outer = {tuple(error["loc"][:length]) for error in errors for length in range(len(error["loc"]))}
    return [error for error in errors if tuple(error["loc"]) not in outer]


_BRANCHES_OF_UNIONS = {
    "constrained-int",
    "constrained-float",
    "literal['auto']",
    "literal['adaptive']",
    "function-after[_entropy(), float]",
}


def _explain(error: Any, model: type[_Section] | None = None) -> str:
    """One pydantic error as ``key: what is wrong``; of the whole file, or of one section."""
    parts = [masked_url(str(part)) for part in error["loc"] if part not in _BRANCHES_OF_UNIONS]
    key = printable(".".join(parts), 160)
    value = error.get("input")
    if error["type"] == "missing":
        return f"{key}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{key}: is not a known key; known here: {', '.join(_known_keys(error['loc'], model))}"
    if error["loc"][-1] == "token_env":
        return f"{key}: {NO_VARIABLE}"
    if error["loc"][-1] == "token_file":
        return f"{key}: must be the path of a file that holds the token, not the token itself"
    if error["type"] == "model_type":
        what = "is empty; give it a key or leave it out" if value is None else f"{masked(value)}: must be a mapping"
        return f"{key}: {what}"
    message = str(error["msg"]).removeprefix("Value error, ")
    boolean = isinstance(value, bool) and not error["type"].startswith("bool")
    hint = " (on, off, yes and no are true and false to YAML: put text in quotes)" if boolean else ""
    if error["type"] == "string_type" and isinstance(value, int | float) and not boolean:
        hint = " (put it in quotes)"
    return f"{key}: {masked(value)}: {message[0].lower()}{message[1:]}{hint}"


def _known_keys(location: tuple[str | int, ...], section: type[_Section] | None) -> list[str]:
    """Keys allowed beside the one at ``location``."""
    model: type[_Section] = section or Settings
    sections: dict[str, type[_Section]] = {
        "draft_endpoints": DraftEndpoint,
        "tree": TreeSettings,
        "length": LengthSettings,
        "late": LateSettings,
        "metrics": MetricsSettings,
    }
    if len(location) > 1:
        model = TlsFiles if location[2:3] == ("tls",) and len(location) > 3 else sections[str(location[0])]
    return list(model.model_fields)
