from __future__ import annotations

import numpy as np
import pytest

from tests.unit.data.helpers import numbered_documents, write_pair


@pytest.fixture
def pair(tmp_path):
    """A pair of 40 documents with 1 to 30 tokens, all different."""
    lengths = np.random.default_rng(3).integers(1, 31, 40)
    return write_pair(tmp_path / "numbered", numbered_documents(lengths))
