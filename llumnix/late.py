"""A collaborator that comes later: where two need each other, the second is bound to the first."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Generic[T]):
    """Holds one object from `bind` on; to ask for it before is an error, never a silent no-op."""

    def __init__(self, what: str) -> None:
        """`what` it is, for the error."""
        self._what = what
        self._value: T | None = None

    def bind(self, value: T) -> None:
        """Have it from now on, in place of one that was bound before."""
        self._value = value

    def __call__(self) -> T:
        """The object. Raises RuntimeError if there is none yet."""
        if self._value is None:
            raise RuntimeError(f"there is no {self._what} yet")
        return self._value
