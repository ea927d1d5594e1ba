"""Entry point of `switch-jax` and `python -m switch_jax`: memory allocator, Ctrl-C, command line.

Ctrl-C ends the process at any moment. An exception in the main thread would not do: it waits for
native code, such as a compilation, and libraries that are being imported or called back lose it or
turn it into an error of their own.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_EXIT_CODE = 128 + signal.SIGINT
_exiting = threading.RLock()


def main() -> int:
    """Runs the command line and returns its exit code."""
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
        _exit_at_interrupts()
    from switch_jax.cli import main as run

    return run()


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory for the next allocation, if JAX computes on CPUs.

    XLA's CPU programs allocate their buffers in each step. By default glibc gives large freed
    blocks back to the kernel, which then clears their pages in the next step: a third of the step
    time of `configs/switch_mini.py`. Must be called before the process has other threads: a thread
    keeps the heap with which it has begun, later threads share these heaps, and only the main
    thread's heap keeps its memory. Other allocators are left as they are.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and _has_accelerator_plugin():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _has_accelerator_plugin() -> bool:
    """Whether a package is installed with which JAX runs on GPUs or TPUs."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def _exit_at_interrupts() -> None:
    """Makes SIGINT end the process with exit code 130 and one line on stderr.

    While another handler is installed, as `record_signals` does, the first SIGINT is left to it.
    """
    signal.signal(signal.SIGINT, _exit)
    # Python writes to this pipe when the signal arrives, whatever the main thread does.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait_for_interrupts() -> None:
        left_to_others = 0
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                if left_to_others or signal.getsignal(signal.SIGINT) is _exit:
                    _exit()
                left_to_others += 1

    threading.Thread(target=wait_for_interrupts, name="interrupts", daemon=True).start()


def _exit(*arguments: Any) -> None:
    # A second thread waits here: returned, its native code could keep the first from going on.
    _exiting.acquire()
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    os.write(2, f"{show_cursor}switch-jax: Interrupted.\n".encode())
    os._exit(_EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main())
