"""The YAML file as frozen models; every error names the file, the key, the value and what would be right."""

import os
import re
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_wanspec.config.addresses import base_url, environment_proxy, proxy_setting, same_place
from vllm_wanspec.config.yamlfile import other_form, read_yaml
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import masked, masked_url, printable

CONFIG_ENV = "WANSPEC_CONFIG"
EVENTS_ENV = "WANSPEC_EVENTS"
WIDTH_ENV = "WANSPEC_RUNNING_BRANCHES"
TOKEN_ENV = "WANSPEC_TOKEN"
HOST_ENV = "WANSPEC_DRAFT_HOST"
PROPOSER = "vllm_wanspec.RemoteProposer"
"""What ``--speculative-config`` names as ``model``."""
MAX_ENTROPY_NATS = 100.0


MAX_TOKEN = 4096
"""Characters of a bearer token: servers bound their headers."""
MAX_ERRORS = 10
"""That are told of one file or request."""


class _Section(BaseModel):
    # Strict: true is no number and "8" none either. Errors are explained by `_explain`, which hides what may be secret.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must have no line ends and no other control characters")
    if value != value.strip():
        raise ValueError("must not begin or end with blanks")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,127}", value):
        raise ValueError(_NO_VARIABLE)
    return value


def _unless_off(instead: Any) -> BeforeValidator:
    """For keys whose value is no boolean: ``off``, which is false to YAML, can only mean ``instead``."""
    return BeforeValidator(lambda value: instead if value is False else value)


_Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
_NO_VARIABLE = "must be the name of an environment variable, as in WANSPEC_TOKEN_EU, not the token itself"


def checked_token(variable: str, value: str) -> str:
    """A bearer token as an environment variable holds it, if an HTTP header can carry it.

    Raises:
        ConfigError: It cannot, or it is empty; the text names the variable and never tells the value.
    """
    wrong = ""
    if not value.strip(" \t\r\n"):
        wrong = "is empty; give it the token, or unset it"
    elif "\n" in value or "\r" in value:
        wrong = "has a line end in it, as of a file that it was read from; give it the token alone"
    elif not value.isascii():
        wrong = "has characters that are not ASCII; give it the token alone"
    elif value != value.strip():
        wrong = "begins or ends with a blank; give it the token alone"
    elif not value.isprintable():
        wrong = "has a control character in it; give it the token alone"
    elif len(value) > MAX_TOKEN:
        wrong = f"is longer than {MAX_TOKEN} characters; give it the token alone"
    if wrong:
        raise ConfigError(f"the environment variable {variable} {wrong}")
    return value


class DraftEndpoint(_Section):
    """One drafter: a name for logs and metrics, its server's base URL, the variable that holds its token, its proxy."""

    name: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_one_line)]
    url: Annotated[str, AfterValidator(base_url)]
    token_env: Annotated[str, AfterValidator(_variable)] | None = None
    proxy: Annotated[str, _unless_off("none"), AfterValidator(proxy_setting)] | None = Field(default=None, repr=False)

    def token(self) -> str | None:
        """The bearer token from the environment: ``token_env``, or ``WANSPEC_TOKEN`` where that is not given.

        Raises:
            ConfigError: ``token_env`` names a variable that is not set, or no header can carry the token.
        """
        variable = self.token_env or TOKEN_ENV
        value = os.environ.get(variable)
        where = f"draft_endpoints: {self.name}: {'token_env: ' if self.token_env else ''}"
        if value is not None:
            try:
                return checked_token(variable, value)
            except ConfigError as error:
                raise ConfigError(f"{where}{error}") from error
        if self.token_env is None:
            return None
        # Somebody may have written the token itself there.
        named = f"the environment variable {variable} is not set" if variable.isupper() else _NO_SUCH_VARIABLE
        raise ConfigError(f"{where}{named}; set it to the drafter's token or remove token_env")

    def proxy_url(self) -> str | None:
        """The HTTP proxy that leads to the drafter, with user and password where it has them; None: there is none.

        Raises:
            ConfigError: The environment names one that cannot be used.
        """
        if self.proxy is not None:
            return None if self.proxy == "none" else self.proxy
        try:
            return environment_proxy(self.url)
        except ConfigError as error:
            raise ConfigError(f"draft_endpoints: {self.name}: {error}") from error


_NO_SUCH_VARIABLE = "there is no environment variable of that name"


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
        ConfigError: Two have one name or one url, or a token or a proxy of the environment cannot be used.
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
        endpoint.token()
        endpoint.proxy_url()


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
        return f"{key}: {_NO_VARIABLE}"
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
        model = sections[str(location[0])]
    return list(model.model_fields)
