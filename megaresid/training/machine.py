"""What a rank knows of the machine that it runs on."""

import os


def ranks_on_this_machine() -> int:
    """How many ranks the launcher started on this machine: 1 without a launcher, all where it does not say how many.

    torchrun says it in LOCAL_WORLD_SIZE, DeepSpeed's launcher in LOCAL_SIZE.
    """
    environ = os.environ
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("WORLD_SIZE") or 1)
