"""Imported models compute what transformers computes, for every architecture, and come back bit by bit.

The reference is transformers itself on random models: no parameter is at its usual start, and no two sizes are equal.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs the extra interop-test")
transformers = pytest.importorskip("transformers", reason="needs the extra interop-test")

import random_models  # noqa: E402 - needs torch
from random_models import MODELS, VOCABULARY  # noqa: E402

import efftrain  # noqa: E402
from efftrain.interop.architectures import ARCHITECTURES  # noqa: E402
from efftrain.interop.export_model import export_model  # noqa: E402
from efftrain.interop.import_model import import_model  # noqa: E402
from efftrain.models.cache import empty_cache  # noqa: E402
from efftrain.models.decoding.generate import generate  # noqa: E402
from efftrain.train.checkpoints.flat_state import flatten, unflatten  # noqa: E402

LENGTH, N_NEW = 520, 64
IDS = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
RAGGED = (150, 37, 13)  # longer than the windows, and shorter
PROMPTS = [IDS[0, :21].tolist(), IDS[1, :13].tolist()]


@dataclass
class Pair:
    """One model on both sides."""

    name: str
    folder: Path
    run: Path
    theirs: Any
    ours: efftrain.models.decoder.Decoder
    logits: np.ndarray


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    theirs = random_models.make(request.param, folder / "theirs")
    import_model(folder / "theirs", folder / "run")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    return Pair(request.param, folder, folder / "run", theirs, efftrain.load(folder / "run"), logits)


def logits_of(model: nnx.Module) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(IDS)))


def test_every_architecture_is_tried():
    found = {getattr(transformers, kind).model_type for kind, _ in MODELS.values()}
    assert found == set(ARCHITECTURES)


def test_shapes_in_which_mistakes_cannot_hide_are_tried():
    """Each ratio of heads, sizes of heads that are no power of two, or odd, tied and untied, and every scaled RoPE."""
    found: dict[str, set[Any]] = {}
    for name in MODELS:
        config = random_models.configuration(name)
        heads, hidden = config.num_attention_heads, config.hidden_size
        kv_heads = getattr(config, "num_key_value_heads", heads)
        rope = getattr(config, "rope_parameters", None) or {"rope_type": None}
        features = {
            "ratio": heads // kv_heads,
            "kv_heads": kv_heads,
            "d_head": getattr(config, "head_dim", None) or hidden // heads,
            "tied": config.tie_word_embeddings,
            "square": hidden == heads * (getattr(config, "head_dim", None) or hidden // heads),
            "rope": rope.get("rope_type", "default"),
        }
        assert hidden not in (VOCABULARY, getattr(config, "intermediate_size", None)), name
        for feature, value in features.items():
            found.setdefault(feature, set()).add(value)
    assert found["ratio"] >= {1, 2, 3, 4}
    assert found["kv_heads"] >= {1, 2, 3, 4}
    assert {size % 2 for size in found["d_head"]} == {0, 1}
    assert len([size for size in found["d_head"] if size & (size - 1)]) > 3
    assert found["tied"] == found["square"] == {False, True}
    assert found["rope"] == {None, "default", "linear", "dynamic", "llama3", "yarn", "longrope"}


def test_logits_are_equal_far_into_a_text(pair):
    difference = np.abs(logits_of(pair.ours) - pair.logits).max() / pair.logits.std()
    assert difference < 1e-4, difference


def test_rows_of_different_lengths_are_equal(pair):
    """Transformers pads on the left, with a mask; efftrain pads prompts on the right, and packs rows in training."""
    rows = [IDS[i % 2, 50 * i :][:n] for i, n in enumerate(RAGGED)]
    theirs = padded_logits(pair.theirs, rows)
    graph, state = nnx.split(pair.ours)
    width, total = max(RAGGED), sum(RAGGED) + 8
    ids_bp = np.zeros((len(rows), width), np.int32)
    packed_ids, segments, positions = (np.zeros((1, total), np.int32) for _ in range(3))
    starts = [sum(RAGGED[:i]) for i in range(len(rows))]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids_bp[i, : len(row)] = row
        at = slice(start, start + len(row))
        packed_ids[0, at], segments[0, at], positions[0, at] = row, i + 1, np.arange(len(row))

    @jax.jit
    def both(state):
        model = nnx.merge(graph, state)
        cache = empty_cache(model.config, len(rows), width)
        hidden_bpd, _ = model.extend(jnp.asarray(ids_bp), cache, fresh=True, n_valid_b=jnp.asarray(RAGGED))
        packed = model(jnp.asarray(packed_ids), segments_bt=jnp.asarray(segments), positions_bt=jnp.asarray(positions))
        return model.logits(hidden_bpd), packed[0]

    prefilled, packed = map(np.asarray, both(state))
    for i, (wanted, start) in enumerate(zip(theirs, starts, strict=True)):
        assert np.abs(prefilled[i, : len(wanted)] - wanted).max() / wanted.std() < 1e-4, RAGGED[i]
        assert np.abs(packed[start : start + len(wanted)] - wanted).max() / wanted.std() < 1e-4, RAGGED[i]


def padded_logits(model: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of the tokens of each row, from one batch of transformers that is padded on the left."""
    ids, mask = left_padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    return [logits[i, -len(row) :] for i, row in enumerate(rows)]


