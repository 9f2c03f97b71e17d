"""JSON from files that anybody may have written."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, for which JSON that is nested too deep is a ValueError too, as all else that is wrong."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
