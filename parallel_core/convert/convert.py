"""The conversions: any format to native, and native (or any) to Megatron's two formats."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np

from parallel_core.checkpoint import CheckpointWriter, open_checkpoint, read_tensor, share_among_replicas
from parallel_core.checkpoint.claim import claimed
from parallel_core.checkpoint.huggingface import write_hugging_face
from parallel_core.checkpoint.layout_files import (
    TRACKER_NAME,
    fsync_directory,
    iteration_dir_name,
    remove_leftovers,
    write_durably,
)
from parallel_core.checkpoint.lora import MergedAdapter
from parallel_core.checkpoint.megatron.dist_writer import Record, dist_items, write_dist_metadata, write_distcp
from parallel_core.checkpoint.megatron.export import Export, Target
from parallel_core.checkpoint.megatron.torch_writer import write_torch_rank
from parallel_core.checkpoint.mindspore import write_mindformers, write_pangu
from parallel_core.checkpoint.peft import write_peft
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.checkpoint.source import TensorSource
from parallel_core.convert.progress import ProgressBar, run_jobs
from parallel_core.errors import CheckpointError

Progress = Callable[[int], None]
Opener = Callable[[], TensorSource]
_TOKEN = "convert"


def to_native(
    source: TensorSource,
    save: Path,
    *,
    processes: int = 1,
    with_optimizer: bool = True,
    quiet: bool = False,
    allow_inert: tuple[str, ...] = (),
) -> Path:
    """Write a checkpoint in the native format and return its directory.

    Args:
        source: the opened checkpoint.
        save: directory of checkpoints to write into.
        processes: how many processes write; each writes one file.
        with_optimizer: whether to convert optimizer state.
        quiet: no progress bar.
        allow_inert: class names the source was opened with; worker processes open it again.

    Raises:
        CheckpointError: the iteration is there already, or something cannot be read.
    """
    sizes = {key: _nbytes(source, key) for key in source.keys() if with_optimizer or "@" not in key}  # noqa: SIM118
    iteration = int(source.common.get("iteration", 0))
    _refuse_existing(save / iteration_dir_name(iteration))
    writer = CheckpointWriter(save, iteration, 0, processes, token=_TOKEN)
    bar = ProgressBar(sum(sizes.values()), quiet=quiet)
    with _held(save):
        writer.begin()
        try:
            shares = [share_among_replicas(sizes, rank, processes) for rank in range(processes)]
            again = _opener(source, allow_inert)
            jobs = [(again, save, iteration, r, processes, keys) for r, keys in enumerate(shares)]
            manifests = run_jobs(_write_native, jobs, processes, bar)
            bar.finish()
            return writer.commit(manifests, source.common)
        except BaseException:
            writer.abandon()
            raise


def _opener(source: TensorSource, allow_inert: tuple[str, ...]) -> Opener:
    """Return what opens a source again, in a process of its own."""
    base = str(source.base.path) if isinstance(source, MergedAdapter) else ""
    return partial(open_checkpoint, source.path, allow_inert, base)


def _held(save: Path) -> AbstractContextManager[None]:
    """Hold the directory: a run that saves there removes what is unfinished, and so does this."""
    return claimed(save, partial(print, file=sys.stderr))


def _write_native(
    opened: Opener,
    save: Path,
    iteration: int,
    rank: int,
    world_size: int,
    keys: list[str],
    progress: Progress,
) -> dict[str, object]:
    source = opened()
    writer = CheckpointWriter(save, iteration, rank, world_size, token=_TOKEN)
    return writer.write_stream({key: _whole(source, key, progress) for key in keys})


def _whole(source: TensorSource, key: str, progress: Progress) -> StreamTensor:
    info = source.info(key)

    def parts() -> Iterator[np.ndarray]:
        array = read_tensor(source, key)
        yield array
        progress(array.nbytes)

    return StreamTensor(info.shape, info.dtype, parts)


def to_megatron(
    source: TensorSource,
    save: Path,
    target: Target,
    *,
    target_format: str = "torch",
    processes: int = 1,
    quiet: bool = False,
    allow_inert: tuple[str, ...] = (),
) -> Path:
    """Write a Megatron checkpoint and return its directory.

    Args:
        source: the opened checkpoint.
        save: directory of checkpoints to write into.
        target: layout of the run that will load it.
        target_format: "torch" or "torch_dist".
        processes: how many processes write.
        quiet: no progress bar.
        allow_inert: class names the source was opened with; worker processes open it again.

    Raises:
        CheckpointError: the iteration is there already, or the model does not fit the format or the layout.
    """
    export = Export(source, target, whole=target_format == "torch_dist")
    final = save / iteration_dir_name(int(source.common.get("iteration", 0)))
    _refuse_existing(final)
    with _held(save):
        remove_leftovers(save)
        unfinished = final.with_name(f"{final.name}.tmp-{_TOKEN}")
        bar = ProgressBar(
            sum(_nbytes(source, f"{n}@{k}" if k and k != "master" else n) for n, k in dist_items(export)), quiet=quiet
        )
        try:
            unfinished.mkdir(parents=True)
            again = _opener(source, allow_inert)
            if target_format == "torch":
                ranks = [(tp, pp, ep) for pp in range(export.pp) for tp, ep in export.files]
                shares = [(again, target, unfinished, *rank) for rank in ranks]
                run_jobs(_write_torch, shares, processes, bar)
            else:
                jobs = [(again, target, unfinished, part, processes) for part in range(processes)]
                records = [record for found in run_jobs(_write_dist, jobs, processes, bar) for record in found]
                write_dist_metadata(unfinished, export, records)
            bar.finish()
            fsync_directory(unfinished)
            os.replace(unfinished, final)
            write_durably(save / TRACKER_NAME, str(int(source.common.get("iteration", 0))))
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(f"{final} could not be written: {error}") from None
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return final


def _write_torch(
    opened: Opener,
    target: Target,
    partial: Path,
    tp: int,
    pp: int,
    ep: int,
    progress: Progress,
) -> None:
    write_torch_rank(partial, Export(opened(), target), tp, pp, ep, progress)


def _write_dist(
    opened: Opener, target: Target, partial: Path, part: int, parts: int, progress: Progress
) -> list[Record]:
    export = Export(opened(), target, whole=True)
    items = dist_items(export)
    sizes = {f"{name}@{kind}": export.tensor(name, 0, kind).nbytes for name, kind in items}
    mine = set(share_among_replicas(sizes, part, parts))
    return write_distcp(partial, export, [i for i in items if f"{i[0]}@{i[1]}" in mine], part, progress)


def to_hugging_face(source: TensorSource, save: Path, *, quiet: bool = False) -> Path:
    """Write the parameters as a Hugging Face directory and return it.

    What the reader of the directory should know, such as tokenizer files that are not there, goes to the console.

    Args:
        source: the opened checkpoint.
        save: the directory; it must not exist.
        quiet: no progress bar.

    Raises:
        CheckpointError: the directory exists already, or the model is of no kind that Hugging Face format is known for.
    """
    return _to_directory(source, save, write_hugging_face, quiet)


def to_mindspore(source: TensorSource, save: Path, *, quiet: bool = False) -> Path:
    """Write the parameters as MindFormers keeps them, one merged file and what model it is, and return the directory.

    PanGu-alpha has the names of its published models.

    Args:
        source: the opened checkpoint.
        save: the directory; it must not exist.
        quiet: no progress bar.

    Raises:
        CheckpointError: the directory exists already, or the model is another one than such files hold.
    """
    settings = source.common.get("model_config")
    has_query_layer = isinstance(settings, dict) and settings.get("top_query_layer", "none") != "none"
    return _to_directory(source, save, write_pangu if has_query_layer else write_mindformers, quiet)


def _to_directory(
    source: TensorSource, save: Path, write: Callable[[TensorSource, Path, Progress], list[str]], quiet: bool
) -> Path:
    _refuse_existing(save)
    # Named after the process: another one that writes the same directory loses at `os.replace`, not its files.
    partial = save.with_name(f"{save.name}.tmp-{_TOKEN}-{os.getpid()}")
    bar = ProgressBar(sum(_nbytes(source, key) for key in source.keys() if "@" not in key), quiet=quiet)  # noqa: SIM118
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        notes = write(source, partial, bar.add)
        bar.finish()
        os.replace(partial, save)
    except OSError as error:
        raise CheckpointError(f"{save} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for note in notes:
        print(note, file=sys.stderr)
    return save


def to_peft(source: TensorSource, save: Path) -> Path:
    """Write adapters as a PEFT directory and return it.

    Args:
        source: the opened adapters, merged with their base model.
        save: the directory; it must not exist.

    Raises:
        CheckpointError: the directory exists already, it is no checkpoint of adapters, or its model is of no kind that
            Hugging Face format is known for.
    """
    if not isinstance(source, MergedAdapter):
        raise CheckpointError(f"{source.path} holds a model, no adapters; --to hf writes models")
    _refuse_existing(save)
    partial = save.with_name(f"{save.name}.tmp-{_TOKEN}-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_peft(source, partial)
        os.replace(partial, save)
    except OSError as error:
        raise CheckpointError(f"{save} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return save


def _nbytes(source: TensorSource, key: str) -> int:
    info = source.info(key)
    return StreamTensor(info.shape, info.dtype, tuple).nbytes


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise CheckpointError(f"{final} exists already; --save another directory, or remove it")
