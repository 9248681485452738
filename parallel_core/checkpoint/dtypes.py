"""Dtype tags, and exact conversion between them, without needing a NumPy that knows bfloat16.

A tag is the dtype's usual name ("float32", "bfloat16", ...). A bfloat16 array is held as its raw bits in a `uint16`
array wherever NumPy has no bfloat16 of its own; the tag beside it says what the bits mean.
"""

from __future__ import annotations

import numpy as np

from parallel_core.errors import CheckpointError

# tag -> (the NumPy dtype that holds it, its name in a safetensors header)
_TABLE: dict[str, tuple[type[np.generic], str]] = {
    "float64": (np.float64, "F64"),
    "float32": (np.float32, "F32"),
    "float16": (np.float16, "F16"),
    "bfloat16": (np.uint16, "BF16"),
    "int64": (np.int64, "I64"),
    "int32": (np.int32, "I32"),
    "int16": (np.int16, "I16"),
    "int8": (np.int8, "I8"),
    "uint8": (np.uint8, "U8"),
    "bool": (np.bool_, "BOOL"),
}
SAFETENSORS_NAMES = {tag: name for tag, (_, name) in _TABLE.items()}
TAGS_BY_SAFETENSORS_NAME = {name: tag for tag, name in SAFETENSORS_NAMES.items()}
FLOAT_TAGS = frozenset({"float64", "float32", "float16", "bfloat16"})


def storage_dtype(tag: str) -> np.dtype:
    """Return the little-endian NumPy dtype that holds a value tagged `tag` (`uint16` for bfloat16).

    Raises:
        CheckpointError: `tag` is no dtype a checkpoint can hold.
    """
    if tag not in _TABLE:
        raise CheckpointError(f"dtype {tag!r} cannot be stored in a checkpoint; it holds {', '.join(sorted(_TABLE))}")
    return np.dtype(_TABLE[tag][0]).newbyteorder("<")


def as_storage(array: np.ndarray, tag: str) -> np.ndarray:
    """Return `array` in the storage dtype of `tag`, without copying its elements.

    Args:
        array: values whose dtype is `tag`, or the raw `uint16` bits when `tag` is "bfloat16".
        tag: what the values are.

    Raises:
        CheckpointError: the array holds something else than `tag` says.
    """
    wanted = storage_dtype(tag)
    if array.dtype == wanted:
        return array
    if tag == "bfloat16" and array.dtype.name == "bfloat16" and array.dtype.itemsize == 2:
        return array.view(np.uint16)
    raise CheckpointError(f"expected an array of dtype {tag}, got {array.dtype.name}")


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Round to nearest, ties to even: add 0x7fff plus the lowest bit that stays. NaN would overflow into infinity
    # or zero, so NaNs keep their upper half, with a mantissa bit forced on so that they stay NaN.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():
        rounded = np.where(is_nan, (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40), rounded)
    return rounded.reshape(np.shape(values))


def convert(array: np.ndarray, source_tag: str, target_tag: str) -> np.ndarray:
    """Return `array` as `target_tag`, rounding to nearest even where the target is narrower.

    Args:
        array: values in the storage dtype of `source_tag`.
        source_tag: what the array holds.
        target_tag: what the result holds; both float, or both equal.

    Raises:
        CheckpointError: a conversion between an integer and another dtype is asked for.
    """
    if source_tag == target_tag:
        return array
    if source_tag not in FLOAT_TAGS or target_tag not in FLOAT_TAGS:
        raise CheckpointError(f"dtype {source_tag} is not converted to {target_tag}; only floating dtypes are")
    values = _bfloat16_to_float32(array) if source_tag == "bfloat16" else array
    if target_tag == "bfloat16":
        return _float32_to_bfloat16(values.astype(np.float32, copy=False))
    return values.astype(storage_dtype(target_tag), copy=False)
