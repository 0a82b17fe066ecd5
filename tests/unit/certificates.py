"""Authorities and certificates made for one test: of whoever it wants, valid or expired."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PASSWORD = b"secret"


class Pair(NamedTuple):
    """The PEM files of a certificate and of its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for localhost; ``file`` is its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        self.file = folder / f"{name}.pem"
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = _valid(x509.CertificateBuilder(), expired=False).add_extension(usage, critical=True)
        self.file.write_bytes(self._signed(builder, self._name, self._key.public_key(), ca=True))

    def issue(self, name: str, *, expired: bool = False, encrypted: bool = False) -> Pair:
        """A certificate for localhost, with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        alternatives = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = _valid(x509.CertificateBuilder(), expired=expired).add_extension(alternatives, critical=False)
        pair.certificate.write_bytes(self._signed(builder, _named(name), key.public_key(), ca=False))
        locked = serialization.BestAvailableEncryption(PASSWORD) if encrypted else serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, locked))
        return pair

    def _signed(
        self, builder: x509.CertificateBuilder, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool
    ) -> bytes:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = (
            builder.subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return signed.public_bytes(serialization.Encoding.PEM)


def server_context(pair: Pair, clients: Authority | None = None) -> ssl.SSLContext:
    """What a server shows; with ``clients`` it wants a certificate of that authority from them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if clients is not None:
        context.load_verify_locations(clients.file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _valid(builder: x509.CertificateBuilder, *, expired: bool) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    first, last = (-10, -1) if expired else (-1, 10)
    return builder.not_valid_before(now + timedelta(days=first)).not_valid_after(now + timedelta(days=last))
