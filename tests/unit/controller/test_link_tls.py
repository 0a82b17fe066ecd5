"""DrafterLink and certificates of one's own: each that is wrong is one clear line, and no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from certificates import Authority, Pair, server_context
from conftest import LogLines
from links import TOY, User, running
from toys import DrafterServer, wait_until

from vllm_wanspec.controller.link import DrafterLink

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture(autouse=True)
def no_other_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Watched(NamedTuple):
    """A link that runs, and who uses it."""

    link: DrafterLink
    user: User

    @property
    def ready(self) -> int:
        return self.user.ready


@contextmanager
def linked(shown: Pair, clients: Authority | None = None, **files: Path) -> Iterator["Watched"]:
    """A link with these files to a server that shows a certificate, and may want one of its clients."""
    tls = {key: str(path) for key, path in files.items()}
    with DrafterServer(TOY, tls=server_context(shown, clients)) as server:
        with running(f"https://localhost:{server.port}", tls=tls) as (link, user):
            yield Watched(link, user)


def only_line(log: LogLines, link: Watched) -> str:
    """The one warning, however often it is tried."""
    for _ in range(3):
        state = link.link._rng.getstate()
        wait_until(lambda state=state: link.link._rng.getstate() != state)  # it draws for each wait
    [line] = log.warnings()
    assert link.ready == 0
    assert line.startswith("drafter eu (https://localhost:")
    for record in log.records:
        assert record.getMessage().isprintable()
        assert record.exc_info is None
    return line


def test_an_authority_of_the_endpoint_s_own(authority: Authority, log: LogLines) -> None:
    with linked(authority.issue("server"), ca=authority.file) as link:
        wait_until(lambda: link.ready)
    assert log.warnings() == []


def test_another_authority(authority: Authority, log: LogLines, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    with linked(authority.issue("server"), ca=other.file) as link:
        line = only_line(log, link)
    assert "its certificate is not accepted (" in line
    assert f"it is not of the authority in {other.file} (tls.ca)" in line


def test_no_authority_of_its_own(authority: Authority, log: LogLines) -> None:
    with linked(authority.issue("server")) as link:
        line = only_line(log, link)
    assert "for an authority of your own give its certificate (PEM) as tls: {ca: FILE}, or in SSL_CERT_FILE" in line


def test_an_expired_certificate(authority: Authority, log: LogLines) -> None:
    with linked(authority.issue("server", expired=True), ca=authority.file) as link:
        line = only_line(log, link)
    assert "its certificate is not accepted (certificate has expired); renew it, or set the clock right" in line


def test_mutual_tls(authority: Authority, log: LogLines, tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    shown = clients.issue("client")
    files = {"ca": authority.file, "certificate": shown.certificate, "key": shown.key}
    with linked(authority.issue("server"), clients, **files) as link:
        wait_until(lambda: link.ready)
    assert log.warnings() == []


def test_a_missing_client_certificate(authority: Authority, log: LogLines, tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    with linked(authority.issue("server"), clients, ca=authority.file) as link:
        line = only_line(log, link)
    assert "client certificate" in line
    assert "give one by tls: {certificate: FILE, key: FILE}" in line


@pytest.mark.parametrize("expired", [True, False])
def test_a_wrong_client_certificate(authority: Authority, log: LogLines, tmp_path: Path, expired: bool) -> None:
    clients = Authority(tmp_path, "clients")
    shown = (clients if expired else authority).issue("client", expired=expired)
    files = {"ca": authority.file, "certificate": shown.certificate, "key": shown.key}
    with linked(authority.issue("server"), clients, **files) as link:
        line = only_line(log, link)
    assert "does not accept our client certificate (" in line or "hangs up without an answer" in line


def test_files_that_go_and_come_back(authority: Authority, log: LogLines, tmp_path: Path) -> None:
    away = tmp_path / "away.pem"
    authority.file.replace(away)
    with linked(authority.issue("server"), ca=authority.file) as link:
        line = only_line(log, link)
        assert f"tls.ca: {authority.file} cannot be read: No such file or directory; trying again" in line
        away.replace(authority.file)
        wait_until(lambda: link.ready)
