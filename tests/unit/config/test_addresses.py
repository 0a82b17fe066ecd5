"""What the configuration says of addresses, proxies and tokens, and that it never tells a secret."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_wanspec.config import CONFIG_ENV, TOKEN_ENV, DraftEndpoint, Settings, load_settings, settings_path
from vllm_wanspec.errors import ConfigError

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONFIG_ENV, TOKEN_ENV, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wanspec.yaml"


def load(file: Path, text: str) -> Settings:
    file.write_text(text, encoding="utf-8")
    return load_settings(file)


def refused(file: Path, text: str) -> str:
    """The one line that is said of a file; the secrets of these tests begin with pass or secret."""
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert message.isprintable()
    said = message.removeprefix(f"{file}: ")
    assert "pass" not in said
    assert "secret" not in said
    return said


def endpoint(**keys: object) -> DraftEndpoint:
    return DraftEndpoint.model_validate({"name": "eu", "url": "http://h", **keys})


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pass@draft.example:8443",
        "https://pass@draft.example:8443",
        "https://:pass@draft.example",
        "https://user:@draft.example",
        "https://user:pa/pass@draft.example",
        "https://user:pa?pass@draft.example",
        "https://user:pa#pass@draft.example",
        "https://user:pa@pass@draft.example",
        "https://user:pa pass@draft.example",
        "https://user:pa'pass@draft.example",
        "user:pass@draft.example:8443",
        "ftp://user:pass@draft.example",
        "https://user:pass@draft.example:99999",
        "https://user:pass@",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_told(file: Path, url: str) -> None:
    message = refused(file, f'draft_endpoints: [{{name: eu, url: "{url}"}}]\n')
    assert message.startswith("draft_endpoints.0.url: ")
    assert "***@" in message
    assert "must be a base URL" in message
    assert "token_env" in message


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://h:1?token=secret", "query"),
        ("http://h:1/base?secret", "query"),
        ("http://h:1?", "query"),
        ("http://h:1#secret", "fragment"),
        ("http://h:1/#", "fragment"),
    ],
)
def test_an_address_with_more_behind_it(file: Path, url: str, what: str) -> None:
    message = refused(file, f"draft_endpoints: [{{name: eu, url: '{url}'}}]\n")
    assert message.startswith("draft_endpoints.0.url: 'http://h:1")
    assert what in message


@pytest.mark.parametrize(
    "text",
    [
        "draft_endpoints: {name: eu, url: 'http://user:pass@h'}\n",
        "draft_endpoints: 'http://user:pass@h'\n",
        "draft_endpoints: ['http://user:pass@h']\n",
        "draft_endpoints: [[{name: eu, url: 'http://user:pass@h'}]]\n",
        "draft_endpoints: [{name: eu, url: ['http://user:pass@h']}]\n",
        "draft_endpoints: [{name: eu, url: {'http://user:pass@h': 1}}]\n",
        "draft_endpoints: [{name: eu, url: 'http://h', token_env: [secret]}]\n",
        "draft_endpoints: [{name: eu, url: 'http://h'}]\ntree: 'http://user:pass@h'\n",
        "draft_endpoints: [{name: eu, url: 'http://h'}]\n'http://user:pass@h': 1\n",
        "draft_endpoints: [{name: eu, url: 'http://h', 'http://user:pass@h': 1}]\n",
        "'http://user:pass@h': 1\n'http://user:pass@h': 2\n",
        "draft_endpoints: [{name: eu, url: 'http://h'}]\nlate: {policy: 'http://user:pass@h'}\n",
        "draft_endpoints: [{name: eu, url: 'http://h'}]\nmetrics: {port: 'http://user:pass@h'}\n",
    ],
)
def test_a_password_in_the_wrong_place_is_not_told_either(file: Path, text: str) -> None:
    refused(file, text)


def test_settings_in_the_place_of_a_path_are_not_told() -> None:
    given = {"wanspec": {"draft_endpoints": [{"name": "eu", "url": "http://user:pass@h"}]}}
    with pytest.raises(ConfigError) as caught:
        settings_path(given)
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://h", "https://h:8443/a/b", "http://[::1]:8101", "http://dräfter.example/x%20y"])
def test_good_addresses(url: str) -> None:
    assert endpoint(url=url).url == url


# Proxies


@pytest.mark.parametrize("text", ["none", "off", "no", "'off'", "direct", "false"])
def test_no_proxy_for_an_endpoint(file: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    [only] = load(
        file, f"draft_endpoints: [{{name: eu, url: 'http://h', insecure: true, proxy: {text}}}]\n"
    ).draft_endpoints
    assert only.proxy_url() is None


def test_a_proxy_for_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://other.example:3128")
    monkeypatch.setenv("no_proxy", "*")
    proxied = endpoint(url="http://127.0.0.1:1", proxy="http://user:pass@proxy.example:3128")
    assert proxied.proxy_url() == "http://user:pass@proxy.example:3128"
    assert "pass" not in repr(proxied)


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://user:pass@proxy:1080",
        "https://user:pass@proxy",
        "user:pass@proxy:3128",
        "http://user:pass@",
        "http://user:pass@proxy:99999",
        "http://user:pass@proxy:3128/path",
        "http://user:pass@proxy:3128?x",
        "http://user:pass@pro xy:3128",
        "http://user:pass@pro\\xy:3128",
        "http://us%3Aer:pass@proxy:3128",
        "http://user:pass€@proxy:3128",
    ],
)
def test_a_wrong_proxy_is_refused_and_its_password_not_told(file: Path, proxy: str) -> None:
    message = refused(file, f"draft_endpoints: [{{name: eu, url: 'http://h', proxy: '{proxy}'}}]\n")
    assert message.startswith("draft_endpoints.0.proxy: ")
    assert "must be http://host:port or none" in message


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        ("http://h:8101", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://h:8101", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://h:8101", {"http_proxy": "p:1"}, "http://p:1"),
        ("http://h:8101", {"http_proxy": "http://u:w@p:1/"}, "http://u:w@p:1"),
        ("http://h:8101", {"https_proxy": "http://p:1"}, None),
        ("https://h:8443", {"https_proxy": "http://p:2", "http_proxy": "http://p:1"}, "http://p:2"),
        ("https://h:8443", {"http_proxy": "http://p:1"}, None),
        ("https://h:8443", {"HTTPS_PROXY": ""}, None),
        ("https://h:8443", {"https_proxy": "http://p:2", "no_proxy": "h"}, None),
        ("https://h:8443", {"https_proxy": "http://p:2", "NO_PROXY": "x, H:8443"}, None),
        ("https://h:8443", {"https_proxy": "http://p:2", "no_proxy": "h:8444"}, "http://p:2"),
        ("https://a.eu.example", {"https_proxy": "http://p:2", "no_proxy": ".eu.example"}, None),
        ("https://a.eu.example", {"https_proxy": "http://p:2", "no_proxy": "eu.example"}, None),
        ("https://aeu.example", {"https_proxy": "http://p:2", "no_proxy": "eu.example"}, "http://p:2"),
        ("https://10.1.2.3:1", {"https_proxy": "http://p:2", "no_proxy": "10.0.0.0/8"}, None),
        ("https://11.1.2.3:1", {"https_proxy": "http://p:2", "no_proxy": "10.0.0.0/8"}, "http://p:2"),
        ("https://[fd00::1]:1", {"https_proxy": "http://p:2", "no_proxy": "fd00::/8"}, None),
        ("https://[fd00::1]:1", {"https_proxy": "http://p:2", "no_proxy": "fd00::1"}, None),
        ("https://h", {"https_proxy": "http://p:2", "no_proxy": "*"}, None),
        ("http://127.0.0.1:8101", {"http_proxy": "http://p:1"}, None),
        ("http://[::1]:8101", {"http_proxy": "http://p:1"}, None),
        ("http://localhost:8101", {"http_proxy": "http://p:1"}, None),
    ],
)
def test_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], proxy: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert endpoint(url=url).proxy_url() == proxy


@pytest.mark.parametrize("proxy", ["socks5://user:pass@p:1080", "https://user:pass@p:1", "http://user:pass@p:x"])
def test_a_proxy_of_the_environment_that_cannot_be_used(
    file: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    text = "draft_endpoints: [{name: eu, url: 'https://h'}]\n"
    message = refused(file, text)
    assert message.startswith("draft_endpoints: eu: the environment variable HTTPS_PROXY")
    assert "proxy: none" in message
    monkeypatch.setenv("NO_PROXY", "h")
    assert load(file, text).draft_endpoints


# Tokens


WRONG_TOKENS = {
    "line end": ("secret\n", "line end"),
    "line end of Windows": ("secret\r\n", "line end"),
    "line end inside": ("sec\nret-secret", "line end"),
    "blank behind": ("secret ", "blank"),
    "blank before": (" secret", "blank"),
    "tab behind": ("secret\t", "blank"),
    "only blanks": ("  ", "empty"),
    "only a line end": ("\n", "empty"),
    "not ASCII": ("secrét-secret", "ASCII"),
    "a no-break space": ("secret\u00a0", "ASCII"),
    "no text at all": ("secret\udc80", "ASCII"),
    "a control character": ("secret\x1b[31m", "control character"),
    "endless": ("secret" * 2000, "longer"),
}


@pytest.mark.parametrize(("token", "what"), WRONG_TOKENS.values(), ids=WRONG_TOKENS.keys())
@pytest.mark.parametrize("variable", [TOKEN_ENV, "EU_TOKEN"])
def test_a_token_that_cannot_be_right(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, token: str, what: str
) -> None:
    monkeypatch.setenv(variable, token)
    named = "" if variable == TOKEN_ENV else f", token_env: {variable}"
    message = refused(file, f"draft_endpoints: [{{name: eu, url: 'http://h'{named}}}]\n")
    assert f"the environment variable {variable} " in message
    assert what in message


def test_an_empty_token(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "")
    message = refused(file, "draft_endpoints: [{name: eu, url: 'http://h'}]\n")
    assert f"the environment variable {TOKEN_ENV} is empty" in message
    monkeypatch.setenv("EU_TOKEN", "")
    message = refused(file, "draft_endpoints: [{name: eu, url: 'http://h', token_env: EU_TOKEN}]\n")
    assert "the environment variable EU_TOKEN is empty" in message


@pytest.mark.parametrize("value", ["secret-token", "secret token", "sk.secret", "'1secret'", "'$SECRET'", "''"])
def test_a_token_in_the_place_of_a_variable_s_name(file: Path, value: str) -> None:
    message = refused(file, f"draft_endpoints: [{{name: eu, url: 'http://h', token_env: {value}}}]\n")
    assert message.startswith("draft_endpoints.0.token_env: must be the name of an environment variable")
    assert "SECRET" not in message


def test_a_token_that_looks_like_a_variable_s_name(file: Path) -> None:
    message = refused(file, "draft_endpoints: [{name: eu, url: 'http://h', token_env: secret0123}]\n")
    assert message == (
        "draft_endpoints: eu: token_env: there is no environment variable of that name; "
        "set it to the drafter's token or remove token_env"
    )


@pytest.mark.parametrize("token", ["secret", "a b", "x" * 4096, "!~\"'"])
def test_good_tokens(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv(TOKEN_ENV, token)
    assert endpoint().token() == token


def test_an_endpoint_made_otherwise_tells_no_password() -> None:
    with pytest.raises(ValidationError) as caught:
        endpoint(url="http://user:pass@h")
    assert "pass" not in str(caught.value)
