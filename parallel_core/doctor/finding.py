"""What a check finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GOOD, NOTE, BAD = "ok", "note", "FAIL"
"""Fine; works, but could be better or is worth knowing; a run will not work, or not well."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        what: the thing that was looked at.
        state: GOOD, NOTE or BAD.
        found: what there is.
        advice: what to do; empty where there is nothing to do.
    """

    what: str
    state: str
    found: str
    advice: str = ""

    def text(self, width: int) -> str:
        """Return the finding as lines, the names padded to `width`."""
        line = f"{self.state:4}  {self.what:{width}}  {self.found}"
        return f"{line}\n{'':{width + 6}}  -> {self.advice}" if self.advice else line

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON can hold it."""
        return asdict(self)
