"""How compiled code communicates by itself, for a kernel that passes memory round a group while it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mindspore import Tensor


class Passing(NamedTuple):
    """Functions of the signatures of `csrc/shm_messages.cpp`, and what they are called with.

    Attributes:
        group: address that the functions know the group by.
        send: address of the function that sends.
        receive: address of the one that receives.
        float32: number of the type.
        limit_s: time limit of each call.
        check: raises what their status means, of a call that passed a tensor round; 0 means nothing.
    """

    group: int
    send: int
    receive: int
    float32: int
    limit_s: float
    check: Callable[[int, Tensor], None]
