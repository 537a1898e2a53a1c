"""The commands of ``efftrain compress``: one frozen dataclass each, with its options, their checks, and ``apply``.

It may import ``compress.corpus_rows``, ``layerwise``, ``quantization``, ``pruning`` and ``structured``.
"""
