"""Memory that large arrays leave to the next ones of their size."""

import gc
import tracemalloc

import numpy as np
import pytest

from parallel_core.ops import memory

FLOATS = memory.LARGE_BYTES // 4 + 12345


@pytest.fixture(autouse=True)
def nothing_waits():
    gc.collect()
    memory._waiting.clear()
    yield
    gc.collect()
    memory._waiting.clear()


def test_an_array_gets_the_memory_of_a_former_one_of_its_size_in_any_shape_and_type():
    first = memory.empty((FLOATS, 2))
    address = first.ctypes.data
    del first
    assert memory.waiting_bytes() == FLOATS * 8
    second = memory.empty((2, FLOATS * 2), np.float16)
    assert (second.ctypes.data, second.shape, second.dtype) == (address, (2, FLOATS * 2), np.float16)
    assert memory.waiting_bytes() == 0


def test_memory_is_in_use_as_long_as_a_view_of_it_or_a_tensor():
    from parallel_core.ops import raw

    array = memory.empty((FLOATS,))
    array[:] = np.arange(FLOATS)
    view, tensor = array[5:10].reshape(5, 1)[1:], raw.on(array)
    del array
    others = [memory.empty((FLOATS,)) for _ in range(3)]
    for other in others:
        other[:] = -1
    np.testing.assert_array_equal(view[:, 0], [6, 7, 8, 9])
    assert tensor.asnumpy()[FLOATS - 1] == FLOATS - 1
    del view
    assert memory.waiting_bytes() == 0
    del tensor
    gc.collect()
    assert memory.waiting_bytes() == FLOATS * 4


def test_what_waits_is_given_back_when_an_array_of_another_size_is_asked_for():
    kept = memory.empty((FLOATS,))
    for size in range(FLOATS + 1, FLOATS + 20):  # sequences of all lengths, as in generation
        memory.empty((size,))[:] = 1
        assert memory.waiting_bytes() == size * 4
    assert kept.shape == (FLOATS,)


def test_arrays_of_different_sizes_that_follow_one_another_do_not_drive_each_other_out(monkeypatch):
    asked, new = [], memory._new
    monkeypatch.setattr(memory, "_new", lambda size: (asked.append(size), new(size))[1])
    kept = memory.empty((20 * FLOATS,))
    for _ in range(5):
        for size in (FLOATS, FLOATS + 100):
            memory.empty((size,))
    assert asked == [kept.nbytes, FLOATS * 4, FLOATS * 4 + 400]


def test_small_arrays_are_numpys():
    array = memory.empty((3, 4))
    assert array.base is None and array.shape == (3, 4) and array.dtype == np.float32


def test_an_array_that_goes_while_memory_is_looked_for_is_not_given_twice(monkeypatch):
    """Python frees what it likes where it likes: in another thread, or in this one between two lines."""
    first, held = memory.empty((FLOATS,)), [memory.empty((FLOATS,))]
    del first

    class Meddling(dict):
        def get(self, *key):
            found = super().get(*key)
            held.clear()
            return found

    memory.waiting_bytes()
    monkeypatch.setattr(memory._waiting, "_by_size", Meddling(memory._waiting._by_size))
    arrays = [memory.empty((FLOATS,)) for _ in range(4)]
    assert len({array.ctypes.data for array in arrays}) == 4


def test_tracemalloc_counts_arrays_while_they_are_in_use():
    before = memory.empty((FLOATS,))
    tracemalloc.start()
    try:
        array = memory.empty((FLOATS,))
        view = array[1:]
        del array, before
        assert FLOATS * 4 <= tracemalloc.get_traced_memory()[0] < FLOATS * 4 + 100_000
        del view
        again = memory.empty((FLOATS,))
        assert FLOATS * 4 <= tracemalloc.get_traced_memory()[1] < FLOATS * 5
        del again
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
