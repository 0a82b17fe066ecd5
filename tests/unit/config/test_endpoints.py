"""What the configuration says of an endpoint's encryption, its token file and its TLS files."""

import ssl
from pathlib import Path

import pytest
from certificates import Authority

from vllm_wanspec.config import TOKEN_ENV, DraftEndpoint, load_settings
from vllm_wanspec.config.tls import ClientTls, TlsFiles
from vllm_wanspec.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, without tokens and proxies."""
    for name in (TOKEN_ENV, "EU_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(keys: str) -> DraftEndpoint:
    Path("wanspec.yaml").write_text(f"draft_endpoints: [{{name: eu, {keys}}}]\n", "utf-8")
    [endpoint] = load_settings("wanspec.yaml").draft_endpoints
    return endpoint


def refused(keys: str) -> str:
    """The one line that is said of an endpoint; the secrets of these tests begin with secret."""
    with pytest.raises(ConfigError) as caught:
        loaded(keys)
    message = str(caught.value)
    assert message.startswith("wanspec.yaml: draft_endpoints")
    assert message.isprintable()
    assert "secret" not in message
    return message.removeprefix("wanspec.yaml: ")


# Encryption


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8101", "http://drafter.example", "http://localhost.example", "http://[fe80::1]:8101"]
)
def test_http_beyond_this_machine_has_to_be_meant(url: str) -> None:
    message = refused(f"url: '{url}'")
    assert message.startswith(f"draft_endpoints: eu: url: '{url}' is not encrypted: ")
    assert "https://" in message
    assert "insecure: true" in message
    refused(f"url: '{url}', insecure: false")
    assert loaded(f"url: '{url}', insecure: true").url == url


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.3.2.1", "http://localhost:1", "http://[::1]:1"])
def test_http_on_this_machine_is_fine(url: str) -> None:
    assert loaded(f"url: '{url}'").url == url


@pytest.mark.parametrize("value", ["'true'", "1", "maybe"])
def test_insecure_is_true_or_false(value: str) -> None:
    message = refused(f"url: 'http://10.0.0.1', insecure: {value}")
    assert message.startswith("draft_endpoints.0.insecure: ")
    assert "boolean" in message


# Token files


def test_a_token_file_is_read_at_each_attempt(folder: Path) -> None:
    file = folder / "token"
    file.write_text("secret-old\n", "utf-8")
    endpoint = loaded(f"url: 'https://h', token_file: {file}")
    assert endpoint.token() == "secret-old"
    file.write_text("secret-new\n", "utf-8")
    assert endpoint.token() == "secret-new"
    file.unlink()
    with pytest.raises(ConfigError, match=f"^draft_endpoints: eu: token_file: {file} cannot be read"):
        endpoint.token()


def test_a_token_file_goes_before_the_general_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "token").write_text("secret-file\n", "utf-8")
    monkeypatch.setenv(TOKEN_ENV, "secret-variable")
    assert loaded("url: 'https://h', token_file: token").token() == "secret-file"
    assert loaded("url: 'https://h'").token() == "secret-variable"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("token_file: /absent/token", "draft_endpoints: eu: token_file: /absent/token cannot be read: No such file"),
        ("token_file: secret0123", "draft_endpoints: eu: token_file: there is no file of that name here"),
        ("token_file: [secret]", "draft_endpoints.0.token_file: must be the path of a file that holds the token"),
        ("token_file: 12", "draft_endpoints.0.token_file: must be the path of a file that holds the token"),
        ("token_file: ''", "draft_endpoints.0.token_file: must be the path of a file that holds the token"),
        ("token_file: empty", "draft_endpoints: eu: token_file: empty holds no token"),
        ("token_file: full, token_env: EU_TOKEN", "draft_endpoints: eu: token_file: token_env is given too; keep one"),
    ],
)
def test_a_token_file_that_cannot_be_right(folder: Path, keys: str, said: str) -> None:
    (folder / "empty").touch()
    (folder / "full").write_text("secret\n", "utf-8")
    assert refused(f"url: 'https://h', {keys}").startswith(said)


def test_none_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "none")
    assert loaded("url: 'https://h'").token() is None


# TLS files


@pytest.fixture
def authority(folder: Path) -> Authority:
    authority = Authority(folder, "ca")
    authority.issue("client")
    authority.issue("other")
    authority.issue("locked", encrypted=True)
    (folder / "both.pem").write_bytes((folder / "client.pem").read_bytes() + (folder / "client.key").read_bytes())
    (folder / "text").write_text("secret\n", "utf-8")
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nsecret\n-----END CERTIFICATE-----\n", "utf-8")
    return authority


@pytest.mark.parametrize(
    "tls",
    [
        "{ca: ca.pem}",
        "{certificate: client.pem, key: client.key}",
        "{certificate: both.pem}",
        "{ca: ca.pem, certificate: client.pem, key: client.key}",
        "{}",
        "off",
    ],
)
def test_good_files(authority: Authority, tls: str) -> None:
    assert loaded(f"url: 'https://h', tls: {tls}").name == "eu"


WRONG_FILES = {
    "no authority": ("{ca: absent.pem}", "tls.ca: absent.pem cannot be read: No such file"),
    "an authority without a certificate": ("{ca: text}", "tls.ca: text holds no certificate in PEM"),
    "an authority that is broken": ("{ca: broken.pem}", "tls.ca: broken.pem cannot be used ("),
    "a folder": ("{ca: .}", "tls.ca: . cannot be read: Is a directory"),
    "no certificate": ("{certificate: absent.pem}", "tls.certificate: absent.pem cannot be read: No such file"),
    "no key": ("{certificate: client.pem}", "tls.certificate: client.pem holds no private key in PEM"),
    "an absent key": ("{certificate: client.pem, key: absent.key}", "tls.key: absent.key cannot be read: No such file"),
    "no key in its file": ("{certificate: client.pem, key: ca.pem}", "tls.key: ca.pem holds no private key in PEM"),
    "a key in the place of the certificate": (
        "{certificate: client.key, key: client.pem}",
        "tls.certificate: client.key holds no certificate in PEM",
    ),
    "another's key": (
        "{certificate: client.pem, key: other.key}",
        "tls.key: other.key has the key of another certificate than client.pem",
    ),
    "an encrypted key": ("{certificate: locked.pem, key: locked.key}", "tls.key: locked.key is encrypted"),
    "a broken certificate": (
        "{certificate: broken.pem, key: client.key}",
        "tls.certificate: broken.pem and its key cannot be used (",
    ),
    "a key alone": ("{key: client.key}", "tls.key: there is no tls.certificate that it is for"),
}


@pytest.mark.parametrize(("tls", "said"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_files_that_cannot_be_used(authority: Authority, tls: str, said: str) -> None:
    assert refused(f"url: 'https://h', tls: {tls}").startswith(f"draft_endpoints: eu: {said}")


def test_tls_for_an_http_url(authority: Authority) -> None:
    message = refused("url: 'http://127.0.0.1:1', tls: {ca: ca.pem}")
    assert message.startswith("draft_endpoints: eu: tls: the url is an http one")


def test_an_unknown_key_of_tls_is_told_with_those_that_are_known() -> None:
    message = refused("url: 'https://h', tls: {cert: x}")
    assert message == "draft_endpoints.0.tls.cert: is not a known key; known here: ca, certificate, key"


def test_a_context_is_made_again_when_a_file_has_changed(folder: Path, authority: Authority) -> None:
    tls = ClientTls("https://h", TlsFiles(ca="ca.pem", certificate="client.pem", key="client.key"))
    first = tls.context()
    assert isinstance(first, ssl.SSLContext)
    assert tls.context() is first
    renewed = authority.issue("renewed")
    for new, name in zip(renewed, ("client.pem", "client.key"), strict=True):
        new.replace(folder / name)
    assert tls.context() is not first
    (folder / "client.key").unlink()
    with pytest.raises(ConfigError, match=r"^tls\.key: client\.key cannot be read"):
        tls.context()


def test_without_tls_there_is_no_context() -> None:
    tls = ClientTls("http://127.0.0.1:1", None)
    assert tls.context() is True
    assert not tls.encrypted
