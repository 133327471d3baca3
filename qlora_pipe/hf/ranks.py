"""Several processes on one run, as torchrun starts them: rank 0 leads and writes, all share layers and batches."""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from qlora_pipe.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    """This process's number, 0 if it is the only one; needs no torch."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the other processes over gloo, through accelerate's state; nothing to do for one. Raises ConfigError if they
    do not find each other.

    A process that fails leaves the others to its launcher: torchrun ends them all.
    """
    if count() == 1:
        return
    from accelerate import PartialState

    # Those that wait for rank 0 do so as long as its longest stage takes.
    found = PartialState(cpu=True, timeout=timedelta(days=30)).num_processes
    if found != count():
        raise ConfigError(
            f"expected {count()} processes (WORLD_SIZE), found {found}; start them with torchrun --nproc_per_node "
            f"{count()} -m qlora_pipe"
        )


def send(message: Any) -> None:
    """From rank 0 to all others."""
    if count() > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list([message], src=0)


def receive() -> Any:
    """What rank 0 sent."""
    import torch.distributed

    box = [None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def agree(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on every rank."""
    if rank():
        found: T = receive()
        return found
    found = function()
    send(found)
    return found


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        import torch.distributed

        torch.distributed.barrier()


def share(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``function(item)`` of all items, in order, on rank 0; the others do their shares and yield nothing.

    Every rank must consume this at the same time with the same items. What a result depends on is its item alone, so
    the number of ranks changes no byte. Peak bytes: on rank 0 one result of each rank, pickled and not.
    """
    if count() == 1:
        yield from map(function, items)
        return
    import torch.distributed

    for first in range(0, len(items), count()):
        place = first + rank()
        mine = function(items[place]) if place < len(items) else None
        gathered: list[Any] | None = [None] * count() if rank() == 0 else None
        torch.distributed.gather_object(mine, gathered)
        if gathered is not None:
            yield from gathered[: len(items) - first]
