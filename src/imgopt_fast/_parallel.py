"""Runs a Numba kernel's range of work on several threads.

Numba's own threading layers die when a process forks after their first use, as data loaders do. The twins are
therefore serial kernels over a range that release the GIL, driven by the threads of this module.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_pool_owner = (0, 0)  # process id and size: a forked child inherits the object but not its threads


def thread_count() -> int:
    """Threads that torch would use; 1 inside a data loader's worker process."""
    import torch

    return 1 if torch.utils.data.get_worker_info() is not None else torch.get_num_threads()


def parallel_for(units: int, grain: int, body: Callable[[int, int], object]) -> None:
    """Call `body(begin, end)` on disjoint ranges that cover [0, units); each holds at least `grain` units.

    The bodies must be independent: any split has to give the same result.
    """
    global _pool, _pool_owner
    threads = max(1, min(thread_count(), units // max(1, grain)))
    if threads == 1:
        if units > 0:
            body(0, units)
        return
    owner = (os.getpid(), threads)
    if _pool is None or _pool_owner != owner:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="imgopt_fast")
        _pool_owner = owner
    bounds = [units * i // threads for i in range(threads + 1)]
    for future in [_pool.submit(body, bounds[i], bounds[i + 1]) for i in range(threads)]:
        future.result()
