"""Ways of seeing what a configuration makes the program do, all in this process and on tiny models.

A probe takes the words of a command line and returns something that can be compared: what was built, what was computed,
what was written. The base that all of them vary is `TINY`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.comm.interface import Done, SoloGroup
from parallel_core.config import AllConfig, load_config
from parallel_core.context import ParallelContext
from parallel_core.data import build_train_valid_test_datasets
from parallel_core.launch.report import LOG_DIR_VARIABLE
from parallel_core.layout.mesh import Mesh
from parallel_core.layout.recompute import recompute_plan
from parallel_core.layout.shard import shard_of
from parallel_core.layout.stages import stage_layout
from parallel_core.ops import reference, use_kernels
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline.schedule import make_schedule
from parallel_core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel_core.training import pretrain, profiler
from parallel_core.training.batches import make_batch_source
from parallel_core.training.datasets import gpt_dataset_config
from parallel_core.training.forward_step import forward_step_with, get_batch
from parallel_core.training.model import get_model
from parallel_core.training.runtime import start_runtime, supported_precision
from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape
from parallel_core.training.step import TrainingStep
from parallel_core.transformer import GPTModel, ModelStage, gpt_model
from parallel_core.transformer.models import make_model
from tests.helpers import ascend_double

TINY = {
    "num_layers": "2", "hidden_size": "16", "num_attention_heads": "4", "seq_length": "8", "padded_vocab_size": "32",
    "micro_batch_size": "2", "global_batch_size": "4", "lr": "1e-2", "train_iters": "4", "attention_dropout": "0",
    "hidden_dropout": "0", "init_method_std": "0.2", "eval_iters": "0", "log_interval": "1", "num_workers": "0",
}
start_runtime("CPU")
DATA = Path(__file__).resolve().parents[2] / "golden" / "data"


def words_of(*words: str) -> list[str]:
    """TINY as flags, with what `words` say instead."""
    named = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    left = {"train_iters"} if "train_samples" in named else set()
    base = [w for key, value in TINY.items() if key not in named | left for w in (f"--{key.replace('_', '-')}", value)]
    return [*base, *words]


def config_of(words: tuple[str, ...]) -> AllConfig:
    config = load_config(words_of(*words)).config
    if config.model_config.compute_dtype != "float16":  # activations stay so, as on a device with kernels for it
        config, _ = supported_precision(config)
    return config


# ---- a model and its steps ------------------------------------------------------------------------------------------
class Recorder(SoloGroup):
    """A data parallel group of two whose other rank is silent; it keeps what it is asked to do."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.ranks, self.size, self.rank, self.done = (0, 1), 2, 0, []

    def _note(self, what: str, x: Tensor) -> None:
        array = x.astype(ms.float32).asnumpy()
        self.done.append((what, x.size, str(x.dtype), float(np.abs(array).sum())))

    def all_reduce_start_(self, flat: Tensor) -> Done:
        self._note("all_reduce", flat)
        return Done(flat)

    def reduce_scatter_start(self, flat: Tensor, into: Tensor | None = None) -> Done:
        self._note("reduce_scatter", flat)
        return Done(flat[: flat.size // 2].copy())

    def all_gather_start(self, shard: Tensor, into: Tensor | None = None) -> Done:
        self._note("all_gather", shard)
        return Done(Tensor(np.concatenate([shard.asnumpy()] * 2)))


class Batches:
    """Random microbatches by number."""

    def __init__(self, config: AllConfig, count: int, seed: int) -> None:
        model, size = config.model_config, config.dataset_config.batch_size
        rng, self._batches = np.random.default_rng(seed), []
        for _ in range(count):
            ids = rng.integers(0, min(model.vocab_size, 32), (size, model.seq_length + 1)).astype(np.int32)
            mask = (rng.random((size, model.seq_length)) < 0.6).astype(np.float32)
            mask[0, 0] = 1.0
            self._batches.append({"tokens": Tensor(ids[:, :-1].copy()), "labels": Tensor(ids[:, 1:].copy()),
                                  "loss_mask": Tensor(mask), "position_ids": None, "document_start": None})

    def iterator(self, chunk: int) -> Any:
        return iter(self._batches)


def provider(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
    return make_model(stage)


def make_step(config: AllConfig, context: ParallelContext) -> TrainingStep:
    sizes = batch_sizes(config, context.dp.size)
    iterations = config.training_config.training_iters
    scheduler = OptimizerParamScheduler(schedule_shape(config, sizes, iterations))
    model = get_model(provider, config, context)
    return TrainingStep(
        config, context, model, forward_step_with(get_batch), scheduler, loss_scaler(config)
    )


@functools.cache
def built(words: tuple[str, ...]) -> SimpleNamespace:
    """A model as it is built: shapes, dtypes, first values, and the loss before any update, without dropout."""
    ops.use_kernels("local")
    config, context = config_of(words), ParallelContext.solo()
    step = make_step(config, context)
    parameters = {shard_of(p).name: p for b in step.ddp.buffers for p in b.parameters}
    seen = SimpleNamespace(
        step=step,
        config=config,
        shapes={name: p.shape for name, p in parameters.items()},
        dtypes={name: str(p.dtype) for name, p in parameters.items()},
        values={name: p.astype(ms.float32).asnumpy().tobytes() for name, p in parameters.items()},
    )
    count = config.dataset_config.micro_batch_num
    seen.loss = step.evaluate(Batches(config, count, 0), 0, count, 1)["lm loss"]  # type: ignore[arg-type]
    return seen


@functools.cache
def trained(words: tuple[str, ...]) -> SimpleNamespace:
    """A model after two updates: its first loss and gradient norm, and its weights."""
    seen = built(words)
    config, step = seen.config, seen.step
    count = config.dataset_config.micro_batch_num
    samples_of_step = config.dataset_config.global_batch_size
    data: list[Any] = [Batches(config, count, number) for number in (1, 2)]
    reports = [step.train(batches, i + 1, count, samples_of_step) for i, batches in enumerate(data)]
    parameters = [p for buffer in step.ddp.buffers for p in buffer.parameters]
    weights_now = {shard_of(p).name: p.asnumpy().tobytes() for p in parameters}
    return SimpleNamespace(loss=reports[0].losses["lm loss"], norm=reports[0].grad_norm, weights=weights_now)


def shapes(words: tuple[str, ...]) -> Any:
    return built(words).shapes


def dtypes(words: tuple[str, ...]) -> Any:
    return built(words).dtypes


def first_values(words: tuple[str, ...]) -> Any:
    return built(words).values


def loss(words: tuple[str, ...]) -> Any:
    """The loss before any update, without dropout."""
    return built(words).loss


def type_of_logits(words: tuple[str, ...]) -> Any:
    """The type of the logits that the loss is computed from."""
    real = vocab_parallel_cross_entropy
    with mock.patch.object(gpt_model, "vocab_parallel_cross_entropy", wraps=real) as loss_of:
        built.__wrapped__(words)
    return {str(call.args[0].dtype) for call in loss_of.call_args_list}


def train_losses(words: tuple[str, ...]) -> Any:
    return trained(words).loss


def gradient_norm(words: tuple[str, ...]) -> Any:
    return trained(words).norm


def weights(words: tuple[str, ...]) -> Any:
    """What two updates make of the weights."""
    return trained(words).weights


def operators(words: tuple[str, ...]) -> Any:
    """Which implementation the layers call where there is a choice."""
    layer = built(words).step.model.chunks[0].decoder.layers[0]
    rotary = layer.self_attention.rotary
    plain = rotary is not None and rotary._rotate is reference.rotary_packed
    plain_norm = getattr(layer.input_layernorm, "_norm", None) is reference.rms_norm
    return plain, plain_norm, layer._norms_sum, layer.mlp._activate is reference.activation


def flash(words: tuple[str, ...]) -> Any:
    """What an NPU's fused attention operator is asked to do."""
    given = ("--fp16", "--loss-scale", "1", "--kv-channels", "16")
    plain = built(given).loss
    calls, operator = [], ascend_double.flash_attention_score

    def noted(query: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((query.shape, args[-1], options["input_layout"], options["sparse_mode"]))
        return operator(query, *args, **options)

    with mock.patch.object(ops, "use_kernels", lambda mode: use_kernels()), \
            mock.patch.object(ascend_double, "flash_attention_score", noted), ascend_double.on_ascend_double():
        fused = built.__wrapped__((*given, *words)).loss
    assert abs(fused - plain) < 1e-3
    return calls


def traffic(words: tuple[str, ...]) -> Any:
    """The collectives of one step of the first of two data parallel ranks, and what is still under way after it."""
    ops.use_kernels("local")
    solo, recorder = SoloGroup(), Recorder()
    context = ParallelContext(Mesh.megatron(2), 0, solo, solo, solo, recorder, recorder, solo, solo, solo)
    config = config_of(words)
    step = make_step(config, context)
    start = [slot.start for buffer in step.ddp.buffers for slot in buffer.layout.slots]
    finish = step.ddp.finish_grad_sync

    def noted() -> None:
        recorder.done.append(("backward is over", 0, "", 0.0))
        finish()

    step.ddp.finish_grad_sync = noted  # type: ignore[method-assign]
    step.train(Batches(config, 1, 0), 1, 1, 4)  # type: ignore[arg-type]
    return start, recorder.done, [sorted(buffer._gathering) for buffer in step.ddp.buffers]


# ---- pure values that the run reads ---------------------------------------------------------------------------------
def schedules(words: tuple[str, ...]) -> Any:
    """Learning rate and weight decay after every sample."""
    config = config_of(words)
    scheduler = OptimizerParamScheduler(
        schedule_shape(config, batch_sizes(config, 1), config.training_config.training_iters)
    )
    optimizer, out = config.optimizer_config, []
    for _ in range(config.training_config.training_iters):
        out.append((scheduler.get_lr(), scheduler.get_wd(),
                    scheduler.get_lr(optimizer.decoupled_lr, optimizer.decoupled_min_lr)))
        scheduler.step(config.dataset_config.global_batch_size)
    return out


def scales(words: tuple[str, ...]) -> Any:
    """The loss scale over four overflows and eight good updates."""
    scaler, out = loss_scaler(config_of(words)), []
    for overflow in [True] * 4 + [False] * 8:
        scaler.update(overflow)
        out.append(scaler.scale)
    return out


def batch_plan(words: tuple[str, ...]) -> Any:
    """Microbatch size, and microbatches after every eight samples."""
    config = config_of(words)
    sizes = batch_sizes(config, 1)
    return sizes.micro_batch_size, [sizes.num_microbatches(consumed) for consumed in range(0, 64, 8)]


def stages(words: tuple[str, ...]) -> Any:
    """The layers of every pipeline rank and chunk, without those that do nothing."""
    config = config_of(words)
    layout = stage_layout(config.model_config.num_layers, config.parallel_config)
    idle = config.parallel_config.noop_layers
    return [[tuple(n for n in chunk if n not in idle) for chunk in rank] for rank in layout.layers]


def steps(words: tuple[str, ...]) -> Any:
    """The pipeline schedule."""
    config = config_of(words)
    layout = stage_layout(config.model_config.num_layers, config.parallel_config)
    group = config.parallel_config.microbatch_group_size_per_virtual_pipeline_stage
    return str(make_schedule(layout.num_ranks, layout.num_chunks, config.dataset_config.micro_batch_num,
                             name=config.parallel_config.pipeline_schedule, group_size=group))


def recomputed(words: tuple[str, ...]) -> Any:
    """What every chunk of every pipeline rank computes again."""
    config = config_of(words)
    layout = stage_layout(config.model_config.num_layers, config.parallel_config)
    return [
        recompute_plan(config.model_config, config.parallel_config, len(chunk), rank, number)
        for rank, chunks in enumerate(layout.layers) for number, chunk in enumerate(chunks)
    ]


def profile(words: tuple[str, ...]) -> Any:
    """What MindSpore's profiler is asked for on an NPU."""
    config = config_of(words).training_config.profile
    with mock.patch.object(profiler.profiler, "tensorboard_trace_handler", dict), \
            mock.patch.object(profiler.ms, "get_context", lambda key: "Ascend"):
        options = profiler.profile_options(config, Path("there"))
    return {**options, "experimental_config": vars(options["experimental_config"])}


def dynamic_profile(words: tuple[str, ...]) -> Any:
    """What MindSpore's dynamic profiler is asked for over three steps."""
    monitor = mock.MagicMock()
    with mock.patch.object(profiler.profiler, "DynamicProfilerMonitor", monitor):
        steps_of = profiler.StepProfiler(config_of(words).training_config, ParallelContext.solo())
        for iteration in (1, 2, 3):
            steps_of.before_step(iteration)
            steps_of.after_step(iteration)
    begun = [call.args[0].original_args().cur_step_num for call in monitor.return_value.step_begin.call_args_list]
    return monitor.call_args, begun


# ---- data -----------------------------------------------------------------------------------------------------------
def samples(words: tuple[str, ...], folder: Path) -> Any:
    """The first samples of the three datasets, all of every sample."""
    corpus = folder / "data"
    if not corpus.exists():
        shutil.copytree(DATA, corpus)
    written = tuple(word.replace("DATA", str(corpus)).replace("FOLDER", str(folder)) for word in words)
    config = config_of(("--padded-vocab-size", "2000", *written))
    datasets = build_train_valid_test_datasets(gpt_dataset_config(config), (8, 4, 4))
    return [
        None if dataset is None else [{k: v.tobytes() for k, v in dataset[i].items()} for i in range(4)]
        for dataset in datasets
    ]


def tokenizer(words: tuple[str, ...]) -> Any:
    """The tokenizer's class, its vocabulary and a sentence in it."""
    made = gpt_dataset_config(config_of(words)).tokenizer
    return type(made).__name__, made.vocab_size, list(made.tokenize("1 2 3"))


def microbatches(words: tuple[str, ...]) -> Any:
    """The tokens of every microbatch of ten numbered samples, in order, and the threads that prepare them."""
    config = config_of(words)
    ones = np.ones(8, np.int32)
    dataset = [{"tokens": i * ones, "labels": ones, "loss_mask": ones, "position_ids": ones} for i in range(9)]
    source = make_batch_source(dataset, 0, config, ParallelContext.solo(), 1)
    threads = getattr(getattr(source._loader, "_pool", None), "_max_workers", 0)
    read, out = source.iterator(0), []
    try:
        for _ in range(6):
            out.append(next(read)["tokens"].asnumpy()[:, 0].tolist())
    except Exception as error:  # the data is used up
        out.append(type(error).__name__)
    source.close()
    return threads, out


# ---- whole runs -----------------------------------------------------------------------------------------------------
@contextmanager
def _aside(folder: Path) -> Any:
    """Run in `folder`, and put back what a run changes of this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before, launched, state = os.getcwd(), os.environ.pop(LOG_DIR_VARIABLE, None), np.random.get_state()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        np.random.set_state(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if launched is not None:
            os.environ[LOG_DIR_VARIABLE] = launched


def run(words: tuple[str, ...], folder: Path) -> SimpleNamespace:
    """A run in `folder`: its console lines, its metrics without times, its files."""
    folder.mkdir(parents=True, exist_ok=True)
    console = io.StringIO()
    plain = () if "--kernels" in words else ("--kernels", "local")
    with _aside(folder), redirect_stdout(console):
        pretrain(None, provider, argv=words_of(
            "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "31", *plain, *words))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    metrics = [path for path in files if path.endswith("metrics.jsonl")]
    rows = [json.loads(line) for path in metrics for line in (folder / path).read_text().splitlines()]
    times = ("elapsed_ms", "tokens_per_s")
    return SimpleNamespace(
        lines=console.getvalue().splitlines(), files=files,
        metrics=[{key: value for key, value in row.items() if key not in times} for row in rows],
        iterations=[row["iteration"] for row in rows if "split" not in row],
        evaluations=[(row["iteration"], row["split"]) for row in rows if "split" in row],
        losses=[row["loss"] for row in rows if "split" not in row],
        shown=[int(line.split("Step: ")[1].split(",")[0]) for line in console.getvalue().splitlines()
               if "Epoch: " in line],
    )
