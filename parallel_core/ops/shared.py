"""What the references of kernels and their implementations have in common, in plain MindSpore operators."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops


def local_rows(ids_T: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the rows `ids - first_row`, 0 where there is no such row, and where there is one."""
    rows = ids_T - first_row
    inside = ops.logical_and(rows >= 0, rows < num_rows)
    return rows * inside.astype(rows.dtype), inside


def put(into: Any, value: Tensor, add: bool) -> None:
    """Write a tensor to an array of its shape, or to such a part of a device's memory, or add it, in float32."""
    value = value if value.dtype == ms.float32 else value.astype(ms.float32)
    if not isinstance(into, np.ndarray):
        write = into.add_ if add else into.copy_
        write(value)
    elif add:
        np.add(into, value.asnumpy(), out=into, casting="unsafe")
    else:
        into[:] = value.asnumpy()
