"""Finding, checking and reading native checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.huggingface.files import is_hugging_face
from parallel_core.checkpoint.layout_files import (
    CHECKSUMS_NAME,
    CONTAINERS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    TRACKER_NAME,
    iteration_dir_name,
    list_iterations,
    os_errors_named,
    sealed_checksums,
)
from parallel_core.checkpoint.megatron.integrity import verify_zips
from parallel_core.checkpoint.mindspore_container import CkptBlob
from parallel_core.checkpoint.safetensors_file import FileDigest, file_digest
from parallel_core.checkpoint.source import Blob, Piece, PieceSource, TensorInfo
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.files import read_regular
from parallel_core.records import Record, parse_json, show

MAX_INDEX_BYTES = 4 << 30
_log = logging.getLogger("parallel_core.checkpoint")


class NativeCheckpoint(PieceSource):
    """A native checkpoint directory as global tensors."""

    def __init__(self, path: str | Path) -> None:
        """Read the index; tensors stay on the disk.

        Args:
            path: an `iter_XXXXXXX` directory.

        Raises:
            CheckpointError: there is no index, or it is not one this version can read.
        """
        path = Path(path)
        index = _read_index(path)
        container = index.text("container")
        if container not in CONTAINERS:
            index.refuse("container", " or ".join(CONTAINERS))
        files = {name: path / name for name in _listed_files(index)}
        for name, file in files.items():
            _require_size(file, index.record("files").record(name).integer("bytes"))
        tensors = {
            key: _tensor(key, spec, files, container, index.record("files"))
            for key, spec in index.record("tensors").items()
        }
        super().__init__(path, "native", tensors, index.values["common"])


def is_native(path: Path) -> bool:
    """Tell whether a directory is a native checkpoint of one iteration, intact or not."""
    return (path / INDEX_NAME).exists() or (path / CHECKSUMS_NAME).exists()


def verify(path: str | Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Return what is wrong with a native checkpoint, one message per damaged file; an empty list when it is intact.

    Every file is read and compared with its size and checksum, by name, so that truncation, flipped bits, missing and
    exchanged files all show.

    Args:
        path: an `iter_XXXXXXX` directory.
        part: which share of the data files to read, when ranks divide the work; the index is checked by all.
        num_parts: number of shares.
    """
    path = Path(path)
    try:
        listed = _read_checksums(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if INDEX_NAME not in listed:
        problems.append(f"{path / CHECKSUMS_NAME} is damaged: it does not list {INDEX_NAME}")
    for i, (name, expected) in enumerate(sorted(listed.items())):
        if name == INDEX_NAME or i % num_parts == part:
            problems += _compare(path / name, expected)
    if any(INDEX_NAME in problem for problem in problems):
        return problems
    try:
        files = _listed_files(_read_index(path))
    except CheckpointError as error:
        return [*problems, str(error)]
    listed.pop(INDEX_NAME)
    if files != listed:
        names = sorted(name for name in {*files, *listed} if files.get(name) != listed.get(name))
        problems.append(f"{path / CHECKSUMS_NAME} is damaged: it and {INDEX_NAME} disagree about {', '.join(names)}")
    return problems


def find_checkpoint(
    root: str | Path,
    step: int | None = None,
    *,
    before: int | None = None,
    check: bool = True,
    report: Callable[[str], None] = _log.warning,
    allow_inert: Iterable[str] = (),
) -> Path:
    """Return the directory of the checkpoint to load.

    The tracker file says which; when that one is missing or damaged the newest intact one is taken, and `report` is
    told. Rank 0 calls this and tells the others, so that all load the same one and the files are checked once.

    Args:
        root: what `--load` names: a directory of checkpoints, or one checkpoint's own directory.
        step: `--ckpt-step`: exactly this iteration, with no other in its place.
        before: the newest intact one of an iteration below this, whatever the tracker says.
        check: compare every file with its checksum (`resume_crc_check`).
        report: told, in one sentence, whenever the result is not simply what the tracker says.
        allow_inert: further class names that a Megatron pickle may mention.

    Raises:
        CheckpointError: there is no such directory, it holds no checkpoint, the asked step is absent or damaged, or
            none is intact.
    """
    with os_errors_named(Path(root)):
        problems = partial(_problems, check=check, allow_inert=tuple(allow_inert))
        return _find(Path(root), step, problems, report, before)


def _find(
    root: Path,
    step: int | None,
    problems_of: Callable[[Path], list[str]],
    report: Callable[[str], None],
    before: int | None = None,
) -> Path:
    if not root.is_dir():
        what = "is a file; give the directory that it is in" if root.exists() else "there is no such directory"
        raise CheckpointError(f"--load {root}: {what}")
    if is_checkpoint_dir(root):
        _require_intact(root, problems_of)
        return root
    iterations = list_iterations(root)
    if step is not None:
        if step not in iterations:
            name = iteration_dir_name(step)
            raise CheckpointError(f"--load {root} --ckpt-step {step}: no {name}; {_have(iterations)}")
        _require_intact(iterations[step], problems_of)
        return iterations[step]
    if before is None:
        tracked, note = _read_tracker(root, iterations)
    else:
        iterations = {iteration: path for iteration, path in iterations.items() if iteration < before}
        tracked, note = None, ""
    if tracked == "release":
        _require_intact(root / "release", problems_of)
        return root / "release"
    first = [tracked] if isinstance(tracked, int) else []
    newest = sorted(iterations, reverse=True)
    # Iterations above the tracked one come last: they are of a branch the user went back from.
    rest = [i for i in newest if not first or i < first[0]] + [i for i in newest if first and i > first[0]]
    notes = [note] if note else []
    for iteration in first + rest:
        problems = problems_of(iterations[iteration])
        if not problems:
            if notes:
                report(f"--load {root}: " + "; ".join(notes) + f". Loading {iterations[iteration].name} instead.")
            return iterations[iteration]
        notes.append(f"{iterations[iteration].name} is damaged ({problems[0]})")
    if not iterations:
        raise CheckpointError(f"--load {root}: {note or 'no checkpoint'}; there is no iter_XXXXXXX directory in it")
    raise CheckpointError(f"--load {root}: no checkpoint is intact:\n{bullet_list(notes)}")


def holds_checkpoint(root: str | Path) -> bool:
    """Tell whether there is a checkpoint under `root`, or anything that may be meant as one: then it is to be loaded.

    What a run writes before its first checkpoint (its configuration, logs, an unfinished save) is none.

    Raises:
        CheckpointError: the directory may not be read.
    """
    root = Path(root)
    with os_errors_named(root):
        if not root.is_dir():
            return root.exists()  # a file is meant as one, and refused where it is opened
        meant = (root / TRACKER_NAME).exists() or (root / "release").exists() or bool(list_iterations(root))
        return meant or is_checkpoint_dir(root) or any(path.suffix in _WEIGHT_SUFFIXES for path in root.iterdir())


_WEIGHT_SUFFIXES = (".bin", ".ckpt", ".distcp", ".npz", ".pt", ".pth", ".safetensors")
"""Files that are somebody's weights, whether or not they can be read here."""


def is_checkpoint_dir(path: Path) -> bool:
    """Tell whether `path` is one checkpoint's own directory, of any format this project reads."""
    return (
        is_native(path)
        or _is_megatron(path)
        or (path / "metadata.json").exists()
        or is_hugging_face(path)
        or any(path.glob("*.safetensors"))
        or any(path.glob("*.ckpt"))
        or any(path.glob("rank_*/*.ckpt"))
    )


def _have(iterations: dict[int, Path]) -> str:
    return "it holds " + (", ".join(path.name for _, path in sorted(iterations.items())) or "no checkpoint")


def _read_tracker(root: Path, iterations: dict[int, Path]) -> tuple[int | str | None, str]:
    """Return the tracked iteration (or "release", or None) and, when it is of no use, why."""
    tracker = root / TRACKER_NAME
    if not tracker.exists():
        return None, f"{TRACKER_NAME} is missing"
    try:
        text = read_regular(tracker, 1000).decode("utf-8", "replace").strip()
    except OSError as error:
        return None, f"{TRACKER_NAME} cannot be read ({error.strerror})"
    if text == "release" and (root / "release").is_dir():
        return "release", ""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        return None, f"{TRACKER_NAME} holds {show(text)}, not an iteration"
    if int(text) not in iterations:
        return None, f"{TRACKER_NAME} says {text}, but there is no {iteration_dir_name(int(text))}"
    return int(text), ""


def _problems(path: Path, check: bool, allow_inert: tuple[str, ...]) -> list[str]:
    if _is_megatron(path):
        return verify_zips(path, allow_inert) if check else []
    if check:
        return verify(path)
    return [] if (path / INDEX_NAME).exists() else [f"{path / INDEX_NAME} is missing"]


def _is_megatron(path: Path) -> bool:
    return (path / ".metadata").exists() or any(path.glob("mp_rank_*"))


def require_intact(path: Path, allow_inert: Iterable[str] = ()) -> None:
    """Compare every file of a checkpoint with its checksum; formats without checksums have none to compare.

    Raises:
        CheckpointError: with what is damaged.
    """
    with os_errors_named(path):
        _require_intact(path, partial(_problems, check=True, allow_inert=tuple(allow_inert)))


def _require_intact(path: Path, problems_of: Callable[[Path], list[str]]) -> None:
    checked = is_native(path) or _is_megatron(path) or path.name.startswith("iter_")
    problems = problems_of(path) if checked else []
    if problems:
        raise CheckpointError(f"{path} is damaged:\n{bullet_list(problems)}")


def _read_index(path: Path) -> Record:
    file = path / INDEX_NAME
    try:
        data = read_regular(file, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is no directory") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    index = Record(parse_json(data, str(file), CheckpointError), str(file), CheckpointError)
    if index.text("format") != FORMAT_NAME:
        index.refuse("format", FORMAT_NAME)
    if index.integer("format_version") != FORMAT_VERSION:
        version = index.integer("format_version")
        raise CheckpointError(f"{file} has format version {version}; this release reads version {FORMAT_VERSION}")
    index.record("common")
    return index


def _listed_files(index: Record) -> dict[str, FileDigest]:
    """Return the data files that an index lists, by name."""
    return {
        _plain_name(index.where, name): FileDigest(spec.integer("bytes"), spec.text("crc32"))
        for name, spec in index.record("files").items()
    }


def _require_size(file: Path, expected: int) -> None:
    # A tensor's memory is reserved before its bytes are read, so that no index may promise more than there is.
    try:
        size = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file} is missing or unreadable ({error.strerror})") from None
    if size != expected:
        raise CheckpointError(f"{file} has {size} bytes, {expected} were written")


def _plain_name(index: str, name: str) -> str:
    if not name or Path(name).name != name or name in (".", "..") or not name.isprintable():
        raise CheckpointError(f"{index} names a file outside its directory: {show(name)}")
    return name


def _tensor(
    key: str, spec: Record, files: Mapping[str, Path], container: str, sizes: Record
) -> tuple[TensorInfo, list[Piece]]:
    info = TensorInfo(spec.integers("shape"), spec.text("dtype"))
    itemsize = storage_dtype(info.dtype).itemsize
    pieces = []
    for piece in spec.records("pieces"):
        start, shape, name = piece.integers("start"), piece.integers("shape"), piece.text("file")
        if name not in files:
            raise CheckpointError(f"{piece.where} is damaged: it is in {name}, which is not among the listed files")
        offset = 0 if container == "ckpt" else piece.integer("offset")
        if offset + math.prod(shape) * itemsize > sizes.record(name).integer("bytes"):
            raise CheckpointError(f"{piece.where} is damaged: shape {list(shape)} at byte {offset} leaves {name}")
        blob: Any
        if container == "ckpt":
            blob = CkptBlob(files[name], piece.text("entry"), info.dtype, shape, tuple((0, n) for n in shape))
        else:
            blob = Blob.contiguous(files[name], offset, info.dtype, shape)
        pieces.append(Piece(start, shape, blob))
    return info, pieces


def _read_checksums(path: Path) -> dict[str, FileDigest]:
    file = path / CHECKSUMS_NAME
    try:
        text = read_regular(file, MAX_INDEX_BYTES).decode("ascii")
        lines = text.split("\n")[:-2]
        if not lines or text != sealed_checksums(lines):
            raise ValueError("its own checksum does not match")
        listed = {}
        for line in lines:
            crc, size, name = line.split(" ", 2)
            if _plain_name(str(file), name) in listed:
                raise ValueError(f"{name} is there twice")
            if not (size.isdigit() and len(size) < 20):
                raise ValueError(f"{show(size)} is no size")
            listed[name] = FileDigest(int(size), crc)
    except OSError as error:
        raise CheckpointError(f"{file} is missing or unreadable ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return listed


def _compare(file: Path, expected: FileDigest) -> list[str]:
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            return [f"{file} has {size} bytes, {expected.bytes} were written"]
        found = file_digest(file)
    except OSError as error:
        return [f"{file} is missing or unreadable ({error.strerror})"]
    return [] if found == expected else [f"{file} has checksum {found.crc32}, {expected.crc32} was written"]
