"""Runs the cases of the sharded_* modules on several gloo ranks of this machine: one set of processes a
number of ranks."""

import faulthandler
import importlib
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 240  # seconds, for all cases of a number of ranks


class Cases(dict):
    """A module's, by name; `@case` adds one. Each is given the number of ranks and a folder that they
    share."""

    def __init__(self, *ranks):
        super().__init__()
        self.ranks = ranks

    def __call__(self, function):
        self[function.__name__] = function
        return function


def cases(module):
    return importlib.import_module(module).case


def run(rank, ranks, folder, modules, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    faulthandler.enable()  # says where it crashes
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    failed = {}
    for module in modules:
        for name, function in cases(module).items():
            torch.manual_seed(0)
            try:
                function(ranks, folder)
            except Exception:
                failed[module, name] = traceback.format_exc()
                traceback.print_exc()  # in case that another rank waits for this one
            # A case that failed on one rank, and hangs on others in its next collective, ends all.
            found = [None] * ranks
            dist.all_gather_object(found, failed.get((module, name)))
            for error in filter(None, found):
                failed[module, name] = error
    if rank == 0:
        results.put(failed)
    dist.destroy_process_group()


def run_all(ranks, modules):
    """{(module, case): traceback} of those that failed on any rank."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.start_processes(run, (ranks, folder, modules, results), nprocs=ranks, start_method="spawn")
        return results.get()
