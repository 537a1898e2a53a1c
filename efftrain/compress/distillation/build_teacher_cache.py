"""``efftrain teacher``: writes a frozen teacher's predictions for a corpus to disk, for the training of students.

The format is that of ``data.storage.teacher_cache``; the loader reads it together with the rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import efftrain
from efftrain import data
from efftrain.code_identity import code_identity
from efftrain.data.storage import store
from efftrain.data.storage.packing import padding
from efftrain.data.storage.teacher_cache import TeacherCache, describe, read_cache_manifest, write_shard
from efftrain.data.storage.teacher_records import CachePlan, encode_sampled, encode_top_k
from efftrain.errors import ConfigError, CorpusError
from efftrain.measure.measurements import other_origin
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import causally_routed, routes_causally
from efftrain.ops.fused_linear_loss import choose_chunks, over_chunks
from efftrain.progress import Progress, console
from efftrain.sharding.hosts import check_single_process
from efftrain.train.inputs import model_digest
from efftrain.train.run.directory import load_model_config, newest_step, read_json, row_length
from efftrain.train.run.tokenizers import check_tokenizer

ROOMS = ("compress/distillation/build_teacher_cache", "data", "models", "ops")  # decide what a cache contains
READ = ("tokens", "segments", "positions")  # the arrays of a row that the model reads


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Which of a teacher's predictions are stored, and for which rows; set either ``top_k`` or ``samples``.

    Attributes:
      top_k: number of the largest probabilities that are stored for each position. None: samples are stored.
      samples: number of tokens that are sampled from the distribution of each position. None: ``top_k`` are stored.
      rows: number of rows, from the start of the split. None: all.
      split: split of the corpus.
      length: tokens of a row. None: as the run was trained.
      batch_size: number of rows that the teacher reads at once.
      seed: seed of the samples.
    """

    top_k: int | None = 64
    samples: int | None = None
    rows: int | None = None
    split: str = "train"
    length: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if (self.top_k is None) == (self.samples is None):
            raise ConfigError(f"--top-k is {self.top_k} and --samples is {self.samples}; set exactly one of them")
        for name in ("top_k", "samples", "rows", "length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to 2**32 - 1")

    @property
    def name(self) -> str:
        """The suffix that the default name of the cache adds to the name of the run."""
        words = [f"top{self.top_k}" if self.top_k else f"sampled{self.samples}"]
        words += [f"rows{self.rows}" if self.rows else "", self.split if self.split != "train" else ""]
        words += [f"length{self.length}" if self.length else "", f"seed{self.seed}" if self.seed else ""]
        return "-".join(w for w in words if w)


def build_cache(run: Path, options: CacheOptions, *, corpus: Path | None = None, out: Path | None = None) -> Path:
    """Stores the predictions of a run's model at every position of the rows of a corpus, and prints the size.

    The folder appears when it is complete. If the command is interrupted, the same command continues; the samples
    depend only on the seed and the row, so that the records are the same. A finished cache of the same code is left as
    it is; an unfinished one of other code is started again. Readers of a cache do not check which code made it: it
    remains what its teacher predicted.

    Args:
      run: run directory of the teacher, which may also be a converted model.
      options: what is stored.
      corpus: the corpus that the students will be trained on. None: that of the run.
      out: folder of the cache. None: the directory of ``run`` with the options appended to its name.

    Returns:
      The folder of the cache.

    Raises:
      EfftrainError: run, corpus and options do not fit each other, or ``out`` holds something else.
    """
    check_single_process("a teacher's predictions are cached")
    run = Path(run).resolve()
    config, settings = load_model_config(run), read_json(run / "config.json")
    opened, rows = _open_rows(run, config, settings, options, corpus)
    out = run.with_name(f"{run.name}-{options.name}") if out is None else Path(out).resolve()
    model = efftrain.load(run)
    if not routes_causally(model):
        raise ConfigError(
            f"the model of {run} chooses tokens by looking ahead, so that it does not predict the next token and "
            "cannot teach; train it with causal 'predictor' or 'auxiliary'"
        )
    plan, code = _plan(model, opened, rows, options), code_identity(config, rooms=ROOMS)
    if _is_there(out, plan, code):
        console.print(f"{out} already exists for the same teacher, rows and options; nothing to do", markup=False)
        return out
    predict = _predictor(causally_routed(model), plan)
    n_tokens = min(plan.rows * plan.length, opened.n_tokens(plan.split))
    with store.building(out, {"plan": asdict(plan), "made_by_code": code}) as folder:
        _write_shards(folder, plan, rows, predict, options.batch_size)
        content = describe(plan, folder, n_tokens=n_tokens)
        made_by = {"run": run.name, "step": newest_step(run, settings), "code": code}
        store.write_manifest(folder, content | {"made_by": made_by})
    console.print(
        f"{out}: {n_tokens:,} tokens, {content['bytes_per_token']} bytes per token, {content['bytes'] / 1e6:,.1f} MB",
        markup=False,
    )
    return out


