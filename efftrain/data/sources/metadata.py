"""Selects the fields of a row that a source keeps as the metadata of a document."""

import datetime
import decimal
import math
from collections.abc import Collection, Iterable
from typing import Any

MAX_CHARS = 2000
"""Longer strings are regarded as text and not kept as metadata."""

PACKAGE = "package"
"""The key of ``Document.meta`` that names the group of a document. A field of this name is not copied to it."""


def metadata(fields: Iterable[tuple[str, Any]], used: Collection[str | None], package: Any = None) -> dict[str, Any]:
    """Returns the ``meta`` of a document: the scalar fields of its row as JSON values, and its package.

    Strings of up to 2,000 characters, finite numbers and booleans are kept; dates and times become ISO 8601 strings,
    and decimal numbers become strings. Dropped are null, lists, objects, bytes, the fields in ``used`` and a field
    named "package", which would otherwise determine the split of the document; configure it as the package field if
    that is intended.

    Args:
      fields: (name, value) of each field of the row.
      used: the names of the fields that contain text, id and package.
      package: the value of the package field; null or empty means that the document has no package.
    """
    meta = {}
    for name, value in fields:
        if name == PACKAGE or name in used or (value := _json_value(value)) is None:
            continue
        meta[name] = value
    if (group := as_name(package)) is not None:
        meta[PACKAGE] = group
    return meta


def as_name(value: Any) -> str | None:
    """Returns an id or a package as a string; None if the value is null, empty or NaN."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else str(value)


def _json_value(value: Any) -> str | int | float | bool | None:
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARS else None
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else None
