"""Processes of one machine that make the shards of a token store."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from switch_jax.data.sources.bad_records import BadRecordAction
from switch_jax.data.token_store.shards import ShardTask, write_shard
from switch_jax.errors import UserError


def write_shards(
    tasks: list[ShardTask], action: BadRecordAction, workers: int
) -> Iterator[tuple[ShardTask, int]]:
    """Writes shards, in any order; yields each finished task and its number of tokens."""
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, write_shard(task, action)
        return
    # Not forked: the caller may have threads, JAX's or TensorFlow's.
    context = multiprocessing.get_context("spawn")
    # Of Python's resource tracker, which removes and reports what a Ctrl-C leaves.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _exit_with_parent) as pool:
        # The largest first, so that no worker is still busy with a large shard at the end.
        largest_first = sorted(tasks, key=lambda task: -task.shard.size)
        with _interrupts_blocked():
            running = {pool.submit(write_shard, task, action): task for task in largest_first}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker ended, for want of memory or because the program that packs has no"
                " `if __name__ == '__main__':`; the same command with fewer --workers goes on."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Starts processes without SIGINT: Ctrl-C is for their parent, with which they exit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    """Makes a worker exit when its parent is killed, since another build may start then."""
    parent = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()