def left_padded(rows: list[Any]) -> tuple[Any, Any]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def test_greedy_continuations_of_prompts_of_different_lengths_are_equal(pair):
    ours = np.asarray(generate(pair.ours, PROMPTS, n_new=N_NEW))
    ids, mask = left_padded(PROMPTS)
    with torch.no_grad():
        theirs = pair.theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    np.testing.assert_array_equal(ours, theirs[:, ids.shape[1] :].numpy())


def test_tokens_go_to_the_same_experts(pair):
    if "num_experts_per_tok" not in (settings := pair.theirs.config.to_dict()):
        pytest.skip("no experts")
    graph, state = nnx.split(pair.ours)
    metrics = jax.jit(lambda state, ids: nnx.merge(graph, state).hidden(ids)[1])(state, jnp.asarray(IDS))
    loads_le = np.asarray(metrics["statistics"][0]["loads"])
    with torch.no_grad():
        logits = pair.theirs(torch.from_numpy(IDS).long(), output_router_logits=True).router_logits
    for loads_e, logits_ne in zip(loads_le, logits, strict=True):
        chosen = logits_ne.topk(settings["num_experts_per_tok"]).indices.flatten().numpy()
        np.testing.assert_array_equal(loads_e, np.bincount(chosen, minlength=logits_ne.shape[-1]))


def test_an_export_is_the_imported_model_bit_by_bit(pair):
    export_model(pair.run, pair.folder / "export")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        pair.folder / "export", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(loaded) is type(pair.theirs)
    theirs, ours = pair.theirs.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    with torch.no_grad():
        np.testing.assert_array_equal(loaded.eval()(torch.from_numpy(IDS).long()).logits.numpy(), pair.logits)
    import_model(pair.folder / "export", pair.folder / "again")
    again = flatten(nnx.state(efftrain.load(pair.folder / "again")))
    for name, array in flatten(nnx.state(pair.ours)).items():
        np.testing.assert_array_equal(array, again[name])


def test_the_exported_settings_are_those_of_the_model(pair):
    """Every field of transformers' own configuration that changes what a model computes."""
    exported = transformers.AutoConfig.from_pretrained(pair.folder / "export").to_dict()
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "max_window_layers"}
    differ = {
        name: (value, exported.get(name))
        for name, value in pair.theirs.config.to_dict().items()
        if name not in ignored and exported.get(name) != value
    }
    rope = exported.get("rope_parameters") or {}
    if all(
        rope.get(name) == value for name, value in (pair.theirs.config.to_dict().get("rope_parameters") or {}).items()
    ):
        differ.pop("rope_parameters", None)  # fields at their defaults are written too
    if "moe_intermediate_size" in exported:
        differ.pop("intermediate_size", None)  # of layers without experts, which there are none of
    kinds = ("dropout", "pdrop", "initializer", "token_id", "aux_loss")
    assert not {name: both for name, both in differ.items() if not any(kind in name for kind in kinds)}, differ


def moved(name: str, change: Any) -> Any:
    def mutate(flat: dict[str, np.ndarray]) -> None:
        key = next(key for key in flat if key.endswith(name))
        flat[key] = change(flat[key])

    return mutate


def swap(first: str, second: str) -> Any:
    def mutate(flat: dict[str, np.ndarray]) -> None:
        a, b = (next(key for key in flat if key.endswith(name)) for name in (first, second))
        flat[a], flat[b] = flat[b], flat[a]

    return mutate


def interleaved(kernel_ldf: np.ndarray) -> np.ndarray:
    """Columns of each head of 16 as a model with interleaved rotary pairs has them."""
    heads = kernel_ldf.reshape(*kernel_ldf.shape[:2], -1, 2, 8)
    return heads.swapaxes(-1, -2).reshape(kernel_ldf.shape)


MUTATIONS = {
    "query and key swapped": ("llama, all heads, llama3", swap("query/kernel", "key/kernel")),
    "key and value swapped": ("llama", swap("key/kernel", "value/kernel")),
    "a norm dropped": ("llama", moved("mlp_norm/scale", np.ones_like)),
    "the final norm dropped": ("llama", moved("norm/scale", np.ones_like)),
    "rotary pairs interleaved": ("llama", moved("query/kernel", interleaved)),
    "a square matrix transposed": ("gpt2", moved("out/kernel", lambda a: a.swapaxes(1, 2))),
    "a bias dropped": ("qwen2", moved("key/bias", np.zeros_like)),
    "gate and up swapped": ("llama", swap("gate/kernel", "up/kernel")),
    "a norm of queries dropped": ("qwen3", moved("query_norm/scale", np.ones_like)),
    "two experts swapped": ("mixtral", moved("mlp/gate", lambda a: a[:, [1, 0, 2, 3, 4]])),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_a_mistake_in_a_table_would_be_noticed(mutation, tmp_path):
    name, mutate = MUTATIONS[mutation]
    theirs = random_models.make(name, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    model = efftrain.load(tmp_path / "run")
    graph, state = nnx.split(model)
    flat = {key: np.asarray(array) for key, array in flatten(state).items()}
    mutate(flat)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    changed = logits_of(nnx.merge(graph, unflatten(flat, state)))
    assert np.abs(changed - logits).max() / logits.std() > 1e-2


def test_settings_keep_their_import(pair):
    assert json.loads((pair.run / "import.json").read_text())["architecture"] == pair.theirs.config.model_type