@partial(jax.jit, static_argnames=("graph", "vocab_size", "k"))
def largest(
    graph: nnx.GraphDef, state: nnx.State, rows: dict[str, Array], *, vocab_size: int, k: int
) -> tuple[Array, Array]:
    """The k most probable next tokens at each position, in descending order of probability.

    Args:
      graph, state: the decoder, split by ``nnx.split``.
      rows: "tokens", "segments" and "positions", (batch, length) int32 each.
      vocab_size: number of tokens of the vocabulary; the entries of the model after them are padding.
      k: number of tokens per position.

    Returns:
      Tokens (batch, length, k) int32, and their log probabilities (batch, length, k) float16.
    """

    def pick(logits_btv: Array) -> tuple[Array, Array]:
        top_btk, ids_btk = jax.lax.top_k(logits_btv, k)
        log_probs_btk = top_btk - jax.nn.logsumexp(logits_btv, axis=-1, keepdims=True)
        return ids_btk, log_probs_btk.astype(jnp.float16)

    return _over_logits(pick, nnx.merge(graph, state), rows, (), vocab_size)


@partial(jax.jit, static_argnames=("graph", "vocab_size", "n"))
def sample_tokens(
    graph: nnx.GraphDef,
    state: nnx.State,
    rows: dict[str, Array],
    numbers_b: Array,
    seed: Array,
    *,
    vocab_size: int,
    n: int,
) -> Array:
    """Samples tokens at each position, with replacement, from the teacher's distribution at temperature 1.

    Args:
      graph, state, rows, vocab_size: see ``largest``.
      numbers_b: (batch,) indices of the rows; only they and the seed determine the random numbers.
      seed: () uint32.
      n: number of samples per position.

    Returns:
      Tokens (batch, length, n) int32, in no particular order.

    Source: Anshumann et al. 2025 (Sparse Logit Sampling), importance sampling with the distribution itself as proposal.
    """
    keys_b = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers_b)
    shape = rows["tokens"].shape[1], n
    uniform_btn = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys_b)

    def invert(logits_btv: Array, uniform_btn: Array) -> Array:
        """Inverse transform sampling: the token whose interval of the cumulative distribution contains each number."""
        sums_btv = jnp.cumsum(jax.nn.softmax(logits_btv), axis=-1)
        places_btn = uniform_btn * sums_btv[..., -1:]  # the last sum differs from 1 by rounding
        search = partial(jnp.searchsorted, side="right")  # skips tokens of probability 0
        return jnp.minimum(jax.vmap(jax.vmap(search))(sums_btv, places_btn), vocab_size - 1)

    return _over_logits(invert, nnx.merge(graph, state), rows, (uniform_btn,), vocab_size)


def _over_logits(
    step: Callable[..., Any], model: Decoder, rows: dict[str, Array], more: tuple[Array, ...], vocab_size: int
) -> Any:
    """Applies ``step`` to the logits of all positions in chunks, so that the logits never exist all at once.

    ``more`` are further arrays that are split into the same chunks and given to ``step``.
    """
    x_btd, _ = model.hidden(rows["tokens"], segments_bt=rows["segments"], positions_bt=rows["positions"])
    batch, length, _ = x_btd.shape

    def chunk(carry: None, arrays: tuple[Array, ...]) -> tuple[None, Any]:
        x, *rest = arrays
        return carry, step(model.logits(x)[..., :vocab_size], *rest)

    n_chunks = choose_chunks(length, batch * length * model.config.vocab_size)
    return over_chunks(chunk, None, (x_btd, *more), n_chunks)[1]


Rows = Sequence[dict[str, np.ndarray]]
Predict = Callable[[dict[str, np.ndarray], np.ndarray], Any]  # dispatches to the device and does not wait for it


