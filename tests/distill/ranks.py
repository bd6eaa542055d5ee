"""Several processes as torchrun would start them."""

from __future__ import annotations

import os
import socket
import sys
import traceback

from torch import multiprocessing

COUNT = 2


def launch(function, *arguments, count=COUNT, answering=COUNT, timeout=120):
    """Run `function(rank, *arguments)` in each; its answers, or what it raised as text, by rank.

    `answering` of them are expected to come to an end. They are forked from a server that has
    imported what they need and done nothing: where autograd has run on a CUDA build of torch, or
    anything on CUDA, a fork is of no use. So `function` and its arguments have to be picklable.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "tests.distill.tools"])
    answers = context.SimpleQueue()
    children = [
        context.Process(target=_rank, args=(answers, rank, count, port, function, arguments))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(timeout)
            assert child.exitcode == 0, f"exit status {child.exitcode}"
    finally:
        for child in children:
            child.kill()
    return [answer for _, answer in sorted(answers.get() for _ in range(answering))]


def _rank(answers, rank, count, port, function, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        answer = function(rank, *arguments)
    except BaseException as error:
        traceback.print_exc()
        answer = f"{type(error).__name__}: {error}"
    answers.put((rank, answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as a crash would: no goodbye to the others
