"""Writes no sample: what a run costs without its writer, and dry runs of the machinery around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import Encoded, Format, Settings, describe, describe_objects
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.storage.base import Storage


class NullFormat(Format):
    """See common.Format."""

    name = "null"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        return Encoded({}, {**describe(record), "objects": describe_objects(record)})

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Nothing: the shards' records say it all."""
