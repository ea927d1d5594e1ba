"""Apache Beam pipeline that makes the shards of a token store on many machines.

Every worker writes its shards into the store itself, which is on a disk that all machines share or
in a bucket. So nothing but tasks passes through the pipeline, and any runner gives the same files.
"""

import contextlib
import io
import re
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from switch_jax.data.sources.bad_records import BadRecordAction
from switch_jax.data.token_store.shards import (
    ShardTask,
    read_summaries,
    split_by_finished,
    write_shard,
)
from switch_jax.errors import UserError

_POLL_SECONDS = 2.0  # between two looks at the shards that are finished, at least
_USER_ERROR = re.compile(r"\bUserError: (.+?)(?: \[while running|\\n|\n|$)")


def write_shards_on_beam(
    tasks: list[ShardTask], action: BadRecordAction, options: Sequence[str]
) -> Iterator[tuple[ShardTask, int]]:
    """Writes shards, in any order; yields each finished task and its number of tokens.

    Args:
      options: of the pipeline, as flags of Beam: "--runner=FlinkRunner" and others.

    Raises `UserError` where Beam is missing or refuses an option, and where the pipeline fails.
    """
    if not tasks:  # a start of a pipeline takes minutes on many runners
        return
    run = _Run(_pipeline(tasks, action, options))
    run.start()
    try:
        while tasks:
            is_last = not run.is_alive()
            start = time.monotonic()
            finished, tasks = split_by_finished(tasks)
            for task, summary in zip(finished, read_summaries(finished)):
                yield task, summary["tokens"]
            if is_last:
                break
            # Listing a large store takes long, and a bucket is paid for it.
            run.join(max(_POLL_SECONDS, 10 * (time.monotonic() - start)))
    except BaseException:
        run.cancel()
        raise
    run.check()
    if tasks:
        raise UserError(
            f"The pipeline ended without {len(tasks)} shards, {tasks[0].summary_name!r} among them:"
            " its workers must see the same --output, on a disk that all share or in a bucket."
        )


def _pipeline(tasks: list[ShardTask], action: BadRecordAction, options: Sequence[str]) -> Any:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "--runner needs the package apache-beam; install it with `pip install"
            " 'switch_jax[beam]'`."
        ) from error
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):  # on which Beam's argument parser says why
            parsed = PipelineOptions(list(options))
            parsed.get_all_options()  # which checks them all
            pipeline = beam.Pipeline(options=parsed)
    except (Exception, SystemExit) as error:
        reason = _last_line(str(error) if isinstance(error, Exception) else messages.getvalue())
        raise UserError(
            f"Beam refuses {shlex.join(options)} ({reason}); change --runner or --pipeline_options."
        ) from error
    # Reshuffled, since a runner may else give all tasks to one worker.
    _ = (
        pipeline
        | "tasks" >> beam.Create(tasks)
        | "share out" >> beam.Reshuffle()
        | "write shards" >> beam.Map(write_shard, action)
    )
    return pipeline


class _Run(threading.Thread):
    """Run of a pipeline, in a thread since some runners block until it has ended."""

    def __init__(self, pipeline: Any):
        super().__init__(name="pipeline", daemon=True)
        self._pipeline = pipeline
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Runs the pipeline; is called by `start`."""
        try:
            self._result = self._pipeline.run()
            self._result.wait_until_finish()
        except BaseException as error:
            self._error = error

    def cancel(self) -> None:
        """Stops the pipeline, unless it runs in this process, with which it ends."""
        if self._result is not None:
            with contextlib.suppress(NotImplementedError):
                self._result.cancel()

    def check(self) -> None:
        """Waits until the pipeline has ended; raises `UserError` if it failed."""
        self.join()
        if self._error is None:
            return
        if isinstance(self._error, UserError):  # of a worker in this process
            text = f"UserError: {self._error}"
        else:
            text = str(self._error) or type(self._error).__name__
        if found := _USER_ERROR.search(text):
            raise UserError(found[1]) from self._error
        raise UserError(
            f"The pipeline failed ({_last_line(text)}); the same command goes on with the shards"
            " that are left."
        ) from self._error


def _last_line(text: str) -> str:
    return (text.strip() or "it gives no reason").splitlines()[-1][:300]
