"""What may be the name of a repository on the Hub."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_id(name: str, value: Any) -> None:
    """Refuse what is no name of a repository on the Hub.

    Raises:
        ValueError: naming the rule.
    """
    reason = "" if isinstance(value, str) and value.count("/") == 1 else "it must have an owner and a name"
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        reason = reason or str(error)
    if reason:
        raise ValueError(f"{name} must be a Hub id like owner/name, got {value!r}: {reason}")
