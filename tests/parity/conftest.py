"""What the parity tests share: a directory with the corpus, and the golden models' initial weights as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import working_directory
from tests.parity.golden import MODELS, write_initial_checkpoint


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to run in, with `corpus_a` and an empty configuration file."""
    return working_directory(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def initial(workplace: Path) -> dict[str, str]:
    """The checkpoint of each model's initial weights."""
    return {model: write_initial_checkpoint(model, workplace / f"{model}_init") for model in MODELS}
