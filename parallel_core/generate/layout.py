"""How many ranks continue a model's texts, and what they cannot do; checked before any of them starts."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError

ANY_LAYOUT = "any layout loads any layout: leave it out, whatever the checkpoint was trained with"


@dataclass(frozen=True)
class Layout:
    """The ranks of generation: tensor x pipeline ranks hold a model, and `data_parallel_size` models share requests.

    Attributes:
        tensor_model_parallel_size: ranks that each matrix is cut over.
        pipeline_model_parallel_size: ranks that the layers are cut over.
        data_parallel_size: models.
        distributed_timeout_minutes: how long a rank waits for another.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_timeout_minutes: float = 10.0

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.data_parallel_size


def check_layout(model: TransformerConfig, layout: Layout) -> None:
    """Refuse a layout that the model cannot be cut into.

    Raises:
        ConfigError: all that is wrong, with what to write instead.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    problems = [
        f"{name}={size} is less than 1; give a number of ranks"
        for name, size in vars(layout).items()
        if name.endswith("_size") and size < 1
    ]
    if not problems:
        for name, count in (
            ("attention heads", model.num_attention_heads),
            ("query groups", model.num_query_groups),
            ("features between the two layers of the MLP", model.ffn_hidden_size),
        ):
            if count % tp:
                fits = [n for n in range(1, count + 1) if not count % n and not model.num_query_groups % n]
                problems.append(
                    f"tensor_model_parallel_size={tp}: the model has {count} {name}, no multiple of it; "
                    f"give one of {', '.join(map(str, fits[:8]))}"
                )
        if pp > model.num_layers:
            problems.append(
                f"pipeline_model_parallel_size={pp}: the model has {model.num_layers} layers; give up to "
                f"{model.num_layers}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
