"""`policy-split`, with a disk on which checkpoint 4 is damaged; the first argument says where.

extra: what it says of itself; state: a file of its arrays; bit: an array that every library takes for whole.
"""

import sys
from typing import Any

import jax
import numpy as np

from policy_split_jax.cli import main
from policy_split_jax.training import checkpoint


def damaged(manager: Any, step: int, args: Any) -> Any:
    """As `_restored`, but for step 4."""
    item = "state" if "state" in args else "extra"
    if step == 4 and item == sys.argv[1]:
        raise checkpoint.Damaged("the disk of this process")
    found = restored(manager, step, args)
    if step == 4 and (item, sys.argv[1]) == ("state", "bit"):
        value = found["state"]["step"]
        wrong = np.asarray(value.addressable_data(0)) + 1
        found["state"]["step"] = jax.make_array_from_callback(value.shape, value.sharding, lambda index: wrong)
    return found


restored, checkpoint._restored = checkpoint._restored, damaged
sys.exit(main(sys.argv[2:]))
