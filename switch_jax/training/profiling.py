"""StepProfiler: a trace of some train steps, for TensorBoard and Perfetto.

The regions of a step are the `jax.named_scope`s of model and train step. TensorBoard reads them
from the program that is in the trace. Perfetto's file has only names of instructions; here each
instruction with a region gets a second slice, which bears its name.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from switch_jax.files import write_atomically

_SCOPES = "attention feed_forward route dispatch experts combine loss optimizer"
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
_REGION = re.compile(rf"\b({_SCOPES.replace(' ', '|')})\b")
_REGION_TRACKS = 2**31  # added to the number of a thread: its track of regions


class StepProfiler:
    """Traces the steps from FIRST to LAST, both included, into a folder.

    `tensorboard --logdir FOLDER` shows the trace, and ui.perfetto.dev opens its
    `perfetto_trace.json.gz`. Each process of several traces itself.
    """

    def __init__(self, steps: str | None, folder: Path):
        """`steps`: `train.profile_steps`, "FIRST:LAST", or None: no trace."""
        self._first, self._last = map(int, steps.split(":")) if steps else (0, -1)
        self._folder = folder
        self._tracing = False

    def begin_step(self, step: int) -> None:
        """Starts the trace before the first of the steps, or where a resumed run begins later."""
        if not self._tracing and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True

    def ends_with(self, step: int, *, last: bool) -> bool:
        """Whether the trace ends after this step, which is the run's `last` or not."""
        return self._tracing and (last or step >= self._last)

    def end(self, results: Any, program_text: Callable[[], str]) -> str:
        """Ends the trace; returns a sentence about it.

        Args:
          results: of the last step, which the device may still compute.
          program_text: returns the optimised HLO of the train step; called after the trace, which
            would else show the compiler at work.
        """
        jax.block_until_ready(results)
        jax.profiler.stop_trace()
        self._tracing = False
        # Traces of earlier starts of the run are in the folder, too.
        traces = self._folder.rglob("perfetto_trace.json.gz")
        path = max(traces, key=lambda file: file.stat().st_mtime_ns)
        trace = json.loads(gzip.decompress(path.read_bytes()))
        trace["traceEvents"] += region_slices(trace["traceEvents"], program_text())
        write_atomically(path, gzip.compress(json.dumps(trace).encode()))
        return f"wrote the trace {self._folder}, for TensorBoard and Perfetto"


def region_slices(events: list[dict[str, Any]], program_text: str) -> list[dict[str, Any]]:
    """Returns a slice that bears the region's name for each instruction that has one.

    Args:
      events: of a trace, in Chrome's JSON format.
      program_text: optimised HLO, whose instructions have the regions in `op_name`.
    """
    regions = dict(_regions_of_instructions(program_text))
    slices, threads = [], set()
    for event in events:
        region = regions.get(event.get("args", {}).get("hlo_op"))
        if region is None or event.get("ph") != "X":
            continue
        thread = event["pid"], event["tid"] + _REGION_TRACKS
        threads.add(thread)
        slices.append({**event, "tid": thread[1], "name": region})
    names = [
        {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": "regions"}}
        for pid, tid in sorted(threads)
    ]
    return slices + names


def _regions_of_instructions(program_text: str) -> Iterator[tuple[str, str]]:
    """Yields the name of each instruction in a region, and the region's name."""
    for instruction, op_name in _INSTRUCTION.findall(program_text):
        found = _REGION.findall(op_name)
        if found:
            backward = ", backward" if "transpose(" in op_name else ""
            yield instruction, found[-1] + backward
