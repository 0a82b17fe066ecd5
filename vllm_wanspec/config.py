"""The YAML file as frozen models; every error names the file, the key, the value and what would be right."""

import os
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vllm_wanspec.errors import ConfigError

CONFIG_ENV = "WANSPEC_CONFIG"
EVENTS_ENV = "WANSPEC_EVENTS"
WIDTH_ENV = "WANSPEC_RUNNING_BRANCHES"
TOKEN_ENV = "WANSPEC_TOKEN"
HOST_ENV = "WANSPEC_DRAFT_HOST"
PROPOSER = "vllm_wanspec.RemoteProposer"
"""What ``--speculative-config`` names as ``model``."""
MAX_ENTROPY_NATS = 100.0


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _base_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("must be a base URL such as https://draft.example.com:8443")
    return value.rstrip("/")


class DraftEndpoint(_Section):
    """One drafter: a name for logs and metrics, its server's base URL, and the variable that holds its token."""

    name: str = Field(min_length=1, max_length=64)
    url: Annotated[str, AfterValidator(_base_url)]
    token_env: str | None = Field(default=None, min_length=1)

    def token(self) -> str | None:
        """The bearer token from the environment: ``token_env``, or ``WANSPEC_TOKEN`` where that is not given.

        Raises:
            ConfigError: ``token_env`` names a variable that is not set.
        """
        if self.token_env is None:
            return os.environ.get(TOKEN_ENV) or None
        token = os.environ.get(self.token_env)
        if not token:
            raise ConfigError(
                f"draft_endpoints: {self.name}: token_env: the environment variable {self.token_env} is not set; "
                "set it to the drafter's token or remove token_env"
            )
        return token


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
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f'wanspec: {item!r:.80}: expected "off" or key=value,…, as in max_branches=1')
            values[key.strip()] = value.strip()
        try:
            return TreeSettings.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            explained = [_explain(item, TreeSettings) for item in _innermost(error.errors())]
            raise ConfigError(f"wanspec: {'; '.join(explained)}") from error


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

    policy: Literal["none", "adaptive", "fixed"] = "adaptive"
    max_wait_ms: float = Field(default=15.0, ge=0.0, le=1000.0)


class MetricsSettings(_Section):
    """Where the controller serves its Prometheus metrics."""

    port: int = Field(ge=1, le=65535)
    host: str = "127.0.0.1"


class Settings(_Section):
    """The whole file; ``fallback``: where drafts come from for a step that no drafter has served.

    ``vocabulary_may_differ``: ids that a drafter may have other tokens for; they are never sent nor taken from one.
    """

    draft_endpoints: tuple[DraftEndpoint, ...] = Field(min_length=1, max_length=64)
    tree: TreeSettings = TreeSettings()
    length: LengthSettings = LengthSettings()
    late: LateSettings = LateSettings()
    fallback: tuple[Literal["ngram"], ...] = ("ngram",)
    vocabulary_may_differ: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=256)
    metrics: MetricsSettings | None = None
    events: str | None = Field(default=None, min_length=1)


def load_settings(path: str | Path) -> Settings:
    """Read and check a configuration file.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong; one line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "cannot parse"
        raise ConfigError(f"{path}: is not valid YAML{where}: {what}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with the key draft_endpoints, not {type(data).__name__}")
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}: {_explain(item)}" for item in _innermost(error.errors()))) from error
    _check_names(path, settings)
    return settings


def settings_path(additional_config: Any) -> str:
    """The configuration file named by vLLM's ``--additional-config`` or by ``WANSPEC_CONFIG``.

    Raises:
        ConfigError: Neither names one.
    """
    given = additional_config.get("wanspec") if isinstance(additional_config, dict) else None
    path = given or os.environ.get(CONFIG_ENV)
    if not isinstance(path, str):
        raise ConfigError(
            'no configuration: give --additional-config \'{"wanspec": "wanspec.yaml"}\' (a path) '
            f"or set {CONFIG_ENV}" + (f"; got {given!r}" if given else "")
        )
    return path


def _check_names(path: str | Path, settings: Settings) -> None:
    names = [endpoint.name for endpoint in settings.draft_endpoints]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: draft_endpoints: the name {name!r} is given twice; names must differ")
    for endpoint in settings.draft_endpoints:
        try:
            endpoint.token()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _innermost(errors: list[Any]) -> list[Any]:
    """Without those of lists and sections that only follow from an error inside them."""
    places = [tuple(error["loc"]) for error in errors]
    return [
        error
        for error, place in zip(errors, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


_BRANCHES_OF_UNIONS = {
    "constrained-int",
    "constrained-float",
    "literal['auto']",
    "literal['adaptive']",
    "function-after[_entropy(), float]",
}


def _explain(error: Any, model: type[_Section] | None = None) -> str:
    """One pydantic error as ``key: what is wrong``; of the whole file, or of one section."""
    key = ".".join(str(part) for part in error["loc"] if part not in _BRANCHES_OF_UNIONS)
    value = error.get("input")
    if error["type"] == "missing":
        return f"{key}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{key}: is not a known key; known here: {', '.join(_known_keys(error['loc'], model))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {value!r:.80}: {message[0].lower()}{message[1:]}"


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
        model = sections[str(location[0])]
    return list(model.model_fields)
