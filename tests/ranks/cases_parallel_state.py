"""The façade in a real job: groups that communicate, made and destroyed twice."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from parallel_core import parallel_state as ps
from tests.helpers.cases import CaseContext, case


@case(world_size=2, variants=[{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 1}])
def test_initialize_model_parallel(ctx: CaseContext, tp: int, pp: int) -> None:
    for _ in range(2):
        ps.initialize_model_parallel(tp, pp, distributed_backend="mccl")
        groups = {
            "tp": ps.get_tensor_model_parallel_group(),
            "pp": ps.get_pipeline_model_parallel_group(),
            "dp": ps.get_data_parallel_group(),
            "model": ps.get_model_parallel_group(),
            "embedding": ps.get_embedding_group(),
        }
        sizes = {"tp": tp, "pp": pp, "dp": 2 // tp // pp, "model": tp * pp, "embedding": pp}
        for name, group in groups.items():
            assert group.size == sizes[name], name
            ranks = group.all_gather(Tensor(np.array([ctx.rank], np.float32))).asnumpy()
            assert tuple(ranks.astype(int)) == group.ranks
        assert ps.get_pipeline_model_parallel_next_rank() == ((ctx.rank + 1) % 2 if pp == 2 else ctx.rank)
        ps.destroy_model_parallel()
        assert not ps.is_initialized()
