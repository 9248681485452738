"""The starts of a job of several nodes: node 0 decides when, with whom and in which layout; the others follow."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from parallel_core.launch.job import Job, JobSpec
from parallel_core.launch.nodes import FirstNode, Meeting, NodeError, OtherNode, Wanted
from parallel_core.launch.plan import master_port
from parallel_core.launch.report import CONFIG_ERROR_STATUS
from parallel_core.launch.restart import Progress, keep_report


@dataclass(frozen=True)
class Layout:
    """A layout that fits on fewer ranks.

    Attributes:
        words: what it is and costs.
        flags: what makes it of the command.
    """

    words: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """What the starts of a job have in common.

    Attributes:
        spec: the job as it is with all nodes.
        wanted: what every node is told.
        wait_s: how long nodes wait for one another.
        ready: makes a start ready: log directory, configuration.
        layouts: returns what fits on so many ranks, the best first; asked on node 0 only.
        progress: counts failures; asked on node 0 only.
        say: prints a line at a level.
    """

    spec: JobSpec
    wanted: Wanted
    wait_s: float
    ready: Callable[[JobSpec], JobSpec]
    layouts: Callable[[int], Sequence[Layout]]
    progress: Progress
    say: Callable[[str, str], None]

    def at(self, meeting: Meeting) -> JobSpec:
        """Return the job of one start."""
        per_node = self.spec.num_ranks // self.spec.num_nodes
        return replace(
            self.spec,
            command=(*self.spec.command, *meeting.flags),
            num_ranks=per_node * len(meeting.present),
            num_nodes=len(meeting.present),
            node_rank=meeting.node,
            master_port=meeting.port,
        )

    def run(self, meeting: Meeting, nodes: FirstNode | OtherNode) -> Job:
        """Run one start to its end."""
        self.say(f"start {meeting.number}: {', '.join(meeting.present)}", "INFO")
        job = Job(self.ready(self.at(meeting)), nodes)
        job.run()
        return job


def run_together(course: Course) -> int:
    """Run this node's part of a job of several nodes, and return its exit status.

    Raises:
        ConfigError: the nodes are given different variables, or cannot meet where they are told to.
    """
    spec = course.spec
    own = (spec.master_addr, spec.master_port, course.wanted)
    nodes = FirstNode(*own) if spec.node_rank == 0 else OtherNode(spec.node_rank, *own)
    try:
        return _run_first(course, nodes) if isinstance(nodes, FirstNode) else _run_other(course, nodes)
    except NodeError as error:
        course.say(str(error), "ERROR")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        nodes.close()


def _is_final(job: Job) -> bool:
    """Whether a job that ended so is not started again."""
    return job.status in (0, CONFIG_ERROR_STATUS) or job.was_stopped


def _run_first(course: Course, nodes: FirstNode) -> int:
    wanted, port = course.wanted, course.spec.master_port
    others = range(1, wanted.nodes)
    expected: Sequence[int] = others
    status = 1
    while True:
        absent = sorted(set(expected) - set(nodes.ready()))
        if absent:
            course.say(f"waiting up to {course.wait_s:g} s (CLUSTER_TIME_OUT) for {nodes.named(absent)}", "INFO")
        missing = nodes.wait_for(expected, course.wait_s)
        present = nodes.ready()
        flags: tuple[str, ...] = ()
        if len(present) < len(others):
            absent = [node for node in others if node not in present]
            chosen = _choose(course, nodes.named(missing or absent), bool(missing), len(present) + 1)
            if isinstance(chosen, str):
                nodes.end(chosen)
                course.say(chosen, "ERROR")
                return status
            flags = chosen.flags
        meeting = nodes.begin(present, port, flags)
        if meeting is None:
            continue
        job = course.run(meeting, nodes)
        status = job.status
        if _is_final(job):
            nodes.end()
            return status
        said = course.progress.after_failure()
        if said:
            nodes.end(said)
            if wanted.restarts:
                course.say(said, "WARNING")
            return status
        keep_report(course.spec.log_dir, meeting.number)
        course.say(course.progress.next_start(meeting.number + 1), "WARNING")
        port, expected = master_port({}), present


def _choose(course: Course, who: str, are_waited_for: bool, nodes: int) -> Layout | str:
    """Return the layout to go on in with fewer nodes, or why there is none."""
    wanted = course.wanted
    ranks = wanted.ranks // wanted.nodes * nodes
    where = f"{course.spec.master_addr}, port {course.spec.master_port + 1}"
    said = f"{who} of NNODES={wanted.nodes} " + (
        f"did not come to {where}, within {course.wait_s:g} s (CLUSTER_TIME_OUT)" if are_waited_for else "is not there"
    )
    if not wanted.restarts:
        return said
    fitting = course.layouts(ranks)
    on = f"NNODES={nodes} NPROC={ranks}"
    if not fitting:
        return f"{said}; no layout fits on {on}"
    course.say(f"{said}; on {on} fit:", "WARNING")
    for layout in fitting:
        course.say(f"  {layout.words}: {shlex.join(layout.flags)}", "WARNING")
    if not wanted.elastic:
        return f"{said}; start again with {on} and one of the layouts above, or with --elastic"
    course.say(f"--elastic: going on with {fitting[0].words}", "WARNING")
    return fitting[0]


def _run_other(course: Course, nodes: OtherNode) -> int:
    status = 1
    while True:
        answer = nodes.meet(course.wait_s)
        if isinstance(answer, str):
            if answer:
                course.say(f"node 0 says: {answer}", "ERROR")
            return status
        job = course.run(answer, nodes)
        status = job.status
        if _is_final(job) or not course.wanted.restarts:
            return status
        keep_report(course.spec.log_dir, answer.number)
