"""Runs the items of a stage on Apache Beam (extra ``beam``): on Dataflow, Flink, Spark, or in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from efftrain.data.stages.engines.local import WORKER_BYTES, run_item
from efftrain.data.stages.stage import Stage
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Beam:
    """An engine that runs each stage as a Beam pipeline. Its elements are items of many documents, never single ones.

    Items read and write files, so that the folder of the corpus must be on a file system that all workers see under the
    same path.

    Attributes:
      options: command-line flags of Beam. The default runs in this process; Beam's own default would download a runner.
      budget: memory in bytes that the workers of a machine may use to sort.
      n_workers: number of workers that share the budget of a machine.
    """

    options: tuple[str, ...] = ("--runner=FnApiRunner",)
    budget: int = WORKER_BYTES
    n_workers: int = 1

    def __post_init__(self):
        try:
            import apache_beam  # noqa: F401
        except ImportError as error:
            raise ConfigError("the engine Beam needs: pip install 'efftrain[beam]'") from error

    def run(self, stage: Stage, numbers: Sequence[int]) -> Iterator[int]:
        """Runs the items and yields all numbers at the end of the pipeline, because Beam does not report elements."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(numbers))
                | beam.Reshuffle()  # prevents that the runner fuses the stage into one element
                | beam.Map(_run, folder=str(stage.folder.absolute()))
            )
        yield from numbers

    def close(self) -> None:
        """Does nothing, because each pipeline ends with its stage."""


def _run(number: int, folder: str) -> int:
    run_item(Path(folder), number)
    return number
