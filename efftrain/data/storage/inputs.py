"""Computes fingerprints of the sources of a corpus: digests of the contents of their files.

Reading all files takes time, so that a source is not read again if the operating system reports no change of its files
since their digest was computed (size, modification time, change time, inode).
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from efftrain.data.storage.shards import file_digest
from efftrain.progress import Progress

_BLOCK = 4096  # number of files that are submitted to the threads together
_SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again without a new time stamp

Files = Iterable[tuple[str, Path]]


def fingerprints(named: Sequence[tuple[str, Files]], known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Computes the fingerprint of each source.

    Args:
      named: for each source a name, which is shown as progress, and (label, path) of its files in order.
      known: earlier results of this function for the same sources, which are reused if the files have not changed.

    Returns:
      For each source the number of ``files`` and ``bytes``, and ``blake2b`` of labels and contents. ``status`` is a
      digest of the properties that the operating system reports for the files; it is empty if a file has changed very
      recently or cannot be read. An unreadable file contributes only its label; it is reported when it is read.
    """
    result = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, (name, files) in enumerate(named):
            listed = list(files)
            status = _status(listed)
            before = known[number] if number < len(known) else {}
            if status and status == before.get("status"):
                result.append(dict(before))
            else:
                result.append(_fingerprint(pool, name, listed) | {"status": status})
    return result


def without_status(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns fingerprints without ``status``, which does not describe the contents of the inputs."""
    return [{key: value for key, value in item.items() if key != "status"} for item in inputs]


def _fingerprint(pool: ThreadPoolExecutor, name: str, files: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    state = hashlib.blake2b(digest_size=16)
    n_bytes = 0
    with Progress(f"Reading inputs of {name}", len(files), unit="files") as progress:
        remaining: Iterator[tuple[str, Path]] = iter(files)
        while block := list(islice(remaining, _BLOCK)):
            for (label, _), (size, digest) in zip(block, pool.map(_digest, (p for _, p in block)), strict=True):
                state.update(f"{label}\0{digest}\n".encode(errors="surrogateescape"))
                n_bytes += size
                progress.advance(1)
    return {"files": len(files), "bytes": n_bytes, "blake2b": state.hexdigest()}


def _digest(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, file_digest(path)
    except OSError:
        return 0, "unreadable"


def _status(files: Sequence[tuple[str, Path]]) -> str:
    state = hashlib.blake2b(digest_size=16)
    settled = time.time_ns() - _SETTLED_NS
    for label, path in files:
        try:
            found = path.stat()
        except OSError:
            return ""
        if max(found.st_mtime_ns, found.st_ctime_ns) > settled or not os.access(path, os.R_OK):
            return ""
        facts = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
        state.update(f"{label}\0{facts}\n".encode(errors="surrogateescape"))
    return state.hexdigest()
