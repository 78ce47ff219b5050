"""How the moments of a parameter lie in memory between two steps.

A storage keeps all moments of one parameter, an array for each, and turns them into numbers and
back. Nothing outside of this room looks at a stored array to find out what it means: it asks
`storage_of`.
"""

from jadam._storage.blocks import BLOCK as BLOCK
from jadam._storage.blocks import block_max as block_max
from jadam._storage.blocks import is_cut as is_cut
from jadam._storage.blocks import placed_like as placed_like
from jadam._storage.blocks import tops_shape as tops_shape
from jadam._storage.blocks import uncut as uncut
from jadam._storage.blocks import uncut_lanes as uncut_lanes
from jadam._storage.blocks import whole_rows as whole_rows
from jadam._storage.choice import Storage as Storage
from jadam._storage.choice import checked_storage_of as checked_storage_of
from jadam._storage.choice import chooser as chooser
from jadam._storage.choice import storage_of as storage_of
from jadam._storage.codes import MIN_SIZE as MIN_SIZE
from jadam._storage.codes import Codes as Codes
from jadam._storage.lattice import EIGHT_BITS as EIGHT_BITS
