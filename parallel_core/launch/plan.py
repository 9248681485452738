"""From the environment and the configuration to a job: how many ranks, which port, where the logs go."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import random
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel_core.environment import MEMORY_VARIABLE
from parallel_core.errors import ConfigError
from parallel_core.files import create_file
from parallel_core.launch.cluster import with_slurm
from parallel_core.launch.crash import REPORT_NAME
from parallel_core.launch.job import JobSpec

DEFAULT_LOG_DIR = "msrun_log"
_PORTS = range(10000, 32000)
"""Below Linux's range for outgoing connections (32768 up), so that none of those takes the port in between."""
_PER_RANK_LOGS = (
    "worker_{}.log", "error_rank_{}.json", "stops_itself_rank_{}", "activity_rank_{}.json", "stack_rank_{}.txt"
)  # fmt: skip
_OLD_LOGS = ("scheduler.log", "msrun.log", REPORT_NAME, *(name.format("*") for name in _PER_RANK_LOGS))
_COMM_TIMEOUT_MARGIN_S = 60


def integer(environment: Mapping[str, str], name: str, default: int, minimum: int = 1, example: int = 1) -> int:
    """Return the environment variable `name` as an integer, or `default` when it is unset or empty.

    Args:
        environment: the variables to read.
        name: the variable.
        default: what it means when unset.
        minimum: the least value allowed.
        example: the value that an error message suggests.

    Raises:
        ConfigError: if it is no integer, or less than `minimum`.
    """
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not an integer; write for example {name}={example}") from None
    if value < minimum:
        raise ConfigError(f"{name}={value} is less than {minimum}; write for example {name}={example}")
    return value


def seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    """Return the environment variable `name` as a number of seconds, or `default` when it is unset or empty.

    Raises:
        ConfigError: if it is no number, or negative.
    """
    text = environment.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={text} is not a number of seconds; write for example {name}={default:g}")
    return value


def bind_core(environment: Mapping[str, str]) -> str:
    """Return `BIND_CORE` as msrun's `--bind_core` takes it: empty, True, or JSON.

    Raises:
        ConfigError: if it is neither.
    """
    given = environment.get("BIND_CORE", "").strip()
    if given in ("", "True"):
        return given
    try:
        cores = json.loads(given)
    except ValueError:
        cores = None
    if not isinstance(cores, dict):
        raise ConfigError(
            f'BIND_CORE={given} is nothing that msrun takes; write True, or cores by device: {{"device0":["0-10"]}}'
        )
    return given


def device_target(environment: Mapping[str, str]) -> str:
    """Return `DEVICE_TARGET`, or Ascend when this machine has an NPU, else CPU.

    Raises:
        ConfigError: if it names anything else.
    """
    given = environment.get("DEVICE_TARGET", "").strip()
    if given:
        if given not in ("Ascend", "CPU"):
            raise ConfigError(f"DEVICE_TARGET={given} is not a device this package runs on; write Ascend or CPU")
        return given
    return "Ascend" if glob.glob("/dev/davinci[0-9]*") or shutil.which("npu-smi") else "CPU"


