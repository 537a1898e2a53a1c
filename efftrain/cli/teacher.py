"""``efftrain teacher``."""

from pathlib import Path


def teacher(
    run: Path,
    /,
    *,
    top_k: int | None = None,
    samples: int | None = None,
    rows: int | None = None,
    split: str = "train",
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    corpus: Path | None = None,
    out: Path | None = None,
) -> None:
    """Store what a run's model predicts at every token of a corpus, so that students learn from it without running it.

    Such as: efftrain teacher runs/dense --samples 50. Up to 4 bytes per token for each probability of --top-k (6 if
    the vocabulary is over 65,536), and about 1 for each of --samples. When interrupted, the same command continues.

    Args:
      run: the directory of the teacher's run; it may be a compressed run.
      top_k: number of largest probabilities to store at each position, with the sum of the others; by default 64.
      samples: instead of top_k, number of tokens to sample at each position, at most 255: an unbiased estimate.
      rows: number of rows to store, from the beginning of the split; documents are in shuffled order.
      split: split of the corpus to store predictions for.
      length: tokens per row; by default as in the run's training. Students train on rows of the same length.
      batch_size: number of rows per batch of the teacher.
      seed: seed of the sampling.
      corpus: the corpus on which the students will train; by default that of the run.
      out: the folder to write; by default the run's name with these options.
    """
    from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache

    options = CacheOptions(
        top_k=64 if top_k is None and samples is None else top_k,
        samples=samples,
        rows=rows,
        split=split,
        length=length,
        batch_size=batch_size,
        seed=seed,
    )
    print(build_cache(run, options, corpus=corpus, out=out))
