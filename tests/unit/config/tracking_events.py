"""Reads TensorBoard's event files: records of a length, its checksum, a protocol buffer, its checksum."""

from __future__ import annotations

import struct
from pathlib import Path


def values_by_tag(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every scalar in the folder, by tag, in the order written."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