def is_listening(port: int) -> bool:
    """Return whether a server on this machine holds `port` (a connection that is merely closing does not count)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ConfigError(
                f"MASTER_PORT={port} cannot be used: {error.strerror}; unset it, or give another"
            ) from None
    return False


def master_port(environment: Mapping[str, str], check: bool = True) -> int:
    """Return `MASTER_PORT`, or a random port that nothing listens on.

    A random one, because a scheduler that is still closing makes the next one on its port fail.

    Args:
        environment: the variables to read.
        check: whether the scheduler runs on this machine, so that a given port must be free here.

    Raises:
        ConfigError: if the given port is out of range or in use.
    """
    port = integer(environment, "MASTER_PORT", 0, example=8848)
    if port:
        if port > 65535:
            raise ConfigError(f"MASTER_PORT={port} is not a port; ports go from 1 to 65535")
        if check and is_listening(port):
            raise ConfigError(
                f"MASTER_PORT={port}: port {port} is in use on this machine, perhaps by a scheduler that is still "
                "closing; give another, or unset MASTER_PORT and a free one is chosen"
            )
        return port
    generator = random.SystemRandom()
    for _ in range(100):
        port = generator.choice(_PORTS)
        if not is_listening(port):
            return port
    raise ConfigError(f"no free port found between {_PORTS.start} and {_PORTS.stop}; give one as MASTER_PORT")


def prepare_log_dir(log_dir: Path, own_ranks: range | None = None) -> None:
    """Create `log_dir` and remove the logs an earlier run left there, and nothing else.

    Metrics stay: the run itself begins the file anew or, when it resumes, continues it.

    Args:
        log_dir: the directory.
        own_ranks: with several nodes sharing the directory, the ranks whose logs may go; None for all logs.

    Raises:
        ConfigError: if it cannot be created or written.
    """
    patterns: tuple[str, ...] = _OLD_LOGS
    if own_ranks is not None:
        patterns = tuple(name.format(rank) for rank in own_ranks for name in _PER_RANK_LOGS)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            for old in log_dir.glob(pattern):
                old.unlink()
        metrics = log_dir / "metrics.jsonl"
        if own_ranks is None and metrics.is_file() and not _has_rows(metrics):
            metrics.unlink()
        create_file(log_dir / "msrun.log").close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"LOG_DIR={log_dir} cannot be used: {error}; give a directory that can be written") from None


def _has_rows(metrics: Path) -> bool:
    with open(metrics, "rb") as lines:
        return lines.read(1) == b"{"


def rank_environment(
    spec: JobSpec,
    environment: Mapping[str, str],
    comm_timeout_s: float,
    deterministic: bool = False,
    max_device_memory: str = "",
) -> dict[str, str]:
    """Return the variables the ranks of `spec` get on top of `environment`; what the user has set stays."""
    cores, local_ranks = len(os.sched_getaffinity(0)), len(spec.local_ranks)
    target = device_target(environment)
    defaults = {
        # One thread per rank and core: more only makes the ranks of one machine wait for each other.
        "OMP_NUM_THREADS": str(max(1, cores // local_ranks)),
        "GLOG_v": "3",
    }
    if target == "Ascend":
        # HCCL's calls return at once: only its own limit, in whole seconds, ends a wait for a rank that is gone.
        defaults |= {"HCCL_BUFFSIZE": "200", "HCCL_EXEC_TIMEOUT": str(math.ceil(comm_timeout_s))}
        if deterministic:  # HCCL reads it when ranks join, before the run asks MindSpore for the same
            defaults["HCCL_DETERMINISTIC"] = "true"
        if max_device_memory:
            defaults[MEMORY_VARIABLE] = max_device_memory
        defaults["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, range(local_ranks)))
    else:
        # MindSpore's own limit of 30 s would end every rank that waits for a slow one; the package's limit names the
        # operation, so it comes first.
        defaults["MS_CPU_COMM_OP_TIMEOUT"] = str(math.ceil(comm_timeout_s) + _COMM_TIMEOUT_MARGIN_S)
    if spec.num_nodes == 1:
        # Seconds between attempts to reach the scheduler (3 to 5 by default, to spare it in large clusters).
        defaults |= {"MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}
    chosen = {name: value for name, value in defaults.items() if not environment.get(name)}
    return {**chosen, "PYTHONUNBUFFERED": "1", "DEVICE_TARGET": target, "LOG_DIR": str(spec.log_dir.resolve())}


def plan_job(
    command: tuple[str, ...],
    num_ranks: int,
    log_dir: Path,
    environment: Mapping[str, str],
    comm_timeout_s: float = 600.0,
    **device: Any,
) -> JobSpec:
    """Return the job that runs `command` on `num_ranks` ranks and logs to `log_dir`; the rest is in `environment`.

    Nothing is started and no file is touched.

    Args:
        command: the script and its arguments.
        num_ranks: ranks on all nodes together.
        log_dir: where the ranks log.
        environment: the variables that `pretrain_gpt.sh` documents.
        comm_timeout_s: how long the ranks wait for each other in one operation.
        **device: further options of `rank_environment`.

    Raises:
        ConfigError: if a variable is wrong, the port is in use, or the script does not exist.
    """
    if not Path(command[0]).is_file():
        raise ConfigError(f"{command[0]} does not exist; give the path of a training script")
    environment = with_slurm(environment)
    num_nodes = integer(environment, "NNODES", 1)
    node_rank = integer(environment, "NODE_RANK", 0, minimum=0, example=0)
    if num_ranks % num_nodes:
        raise ConfigError(f"NPROC={num_ranks} is not a multiple of NNODES={num_nodes}; every node runs as many ranks")
    if node_rank >= num_nodes:
        raise ConfigError(f"NODE_RANK={node_rank} does not exist with NNODES={num_nodes}; nodes count from 0")
    if num_nodes > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise ConfigError(f"NNODES={num_nodes} needs MASTER_ADDR and MASTER_PORT, the same on every node")
    spec = JobSpec(
        command=command,
        num_ranks=num_ranks,
        log_dir=log_dir,
        master_port=master_port(environment, check=node_rank == 0),
        master_addr=environment.get("MASTER_ADDR") or "127.0.0.1",
        num_nodes=num_nodes,
        node_rank=node_rank,
        bind_core=bind_core(environment),
        cluster_timeout_s=integer(environment, "CLUSTER_TIME_OUT", 300, example=300),
        stop_grace_s=seconds(environment, "STOP_GRACE_S", 15.0),
        stop_grace_is_given=bool(environment.get("STOP_GRACE_S", "").strip()),
    )
    return replace(spec, environment=rank_environment(spec, environment, comm_timeout_s, **device))
