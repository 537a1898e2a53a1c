"""A folder in the format of Hugging Face: config.json, safetensors (one file or shards with an index), tokenizer."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from efftrain.errors import ConfigError, RunError
from efftrain.interop.settings import Settings

INDEX = "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HuggingFaceFolder:
    """A ``source.ModelSource`` of such a folder. Only safetensors are read; pickled weights could run code.

    Args:
      path: the folder.

    Raises:
      ConfigError: ``config.json`` is missing or no JSON object.
      RunError: the weights are missing, pickled, damaged, or not floating-point numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        values = _read_object(path / "config.json")
        if "text_config" in values:
            raise ConfigError(
                f"{path / 'config.json'}: text_config makes this a model of several kinds of input; export its text "
                "model alone with transformers, and import that"
            )
        self.settings = Settings(values, str(path / "config.json"))
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: Counter[str] = Counter()
        for file, expected in self._shards().items():
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if name in self._files:
                        raise RunError(f"{file} and {self._files[name]} both hold {name}; keep it in one of them")
                    piece = tensors.get_slice(name)
                    if piece.get_dtype() not in FLOATS:
                        raise RunError(
                            f"{file}: {name} is of dtype {piece.get_dtype()}; import the model in bfloat16, float16 or "
                            "float32, and quantise it with efftrain compress"
                        )
                    dtypes[piece.get_dtype()] += 1
                    self._files[name], shapes[name] = file, tuple(piece.get_shape())
            if expected is not None and (missing := sorted(expected - set(shapes))):
                raise RunError(f"{file} does not hold {missing[0]}, which {INDEX} says it does; download it again")
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.texts: Mapping[str, str] = _texts(path, values)
        self.origin: Mapping[str, Any] = {"format": "safetensors", "dtypes": dict(dtypes)} | _said_by_readme(path)

    def read(self, name: str) -> np.ndarray:
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    def _shards(self) -> dict[Path, set[str] | None]:
        """Files with tensors, and the names that the index promises in each; None: there is no index."""
        index = self.path / INDEX
        if not index.is_file():
            files = sorted(self.path.glob("*.safetensors"))
            if len(files) == 1:
                return {files[0]: None}
            if files:
                raise RunError(f"{self.path} has {len(files)} safetensors files and no {INDEX}; download the index too")
            pickled = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLES)
            if pickled:
                raise RunError(
                    f"{self.path / pickled[0]} is pickled, which can run any code when it is read; save the model with "
                    "save_pretrained of transformers, which writes safetensors"
                )
            raise RunError(f"{self.path} has no safetensors file; give the folder of a model's weights")
        places = _read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise RunError(f"{index} has no weight_map from names to files; download it again")
        found: dict[Path, set[str] | None] = {}
        for name, file in places.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise RunError(f"{index} places {name} in {file!r}, which is no safetensors file of this folder")
            names = found.setdefault(self.path / file, set())
            assert names is not None
            names.add(name)
        return found


def _texts(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The files of the tokenizer. What older folders keep elsewhere comes into the files in which a run has it."""
    found = {name: (path / name).read_text("utf-8") for name in TEXTS if (path / name).is_file()}
    config = _read_object(path / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if isinstance(template, str):
        found.setdefault("chat_template.jinja", template)
    ids = {name: settings[name] for name in _IDS if settings.get(name) is not None}
    if ids:
        found.setdefault("generation_config.json", json.dumps(ids, indent=2) + "\n")
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise RunError(f"{file} does not exist, and {INDEX} names it; download it") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{file} is damaged or no safetensors file ({error}); download it again") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a folder with config.json and safetensors, or a GGUF file")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; download it again")
    return value


def _said_by_readme(path: Path) -> dict[str, Any]:
    """Licence and languages in the front matter of the folder's README.md, of which only plain entries are read."""
    readme = path / "README.md"
    lines = readme.read_text("utf-8", errors="replace").splitlines() if readme.is_file() else []
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines[1:] if lines and lines[0].strip() == "---" else []:
        if line.strip() == "---":
            break
        if line.lstrip().startswith("- "):
            found.setdefault(name, []).append(line.lstrip()[2:].strip(" '\""))
        elif not line.startswith((" ", "#")):
            name, _, value = line.partition(":")
            found[name] = [value.strip(" '\"")] if value.strip() else []
    said: dict[str, Any] = {"license": next(iter(found.get("license", ())), None)}
    said |= {field: found[field][0] for field in ("license_name", "license_link") if found.get(field)}
    return said | ({"languages": found["language"]} if found.get("language") else {})
