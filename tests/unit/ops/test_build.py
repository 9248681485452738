"""Building the kernels: once, also when ranks start together; and what happens where they cannot be built."""

from __future__ import annotations

import contextlib
import os
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
from parallel_core.ops import build, reference, selection

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
    code = "import os; from parallel_core.ops import build as b; print(os.readlink(f'/dev/fd/{b._built_library()}'))"
    environment = {"CXX": compiler, "PARALLEL_CORE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**environment, "PATH": "/usr/bin:/bin"}, **pipes) for _ in range(4)]
    results = [rank.communicate(timeout=60) for rank in ranks]
    libraries = {output.strip() for output, _ in results}
    assert len(libraries) == 1 and Path(libraries.pop()).exists(), results
    assert len((tmp_path / "runs").read_text().split()) == sources + 1  # and one run that links
    assert not list((tmp_path / "cache").glob("*.tmp"))


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
    with caplog.at_level("INFO", logger=selection.logger.name):
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


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A compiler that writes a few bytes and counts its runs, and a cache of its own."""
    body = f"""
        for last; do :; done
        if [ "$1" = --version ]; then echo stand-in 1.0; exit 0; fi
        echo run >> {tmp_path}/runs; printf library > "$last"
        """
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    monkeypatch.setenv("PARALLEL_CORE_CACHE", str(tmp_path / "cache"))

    def runs():
        path = tmp_path / "runs"
        return len(path.read_text().split()) if path.exists() else 0

    return tmp_path / "cache", runs


def content_of(descriptor):
    data = Path(f"/proc/self/fd/{descriptor}").read_bytes()
    os.close(descriptor)
    return data


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:-1],
        lambda data: data[:3] + bytes([data[3] ^ 1]) + data[4:],
        lambda data: data[:-3] + b"000",
    ],
)
def test_a_damaged_library_is_made_again(stand_in, caplog, damage):
    cache, runs = stand_in
    good = content_of(build._built_library())
    (library,) = cache.glob("*.so")
    before = runs()
    assert content_of(build._built_library()) == good and runs() == before
    library.write_bytes(damage(good))
    assert content_of(build._built_library()) == good and runs() == 2 * before
    assert "damaged and is made again" in caplog.text
    assert library.read_bytes() == good


def others_may_write(cache):
    cache.chmod(0o777)
    return "others may write it (mode 0777)"


def library_others_may_write(cache):
    next(cache.glob("*.so")).chmod(0o666)
    return "others may write it (mode 0666)"


def library_of_somebody_else(cache):
    os.chown(next(cache.glob("*.so")), 65534, 65534)
    return "it belongs to user 65534"


def folder_of_somebody_else(cache):
    os.chown(cache, 65534, 65534)
    return "it belongs to user 65534"


def folder_behind_a_link(cache):
    cache.rename(cache.with_name("real"))
    cache.symlink_to(cache.with_name("real"))
    return "it is a link"


def library_behind_a_link(cache):
    library = next(cache.glob("*.so"))
    library.rename(library.with_suffix(".elsewhere"))
    library.symlink_to(library.with_suffix(".elsewhere"))
    return "cannot be opened"


def library_is_a_pipe(cache):
    library = next(cache.glob("*.so"))
    library.unlink()
    os.mkfifo(library, 0o700)
    return "it is no plain file"


@pytest.mark.parametrize(
    "prepare",
    [others_may_write, library_others_may_write, library_of_somebody_else, folder_of_somebody_else,
     folder_behind_a_link, library_behind_a_link, library_is_a_pipe],
)  # fmt: skip
def test_a_library_that_may_be_somebody_elses_is_not_loaded(stand_in, prepare):
    cache, _ = stand_in
    os.close(build._built_library())
    if "somebody_else" in prepare.__name__ and os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    reason = prepare(cache)
    with pytest.raises(build.BuildError) as caught:
        build.load()
    assert reason in str(caught.value)


def test_the_usual_folder_is_replaced_where_it_cannot_be_used(stand_in, monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("PARALLEL_CORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "home" / "parallel_core").mkdir(parents=True, mode=0o777)
    (tmp_path / "home" / "parallel_core").chmod(0o777)
    os.close(build._built_library())
    assert list((tmp_path / f"parallel_core-{os.getuid()}").glob("*.so"))
    assert "others may write it" in caplog.text and f"parallel_core-{os.getuid()} instead" in caplog.text


def test_without_locks_or_space_the_kernels_are_built_all_the_same(stand_in, monkeypatch, caplog):
    cache, runs = stand_in

    def no_locks(*_):
        raise OSError(37, "No locks available")

    def no_space(*_, **__):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert content_of(build._built_library()).startswith(b"library")
    assert "No locks available" in caplog.text
    next(cache.glob("*.so")).unlink()
    monkeypatch.setattr("os.replace", no_space)
    assert content_of(build._built_library()) == b"library"
    assert "Disk quota exceeded" in caplog.text and not list(cache.glob("*.so")) and not list(cache.glob("*.tmp"))


def test_a_lock_that_is_never_given_back(stand_in, monkeypatch, caplog):
    import fcntl

    cache, _ = stand_in
    os.close(build._built_library())
    (library,) = cache.glob("*.so")
    library.unlink()
    monkeypatch.setattr(build, "COMPILE_LIMIT_S", 0.3)
    monkeypatch.setattr("parallel_core.ops.cache._TELL_AFTER_S", 0.1)
    with open(f"{library}.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with contextlib.suppress(build.BuildError):  # the limit is the compiler's too
            os.close(build._built_library())
    assert "waiting for the process that holds" in caplog.text and "going on without it" in caplog.text


def test_a_compiler_that_never_ends(monkeypatch, tmp_path):
    body = "if [ \"$1\" = --version ]; then echo 1; exit 0; fi; exec sleep 100"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    monkeypatch.setenv("PARALLEL_CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "COMPILE_LIMIT_S", 0.3)
    with pytest.raises(build.BuildError, match="took longer than 0.3 s"):
        build.load()


def test_a_compiler_that_cannot_run(monkeypatch, tmp_path):
    broken = tmp_path / "cxx"
    broken.write_bytes(b"not a program")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("PARALLEL_CORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="cannot be built here.*Exec format error"):
        build.load()


def test_the_choice_of_the_user(monkeypatch):
    assert "local was asked for" in ops.use_kernels("local")
    monkeypatch.setenv(selection.ENVIRONMENT, "local")
    assert "local was asked for" in ops.use_kernels("auto")
    monkeypatch.setenv(selection.ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match="fast.*write auto or local"):
        ops.use_kernels("auto")
