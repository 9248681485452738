"""`python -m parallel_core.serve`: the model of a checkpoint behind HTTP.

    python -m parallel_core.serve --load DIR --port 8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Once upon", "max_tokens": 32}'

Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, /metrics, Megatron's
PUT /api, a page at / and /query?u=TEXT. Only this machine can reach it unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel_core.data.chat import FORMATS, special_tokens
from parallel_core.errors import ConfigError
from parallel_core.generate.arguments import add_model_arguments, add_sampling_arguments, layout_of, sampling_values
from parallel_core.generate.requests import SamplingParams
from parallel_core.generate.starting import is_rank, run_or_start

if TYPE_CHECKING:
    from parallel_core.generate.generator import Generator

_PROGRAM = Path(__file__).parent / "programs" / "serve_on_ranks.py"
_KEY_VARIABLE = "PARALLEL_CORE_API_KEY"
_RED_S = 1.0
"""How long `/health` is red before a job whose engine has died ends."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    group.add_argument("--model-name", help="the name that /v1/models gives (default: that of the directory)")
    group.add_argument(
        "--chat-template", metavar="NAME|FILE", default="default",
        help=f"how conversations are written: {', '.join(FORMATS)}, or a file (default: as the checkpoint says)",
    )  # fmt: skip
    group.add_argument("--api-key", help=f"clients must send it (default: {_KEY_VARIABLE} in the environment)")
    group.add_argument("--max-body-bytes", type=int, default=1 << 20, help="of a request (default 1 MiB)")
    group.add_argument("--max-queue", type=int, default=64, help="answers that may wait for a row (default 64)")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 for what cannot be, said in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    return run_or_start(
        _PROGRAM, words, args, run, possible=lambda: _possible(args), before_ranks=lambda: listen(args).close()
    )


def run_on_rank() -> None:
    """Run a rank's part; what fails is raised."""
    run(make_parser().parse_args(sys.argv[1:]))


def _possible(args: argparse.Namespace) -> None:
    _need_server()
    _check(args)


def _need_server() -> None:
    try:
        import jinja2  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'parallel_core[serve]'") from None


def _check(args: argparse.Namespace) -> None:
    sampling_values(args)
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port {args.port}: give 0 to 65535")
    for name, least in (("max_body_bytes", 1), ("max_queue", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")


def listen(args: argparse.Namespace) -> socket.socket:
    """Return a socket at the address that is asked for.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        return socket.create_server((args.host, args.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error.strerror or error}; give another") from None


def run(args: argparse.Namespace) -> None:
    """Serve on this rank until SIGINT or SIGTERM.

    Raises:
        ConfigError: a setting, the layout or the address cannot be.
        CheckpointError: the checkpoint cannot be read.
    """
    from parallel_core.generate.generator import Generator
    from parallel_core.serve.service import Service

    layout = layout_of(args)
    first = not is_rank() or os.environ.get("RANK_ID", "0") == "0"
    listener = listen(args) if first else None
    it = Generator(
        args.load,
        step=args.ckpt_step,
        base=args.base,
        layout=layout,
        max_batch_size=args.max_batch_size,
        max_length=args.max_length,
        kernels=args.kernels,
    )
    if it.context.rank or listener is None:
        # Rank 0 says when to end, once no answer is under way on any rank.
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda *_: None)
        it.follow()
        return
    service = Service(it, args.max_batch_size * layout.data_parallel_size + args.max_queue)
    server, thread = _start_server(args, it, service, listener)
    _stop_on_signals(service)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"INFO - serving {args.load} on http://{shown}:{port} ({it.kernels})", flush=True)
    try:
        service.run()
    except BaseException:
        time.sleep(_RED_S)  # whoever looks at /health sees it red
        raise
    finally:
        server.should_exit = True
        thread.join(10)
    it.close()


def _start_server(
    args: argparse.Namespace, it: Generator, service: Any, listener: socket.socket
) -> tuple[Any, threading.Thread]:
    import uvicorn

    from parallel_core.generate.loading import template_of
    from parallel_core.serve.app import Limits, make_app

    key = args.api_key or os.environ.get(_KEY_VARIABLE, "")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not key:
        print(f"WARNING - --host {args.host}: others can use the model; --api-key asks them for a key", flush=True)
    name = args.model_name or Path(args.load).resolve().name
    app = make_app(
        service,
        name,
        template_of(it.described, args.chat_template),
        SamplingParams.of(sampling_values(args)),
        Limits(args.max_body_bytes, key),
        special_tokens(it.described.tokenizer_folders).get("bos_token"),
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5, server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    return server, thread


def _stop_on_signals(service: Any) -> None:
    """End on SIGINT and SIGTERM; seen at once, also while the engine waits for a rank inside the backend."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: None)

    def watch() -> None:
        with writer:
            while (number := reader.recv(1)) and number[0] not in (signal.SIGINT, signal.SIGTERM):
                pass
            service.stop()

    threading.Thread(target=watch, daemon=True).start()
