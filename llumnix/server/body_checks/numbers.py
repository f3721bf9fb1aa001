"""Numbers of requests in a body, as vLLM's models will read them."""

from typing import Any

MANY = 2**31  # more than any limit
_DIGITS = 64  # that a sensible number may have, without zeros before it


def whole(value: Any) -> int:
    """A number of choices, as vLLM would read it; 1 for what is none.

    Its models take strings as well: with blanks around, a sign, zeros before, underscores between
    the digits, and nothing but zeros behind a point.
    """
    if type(value) is int:
        return min(max(value, 1), MANY)
    if isinstance(value, str):
        text = value.strip().lstrip("+-0_")
        if len(text) > _DIGITS and "." not in text[:_DIGITS]:
            return MANY if text[0].isdigit() else 1
        try:
            value = float(text[:_DIGITS])
        except ValueError:
            return 1
    if not isinstance(value, int | float) or value != value:
        return 1
    return int(min(max(value, 1), MANY))
