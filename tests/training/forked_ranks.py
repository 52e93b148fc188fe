"""Processes that are the ranks of one run, forked from one that has done the imports, which take longer than most runs."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody else, and that whoever knows its number can listen on, until the block ends."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def fork_ranks(count: int, work: Callable[..., None], *arguments) -> list[int]:
    """Fork ``count`` processes on one thread each that ``work(*arguments)`` as one; their ids."""
    children = []
    with reserved_port() as port:  # which the children hold as well
        for rank in range(count):
            sys.stdout.flush()
            child = os.fork()
            if not child:
                _be_a_rank(rank, count, port, work, arguments)
            children.append(child)
    return children


def _be_a_rank(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        work(*arguments)
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:  # noqa: BLE001  # a child must not go on as a copy of its parent
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses(children: list[int]) -> list[int]:
    """How each of them ended, in their order; waits for all."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
