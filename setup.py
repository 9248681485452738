"""Adds to a built package what a checkout has beside it: training programs, configurations, the bundled text."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHARED = ("pretrain_*.py", "configs/*.yaml", "data/corpus.jsonl", "data/tokenizer.model", "data/*.txt", "data/*.md")
"""What `parallel_core.bundled` finds in `parallel_core/share` of an installed package, by its name in the checkout."""


class BuildWithSharedFiles(build_py):
    """Copies the shared files; an editable install finds them in the checkout."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:
            return
        root, share = Path(__file__).resolve().parent, Path(self.build_lib) / "parallel_core" / "share"
        shutil.rmtree(share, ignore_errors=True)
        for pattern in SHARED:
            for source in sorted(root.glob(pattern)):
                target = share / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithSharedFiles})
