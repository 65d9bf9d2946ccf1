"""Whether this process is one of several that torchrun started for one run."""

import os


def size() -> int:
    """How many processes share the run: the world size."""
    under_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if under_torchrun else 1


def rank() -> int:
    """Which of them this is. Only the first, 0, writes and shows progress."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is."""
    # What started them without saying so is taken to have started all of them here.
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def local_size() -> int:
    """How many of them are on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1
