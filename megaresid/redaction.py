"""Secrets of the environment stay there: no file of a run and no message holds one."""

import os
import re
from typing import Any

SECRET_NAME = re.compile(r"(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
"""Of environment variables, and of the keys of a configuration."""

SHORTEST = 8
"""A shorter value is no secret, and may stand in any text by chance."""

HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
URL_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that are named as secrets are, without tokens of the Hub,
    and without the logins of addresses."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAME.search(name):
            text = text.replace(value, f"({name})")
    return URL_LOGIN.sub("(login)@", HUB_TOKEN.sub("(token)", text))


def redacted(tree: Any) -> Any:
    """A JSON-able tree with all its texts ``without_secrets``, and without the texts under keys that name a secret."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, list | tuple):
        return [redacted(item) for item in tree]
    if isinstance(tree, dict):
        return {key: f"({key})" if _names_a_secret(key, value) else redacted(value) for key, value in tree.items()}
    return tree


def _names_a_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and SECRET_NAME.search(key) is not None
