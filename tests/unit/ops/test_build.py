"""Building the kernels: once, also when ranks start together; and what happens where they cannot be built."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.errors import ConfigError
from parallel_core.ops import build, reference, select

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def restore():
    yield
    ops.use_kernels("local")


def fake_compiler(folder: Path, body: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_ranks_that_start_together_compile_once(tmp_path, monkeypatch):
    """The stand-in compiler counts its runs and writes any file; loading it is not part of this test."""
    sources = len(build.sources())
    compiler = fake_compiler(
        tmp_path,
        f"""
        for last; do :; done
        if [ "$1" = --version ]; then echo stand-in 1.0; exit 0; fi
        echo run >> {tmp_path}/runs
        sleep 0.2
        touch "$last"
        """,
    )
    code = "from parallel_core.ops import build; print(build._built_library())"
    environment = {"CXX": compiler, "PARALLEL_CORE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**environment, "PATH": "/usr/bin:/bin"}, **pipes) for _ in range(4)]
    results = [rank.communicate(timeout=60) for rank in ranks]
    libraries = {output.strip() for output, _ in results}
    assert len(libraries) == 1 and Path(libraries.pop()).exists(), results
    assert len((tmp_path / "runs").read_text().split()) == sources + 1  # and one run that links
    assert not list((tmp_path / "cache").glob("tmp*"))


def test_the_cache_key_follows_sources_and_compiler(monkeypatch, tmp_path):
    first = fake_compiler(tmp_path, "echo version 1")
    before = build._fingerprint(first)
    assert build._fingerprint(first) == before
    fake_compiler(tmp_path, "echo version 2")
    assert build._fingerprint(first) != before


def unloaded(monkeypatch):
    from parallel_core.ops import library

    monkeypatch.setattr(library, "_loaded", None)


def test_without_a_compiler_the_reference_runs_and_the_reason_is_given(monkeypatch, tmp_path, caplog):
    unloaded(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level("INFO", logger=select.logger.name):
        sentence = ops.use_kernels("auto")
    assert sentence == "plain MindSpore operators (no C++ compiler (g++, c++ or clang++) is installed)"
    assert [record.message for record in caplog.records] == [f"kernels: {sentence}"]
    x = Tensor(np.ones((2, 4), np.float32))
    assert (ops.linear_grad_bias(x).asnumpy() == reference.linear_grad_bias(x).asnumpy()).all()


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    unloaded(monkeypatch)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'x.cpp:1: error: no such flag' >&2; exit 1"))
    monkeypatch.setenv("PARALLEL_CORE_CACHE", str(tmp_path / "cache"))
    sentence = ops.use_kernels("auto")
    assert sentence.startswith("plain MindSpore operators (") and "error: no such flag" in sentence
    assert not list((tmp_path / "cache").glob("*.so"))


def test_the_choice_of_the_user(monkeypatch):
    assert "local was asked for" in ops.use_kernels("local")
    monkeypatch.setenv(select.ENVIRONMENT, "local")
    assert "local was asked for" in ops.use_kernels("auto")
    monkeypatch.setenv(select.ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match="fast.*write auto or local"):
        ops.use_kernels("auto")


def test_every_fused_kernel_has_a_reference_of_the_same_signature():
    import inspect

    from parallel_core.ops import fused, fused_attention, raw

    groups = ((raw, select._RAW), (fused, select._FUSED), (fused_attention, select._ATTENTION))
    for module, names in groups:
        for name in names:
            want, got = (list(inspect.signature(getattr(m, name)).parameters) for m in (reference, module))
            assert got == want, name
            assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__
