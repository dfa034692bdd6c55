"""TLS towards servers whose certificates operators vouch for: pods, and Kubernetes' API server.

Owns what is asked of such a certificate. Leaves out Redis, whose library sees to it, and what listens.
"""

from __future__ import annotations

import ssl


def client_context(authority: str | None, *, verify: bool = True) -> ssl.SSLContext:
    """``authority`` is a file of certificates; None: those that the system trusts. Raises OSError."""
    context = ssl.create_default_context(cafile=authority)
    # From Python 3.13 on it would ask for extensions that private authorities often lack. Neither Envoy asks pods for
    # them, nor other clients the API server.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
