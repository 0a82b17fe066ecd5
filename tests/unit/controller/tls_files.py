"""A certificate for the tests, of an authority that no machine knows: for localhost and drafter.test, until 2126."""

import ssl
from pathlib import Path

FOLDER = Path(__file__).parent / "tls"
AUTHORITY = FOLDER / "authority.pem"


def server_tls() -> ssl.SSLContext:
    """What a server on localhost speaks TLS with."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(FOLDER / "server.pem")
    return context
