"""What a rank says that it is doing."""

from __future__ import annotations

from parallel_core import spans
from parallel_core.launch.activity import Activity, activity_path, read_activity


def test_open_spans_are_told_but_for_parts_of_layers(tmp_path):
    activity = Activity(activity_path(tmp_path, 3))
    spans.listen(activity)

    def told():
        return [(name, details) for name, details, _ in read_activity(tmp_path, 3).spans]

    try:
        with spans.span("backward-compute", microbatch=1):
            with spans.span("weight-gradient", 3):
                assert told() == [("backward-compute", {"microbatch": 1})]
            with spans.span("communication", what="a sum"):
                assert told() == [("backward-compute", {"microbatch": 1}), ("communication", {"what": "a sum"})]
            assert told() == [("backward-compute", {"microbatch": 1})]
        assert not told()
    finally:
        spans.ignore(activity)
