"""What a corpus is made of, by content: digests of the files of its sources.

Reading them all takes as long as the disk does, so a file that the operating system has not seen change (size, times
of content and of the entry, inode) since it was last digested is not read again.
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

_BLOCK = 4096  # files that are given to the threads together
_SETTLED_NS = 2_000_000_000  # a file that changed this short before it was read may change again within one tick

Files = Iterable[tuple[str, Path]]


def fingerprints(named: Sequence[tuple[str, Files]], known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A fingerprint of each source.

    Args:
      named: for each source a name, for the progress, and (label, path) of its files in order.
      known: what this function returned before for the same sources, if it did.

    Returns:
      For each source ``files``, ``bytes``, and ``blake2b`` of labels and contents. ``status`` stands for what the
      operating system says of the files; it is empty where a file was changed a moment ago or cannot be read. An
      unreadable file counts by its label; the reader will list it.
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
    """The part of fingerprints that says what the inputs are."""
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
