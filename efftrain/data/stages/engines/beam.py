"""Items of a stage on Apache Beam (extra ``beam``): Dataflow, Flink, Spark, or in this process for tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from efftrain.data.stages.engines.local import WORKER_BYTES, run_item
from efftrain.data.stages.stage import Stage
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A pipeline for each stage, whose elements are items: blocks of some thousand documents, never single ones.

    The items read and write files, so the folder of the corpus must be on a file system that all workers see under the
    same path.

    Attributes:
      options: flags of Beam. The default runs in this process; Beam's own default would download a runner.
      budget: bytes that a worker may use to sort.
      n_workers: that share the budget of one machine.
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
        """Yields the numbers when the pipeline has ended: Beam reports no single element."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(numbers))
                | beam.Reshuffle()  # or the runner fuses the stage into one element
                | beam.Map(_run, folder=str(stage.folder.absolute()))
            )
        yield from numbers

    def close(self) -> None:
        """Each pipeline has ended with its stage."""


def _run(number: int, folder: str) -> int:
    run_item(Path(folder), number)
    return number
