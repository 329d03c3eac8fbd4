"""Runs a function in two processes joined by gloo.

They are forks of the test's process, so importing costs nothing, and they leave without torch's clean-up at exit, in
which a gloo thread that is still running ends the process with an abort.
"""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = timedelta(minutes=2)


def on_ranks(function, *args, ranks=2):
    """What `function(rank, *args)` returns on each rank; fails with a rank's traceback if it raises."""
    with tempfile.TemporaryDirectory() as folder:
        children = [os.fork() or _run(Path(folder), rank, ranks, function, args) for rank in range(ranks)]
        for child in children:
            os.waitpid(child, 0)
        answers = [_answer(Path(folder, f"{rank}.pt")) for rank in range(ranks)]
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text != "ok"]
    assert not failed, "\n".join(failed)
    return [result for result, _ in answers]


def _answer(path):
    return torch.load(path) if path.exists() else (None, "died")


def _run(folder, rank, ranks, function, args):
    """In the fork: runs to the end and never returns."""
    result, text = None, "ok"
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=LIMIT
        )
        result = function(rank, *args)
        dist.barrier()  # nobody leaves while another rank still talks to it
    except BaseException:
        text = traceback.format_exc()
    torch.save((result, text), folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    os._exit(0)
