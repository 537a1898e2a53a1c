"""Selects the fields of a row that a source keeps as the metadata of a document."""

import datetime
import decimal
import math
from collections.abc import Collection, Iterable
from typing import Any

from efftrain.data.documents import GROUP, OLD_GROUP

MAX_CHARS = 2000
"""Longer strings are regarded as text and not kept as metadata."""

RESERVED = (GROUP, OLD_GROUP)
"""Keys of ``Document.meta`` that name the group of a document. Fields of these names are not copied to it."""


def metadata(fields: Iterable[tuple[str, Any]], used: Collection[str | None], group: Any = None) -> dict[str, Any]:
    """Returns the ``meta`` of a document: the scalar fields of its row as JSON values, and its group.

    Strings of up to 2,000 characters, finite numbers and booleans are kept; dates and times become ISO 8601 strings,
    and decimal numbers become strings. Dropped are null, lists, objects, bytes, the fields in ``used`` and fields
    named "group" or "package", which would otherwise determine the split of the document; configure one as the group
    field if that is intended.

    Args:
      fields: (name, value) of each field of the row.
      used: the names of the fields that contain text, id and group.
      group: the value of the group field; null or empty means that the document is a group of its own.
    """
    meta = {}
    for name, value in fields:
        if name in RESERVED or name in used or (value := _json_value(value)) is None:
            continue
        meta[name] = value
    if (group := as_name(group)) is not None:
        meta[GROUP] = group
    return meta


def as_name(value: Any) -> str | None:
    """Returns an id or the name of a group as a string; None if the value is null, empty or NaN."""
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