def _predictor(model: Decoder, plan: CachePlan) -> Predict:
    graph, state = nnx.split(model)
    if plan.kind == "top_k":
        return lambda rows, _: largest(graph, state, rows, vocab_size=plan.vocab_size, k=plan.n)
    assert plan.seed is not None  # drawn answers have one
    seed = np.uint32(plan.seed)
    return lambda rows, numbers: sample_tokens(graph, state, rows, numbers, seed, vocab_size=plan.vocab_size, n=plan.n)


def _write_shards(folder: Path, plan: CachePlan, rows: "data.PackedRows", predict: Predict, batch_size: int) -> None:
    """Writes the shards that an interrupted build has not written."""
    missing = [(folder / name, numbers) for name, numbers in plan.shards() if not (folder / name).exists()]
    done = plan.rows - sum(len(numbers) for _, numbers in missing)
    with Progress("Asking the teacher", plan.rows, unit="rows", initial=done) as progress:
        for path, numbers in missing:
            write_shard(path, _records(plan, rows, numbers, predict, batch_size, progress))


def _records(
    plan: CachePlan, rows: "data.PackedRows", numbers: range, predict: Predict, batch_size: int, progress: Progress
) -> Iterator[bytes]:
    filling = padding(plan.length)
    pending: tuple[Rows, Any] | None = None
    for start in range(numbers.start, numbers.stop, batch_size):
        real = [rows[number] for number in range(start, min(start + batch_size, numbers.stop))]
        filled = real + [filling] * (batch_size - len(real))  # one shape is compiled once
        batch = {name: np.stack([row[name] for row in filled]) for name in READ}
        asked = real, predict(batch, np.arange(start, start + batch_size, dtype=np.uint32))
        if pending is not None:  # encode one batch late, while the device works on this one
            yield from _encoded(plan, *pending)
            progress.advance(len(pending[0]))
        pending = asked
    if pending is not None:
        yield from _encoded(plan, *pending)
        progress.advance(len(pending[0]))


def _encoded(plan: CachePlan, rows: Rows, answer: Any) -> Iterator[bytes]:
    if plan.kind == "top_k":
        ids_btk, log_probs_btk = map(np.asarray, answer)
        for row, ids_tk, log_probs_tk in zip(rows, ids_btk, log_probs_btk, strict=False):  # padding rows come last
            yield encode_top_k(plan, row, ids_tk, log_probs_tk)
    else:
        for row, samples_tn in zip(rows, np.asarray(answer), strict=False):
            yield encode_sampled(plan, row, samples_tn)


def _open_rows(
    run: Path, config: ModelConfig, settings: dict[str, Any], options: CacheOptions, corpus: Path | None
) -> tuple["data.Corpus", "data.PackedRows"]:
    """The corpus, and the rows that the model reads, cut as the loader cuts them."""
    if corpus is None and not settings.get("corpus"):
        raise ConfigError(f"the configuration of {run} names no corpus; give one with --corpus")
    length = row_length(run, settings, options.length)
    opened = data.open(corpus or settings["corpus"])
    opened.check_model(config.vocab_size)
    check_tokenizer(run, opened.path)
    rows = data.PackedRows(opened, options.split, length)
    if options.rows is not None and options.rows > len(rows):
        raise ConfigError(
            f"--rows is {options.rows} and split {options.split!r} of {opened.path} has {len(rows)} rows of {length} "
            "tokens; give fewer, or remove --rows to use all"
        )
    return opened, rows


def _plan(model: Decoder, corpus: "data.Corpus", rows: "data.PackedRows", options: CacheOptions) -> CachePlan:
    n = options.top_k or options.samples
    assert n is not None  # ``CacheOptions`` has one of both
    return CachePlan(
        kind="top_k" if options.top_k else "sampled",
        n=n,
        seed=None if options.top_k else options.seed,
        vocab_size=corpus.vocab_size,
        teacher=model_digest(model),
        corpus=corpus.token_fingerprint,
        tokenizer=corpus.manifest["files"]["tokenizer.json"]["blake2b"],
        split=options.split,
        length=len(rows[0]["tokens"]),
        rows=options.rows or len(rows),
    )


def _is_there(out: Path, plan: CachePlan, code: dict[str, str]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / store.MANIFEST).is_file():
        raise CorpusError(f"{out} exists and is not a teacher cache; choose another --out")
    manifest = read_cache_manifest(out)
    before = manifest.get("plan", {}) | {"code": manifest.get("made_by", {}).get("code")}
    if reason := other_origin(before, asdict(plan) | {"code": code}):
        raise CorpusError(f"{out} was made with {reason}; choose another --out, or delete it")
    TeacherCache.open(out)
    return True
