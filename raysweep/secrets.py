"""Secrets, kept out of all that is written and shown: credentials in URLs, and what the environment holds of them."""

from __future__ import annotations

import os
import re

_HIDDEN = "***"

# Between scheme and host: user:password@.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://[^\s/:@\"']*:)[^\s/@\"']+(?=@)", re.IGNORECASE)
# Signed URLs (S3, Azure, Google), and the keys that interfaces take as parameters.
_PARAMETER = re.compile(
    r"((?:[?&]|\b)(?:sig|signature|token|access_token|api_key|apikey|password|secret|x-(?:amz|goog)-[a-z-]*"
    r"(?:signature|credential|token))=)[^&\s\"']+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"((?:[Aa]uthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?|\bBearer\s+))(?!\*)[\w.~+/=-]{8,}")
_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|SAS|APIKEY|(?:API|ACCESS|ACCOUNT|PRIVATE)_KEY)"
    r"(?:_|$)",
    re.IGNORECASE,
)
# Shorter ones are words that a text may hold by chance: "true", "token".
_SHORTEST = 8


def has_credentials(url: str) -> bool:
    """Whether a URL holds a password or a key."""
    return bool(_USERINFO.search(url) or _PARAMETER.search(url))


def without_secrets(text: str) -> str:
    """A text with *** in the place of each secret.

    Secrets are the values of environment variables that are named as such (TOKEN, SECRET, PASSWORD, API_KEY and the
    like), passwords and signatures in URLs, and authorization headers.

    >>> without_secrets("GET https://me:pa55@host/x?sig=abc123&n=1")
    'GET https://me:***@host/x?sig=***&n=1'
    """
    for value in sorted(_values(), key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    for pattern in (_USERINFO, _PARAMETER, _HEADER):
        text = pattern.sub(rf"\g<1>{_HIDDEN}", text)
    return text


def _values() -> set[str]:
    """The environment's secrets; a path or a switch is none."""
    return {
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and len(value) >= _SHORTEST and not value.startswith(("/", "~", "."))
    }
