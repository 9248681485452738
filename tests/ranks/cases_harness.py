"""Cases that show the harness itself at work; `test_harness.py` has the ones that must fail."""

from __future__ import annotations

import numpy as np

from tests.helpers.cases import CaseContext, case


@case(world_size=(1, 2), variants=[{"scale": 1.0}, {"scale": 3.0}])
def test_all_reduce_sums_over_the_ranks(ctx: CaseContext, scale: float) -> None:
    import mindspore as ms
    from mindspore import mint

    from parallel_core.comm.mindspore_comm import start_communication

    x = ms.Tensor([scale * (ctx.rank + 1)], ms.float32)
    if ctx.world_size > 1:
        start_communication()
        mint.distributed.all_reduce(x)
    expected = scale * ctx.world_size * (ctx.world_size + 1) / 2
    np.testing.assert_allclose(x.asnumpy(), [expected])


@case(world_size=2)
def test_ranks_share_the_directory_of_a_case(ctx: CaseContext) -> None:
    from mindspore import mint

    from parallel_core.comm.mindspore_comm import start_communication

    start_communication()
    (ctx.tmp_path / str(ctx.rank)).touch()
    mint.distributed.barrier()
    assert sorted(path.name for path in ctx.tmp_path.iterdir()) == ["0", "1"]


@case(world_size=2)
def test_every_rank_draws_the_same_numbers(ctx: CaseContext) -> None:
    np.testing.assert_array_equal(np.random.rand(2), np.random.RandomState(0).rand(2))
