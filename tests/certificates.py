"""Certificates for tests, made by ``openssl``: one authority, and what it signs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """Paths of a certificate and its key, in PEM."""

    certificate: str
    key: str


class Authority:
    """A CA in a directory of the test's. ``file`` is its certificate."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = name
        self._pair = self._files(name)
        self.file = self._pair.certificate
        _openssl("req", "-x509", *_KEY, *self._out(self._pair), "-days", "2", "-subj", f"/CN={name}")

    def signs(self, name: str, names: Sequence[str] = ("DNS:localhost", "IP:127.0.0.1")) -> Pair:
        """A certificate for ``names``."""
        pair = self._files(f"{self._name}-{name}")
        request, extensions = f"{pair.certificate}.request", f"{pair.certificate}.extensions"
        Path(extensions).write_text(f"subjectAltName={','.join(names)}\n")
        _openssl("req", "-new", *_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.file, "-CAkey", self._pair.key, "-CAcreateserial",
            "-days", "2", "-extfile", extensions, "-out", pair.certificate,
        )  # fmt: skip
        return pair

    def _files(self, name: str) -> Pair:
        return Pair(str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key"))

    @staticmethod
    def _out(pair: Pair) -> tuple[str, ...]:
        return "-keyout", pair.key, "-out", pair.certificate


_KEY = ("-newkey", "rsa:2048", "-nodes")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
