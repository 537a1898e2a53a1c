"""Manages the folder of a corpus: it is built under another name, renamed when complete, and checked when opened.

DIR/manifest.json     inputs, parameters, code and library versions, funnel, size and checksum of every file
DIR/text/             TFDS dataset of the documents (text, id, source, meta), in shuffled order
DIR/tokens/           TFDS dataset of fixed-size blocks: the same documents as one stream of tokens
DIR/tokenizer.json    byte-level BPE, or the tokenizer that was configured
DIR/token_bytes-*.npy bytes of text per token in a split, if the tokenizer is not byte-level
DIR/scores.parquet    every document that was read, with the score of each rule
DIR/removed.parquet   every document that was removed: rule, score, survivor, excerpt
"""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import efftrain
from efftrain.code_identity import changed_code
from efftrain.config import difference, finite_json
from efftrain.data.storage.inputs import without_status
from efftrain.data.storage.shards import file_digest, sync
from efftrain.errors import CorpusError
from efftrain.lock import Lock, beside
from efftrain.progress import console

FORMAT = 1
MANIFEST = "manifest.json"
_OWN = ("pid", "plan.json", "inputs.json")  # files of an unfinished folder; earlier versions wrote pid
_LIBRARIES = ("tensorflow-datasets", "array-record", "tokenizers", "pyarrow", "numpy")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the ``manifest.json`` of a corpus.

    Raises:
      CorpusError: the folder is missing, unfinished or not a corpus, or has another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.exists():
            unfinished = unfinished_path(folder)
            found = f" (a build was interrupted: {unfinished})" if unfinished.exists() else ""
            raise CorpusError(
                f"there is no corpus {folder}{found}; build one, for example: python data/python.py --out {folder}"
            )
        raise CorpusError(f"{folder} is not a corpus (it has no {MANIFEST}); choose another folder")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise CorpusError(
                f"{folder} has corpus format {manifest['format']}, but this version reads format {FORMAT}; build it "
                "again"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} is damaged ({error!r}); build the corpus again") from error
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], *, contents: bool, hint: str | None = None) -> None:
    """Compares every file with the manifest: its size and, with ``contents``, its checksum.

    Args:
      folder: the folder of the files.
      manifest: the content of ``manifest.json``.
      contents: compare checksums, which reads all files.
      hint: the end of an error message, which says what to do. None: to build the corpus again.

    Raises:
      CorpusError: a file is missing, truncated, altered or replaced; the message names the file.
    """
    hint = hint or rebuild_hint(folder)
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorpusError(f"{path} is missing; {hint}")
        if (size := path.stat().st_size) != recorded["bytes"]:
            raise CorpusError(f"{path} has {size:,} bytes, but its manifest records {recorded['bytes']:,}; {hint}")
    if not contents:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(file_digest, [folder / name for name in manifest["files"]])
        for (name, recorded), digest in zip(manifest["files"].items(), found, strict=True):
            if digest != recorded["blake2b"]:
                raise CorpusError(
                    f"{folder / name} has another checksum than its manifest (expected {recorded['blake2b'][:8]}.., "
                    f"found {digest[:8]}..); {hint}"
                )


def rebuild_hint(folder: Path) -> str:
    return f"build it again with --overwrite, for example: python data/python.py --out {folder} --overwrite"


def is_built(out: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Returns whether ``out`` already contains the wanted corpus.

    Args:
      out: the folder of the corpus.
      wanted: the parts of the manifest that must agree: ``parameters``, ``inputs`` and ``code``.
      overwrite: return False for an existing corpus, so that it is built again.

    Returns:
      True if ``out`` contains the wanted corpus; False if it is missing, empty or may be overwritten.

    Raises:
      CorpusError: ``out`` contains something else. Nothing is changed.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise CorpusError(f"{out} exists but is not a corpus; choose another folder")
    if overwrite:
        return False
    manifest = read_manifest(out)
    found: dict[str, Any] = manifest | {"inputs": without_status(manifest["inputs"])}
    changed = [line for key in wanted if key != "code" for line in difference(found.get(key), wanted[key], key)]
    if names := changed_code(found.get("code"), wanted["code"]):
        changed.append(f"the code of {names} has changed")
    if changed:
        shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise CorpusError(
            f"{out} was built from other inputs, parameters or code ({shown}); choose another folder, delete this one, "
            "or replace it with overwrite=True (--overwrite of scripts under data/)"
        )
    return True


def known_inputs(out: Path) -> list[dict[str, Any]]:
    """Returns the result of ``inputs.fingerprints`` for an interrupted build of ``out``, or for the existing corpus."""
    for path in (unfinished_path(out) / "inputs.json", out / MANIFEST):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # without it, all files are read again
            content = json.loads(path.read_text())
            return content["inputs"]
    return []


@contextlib.contextmanager
def building(out: Path, plan: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]] = ()) -> Generator[Path]:
    """Context manager that yields ``out.incomplete`` to build in, and renames it to ``out`` at the end of the block.

    The folder is empty, or that of an interrupted build with the same plan and the same versions of Python and
    libraries. If the block raises, it is kept for the next attempt.

    Args:
      out: the folder of the corpus.
      plan: JSON values that identify the build.
      inputs: fingerprints that are stored in the folder for ``known_inputs``.

    Raises:
      InUseError: another process is building this corpus.
      CorpusError: the disk is full, or the folder cannot be written.
    """
    folder = unfinished_path(out)
    try:
        with _lock(out):
            _begin(folder, plan)
            if inputs:
                (folder / "inputs.json").write_text(json.dumps({"inputs": inputs}))
            yield folder
            for path in folder.rglob("*"):
                sync(path)
            for name in _OWN:
                (folder / name).unlink(missing_ok=True)
            _replace(folder, out)
    except Exception as error:
        # The writers in C++ and Rust raise their own errors, which have only a message.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise CorpusError(
                f"the disk of {out} is full; free space or choose another folder (the unfinished {folder} can be "
                "deleted)"
            ) from error
        raise


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``manifest.json``: the content, the format, versions, and the checksum of every file in the folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (*_OWN, MANIFEST))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": file_digest(path)}
        for path in paths
    }
    manifest = {"format": FORMAT, **content, "environment": _environment(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(finite_json(manifest), indent=1, allow_nan=False) + "\n")
    return manifest


def unfinished_path(out: Path) -> Path:
    return out.with_name(out.name + ".incomplete")


def _lock(out: Path) -> Lock:
    try:
        return Lock(beside(out), out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise CorpusError(f"cannot write {out} ({error.strerror}); choose another folder") from error


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    """Creates the folder, or keeps that of an interrupted build with the same plan."""
    content = json.dumps({**plan, "environment": _environment() | {"commit": None}}, sort_keys=True)
    if folder.exists():
        same = (folder / "plan.json").is_file() and (folder / "plan.json").read_text() == content
        what = "continuing it" if same else "starting again, because inputs, parameters or code have changed"
        console.print(f"{folder} is left from an interrupted build; {what}", markup=False)
        if same:
            return
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise CorpusError(f"cannot write {folder} ({error.strerror}); choose another folder") from error
    (folder / "plan.json").write_text(content)


def _replace(folder: Path, out: Path) -> None:
    old = out.with_name(out.name + ".replaced")
    if (out / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif out.is_dir():
        out.rmdir()
    folder.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _environment() -> dict[str, Any]:
    root = Path(efftrain.__file__).parent.parent
    commit = None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40"],
                cwd=root,
                capture_output=True,
                text=True,
                timeout=20,
            ).stdout.strip()
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
