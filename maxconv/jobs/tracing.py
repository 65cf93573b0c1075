"""The timeline of a job, for --trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from maxconv.config import Config
from maxconv.config.outputs import of_process
from maxconv.execution import timeline
from maxconv.jobs.reporter import Reporter


@contextmanager
def traced(config: Config, reporter: Reporter) -> Iterator[None]:
    """Writes a timeline of the block to the file of --trace, if one is given."""
    if not config.trace:
        yield
        return
    with timeline.recorded() as spans:
        yield
    process = jax.process_index()
    path = of_process(config.trace, process, jax.process_count())
    spans.write(path, process)
    reporter.traced(path, spans.seconds())
