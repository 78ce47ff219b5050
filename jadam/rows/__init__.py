"""Embeddings: Adam on the rows that a batch touches, equal to Adam on all of them."""

from jadam._state import RowsState as RowsState
from jadam.rows._lazy import Lazy as Lazy
from jadam.rows._lazy import lazy as lazy
