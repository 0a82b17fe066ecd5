"""One drafter as the configuration file names it: where it is, what it is told, how far the way is trusted."""

import os
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from vllm_wanspec.config.addresses import base_url, environment_proxy, is_this_machine, proxy_setting
from vllm_wanspec.config.sections import Line, Section, one_line, unless_off
from vllm_wanspec.config.tls import TlsFiles, client_context
from vllm_wanspec.config.tokens import file_token, variable, variable_token
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import masked

TOKEN_ENV = "WANSPEC_TOKEN"
NO_VARIABLE = "must be the name of an environment variable, as in WANSPEC_TOKEN_EU, not the token itself"
_NO_SUCH_VARIABLE = "there is no environment variable of that name"


def _variable(value: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,127}", value):
        raise ValueError(NO_VARIABLE)
    return value


class DraftEndpoint(Section):
    """One drafter: a name for logs and metrics, its server's base URL, where its token is, its proxy, its TLS files.

    ``insecure`` says that an http url beyond this machine is meant.
    """

    name: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(one_line)]
    url: Annotated[str, AfterValidator(base_url)]
    token_env: Annotated[str, AfterValidator(_variable)] | None = None
    token_file: Line | None = None
    proxy: Annotated[str, unless_off("none"), AfterValidator(proxy_setting)] | None = Field(default=None, repr=False)
    insecure: bool = False
    tls: Annotated[TlsFiles | None, unless_off(None)] = None

    def token(self) -> str | None:
        """The bearer token as it is now: of ``token_file``, of ``token_env``, or else of ``WANSPEC_TOKEN``, if set.

        Raises:
            ConfigError: The file or variable is not there, or holds no token that a header can carry.
        """
        try:
            if self.token_file is not None:
                return file_token(self.token_file)
            name = self.token_env or TOKEN_ENV
            value = os.environ.get(name)
            if value is not None:
                return variable_token(name, value)
            if self.token_env is None:
                return None
            # Somebody may have written the token itself there.
            named = f"{variable(name)} is not set" if name.isupper() else _NO_SUCH_VARIABLE
            raise ConfigError(f"{named}; set it to the drafter's token or remove token_env")
        except ConfigError as error:
            key = "token_file: " if self.token_file else "token_env: " if self.token_env else ""
            raise ConfigError(f"{self._place}{key}{error}") from error

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
            raise ConfigError(f"{self._place}{error}") from error

    def check(self) -> None:
        """See that the keys go together, with each other, with the environment and with the files that they name.

        Raises:
            ConfigError: They do not.
        """
        if self.token_env is not None and self.token_file is not None:
            raise ConfigError(f"{self._place}token_file: token_env is given too; keep one of them")
        self.token()
        self.proxy_url()
        self._check_tls()
        parts = urlsplit(self.url)
        if parts.scheme == "http" and not self.insecure and not is_this_machine(parts.hostname or ""):
            raise ConfigError(
                f"{self._place}url: {masked(self.url, 200)} is not encrypted: whoever is on the way can read prompts, "
                "outputs and the token; write https://, or add insecure: true where the way itself is safe"
            )

    def _check_tls(self) -> None:
        if self.tls is None:
            return
        if urlsplit(self.url).scheme != "https":
            raise ConfigError(f"{self._place}tls: the url is an http one, without TLS; write https://, or remove tls")
        try:
            client_context(self.tls)
        except ConfigError as error:
            raise ConfigError(f"{self._place}{error}") from error

    @property
    def _place(self) -> str:
        return f"draft_endpoints: {self.name}: "
