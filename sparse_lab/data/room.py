"""Is there memory for images that lie there whole?"""

from __future__ import annotations

from sparse_lab.errors import UserError
from sparse_lab.host.machine import available_memory, size


def check_room(what: str, needed: int) -> None:
    """Raise UserError where `needed` bytes are more than there are. what: the images, in words."""
    if needed > (room := available_memory()):
        raise UserError(
            f"{what} take {size(needed)} of memory, and {size(room)} are available: smaller or fewer images "
            "(dataset.image_size, dataset.train_limit), or a machine with more"
        )
