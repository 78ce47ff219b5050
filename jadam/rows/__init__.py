"""Embeddings: Adam on the rows that a batch touches, equal to Adam on all of them."""

from jadam._state import RowsState
from jadam.rows._lazy import Lazy, lazy

__all__ = ["Lazy", "RowsState", "lazy"]


def __dir__() -> list[str]:
    return __all__
