"""LayerNorm and RMSNorm with parameters that know whether their gradient is partial."""

from __future__ import annotations

from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import TensorShard
from parallel_core.ops import reference
from parallel_core.tensor_parallel.parameter import constant, make_parameter


class LayerNorm(nn.Cell):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim, computed in float32.

    Args:
        hidden_size: size of the last dim.
        eps: added to the variance.
        scale: initial weight.
        zero_centered: keep weight - 1 (Megatron's apply_layernorm_1p).
        partial_gradient: each rank sees only part of the sequence or of the heads.
        params_dtype: dtype of the parameters.
        name: global name; the parameters are `{name}.weight` and `{name}.bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        zero_centered: bool = False,
        partial_gradient: bool = False,
        params_dtype: str = "float32",
        name: str = "norm",
    ) -> None:
        super().__init__(auto_prefix=True)
        self.eps, self.offset = eps, 1.0 if zero_centered else 0.0
        weight = TensorShard.cut(f"{name}.weight", (hidden_size,), partial_gradient=partial_gradient)
        bias = TensorShard.cut(f"{name}.bias", (hidden_size,), partial_gradient=partial_gradient)
        self.weight = make_parameter(weight, constant(scale - self.offset), params_dtype)
        self.bias = make_parameter(bias, constant(0.0), params_dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Return the norm of `x`, in x's shape and dtype."""
        weight = ops.shifted(self.weight, self.offset) if self.offset else self.weight
        return ops.layer_norm(x, weight, self.bias, self.eps)


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32. Arguments as for `LayerNorm`.

    Without `fused` it runs the plain operators.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        zero_centered: bool = False,
        partial_gradient: bool = False,
        params_dtype: str = "float32",
        name: str = "norm",
        fused: bool = True,
    ) -> None:
        super().__init__(auto_prefix=True)
        self.fused, self._norm = fused, ops.rms_norm if fused else reference.rms_norm
        self.eps, self.offset = eps, 1.0 if zero_centered else 0.0
        spec = TensorShard.cut(f"{name}.weight", (hidden_size,), partial_gradient=partial_gradient)
        self.weight = make_parameter(spec, constant(scale - self.offset), params_dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Return the norm of `x`, in x's shape and dtype."""
        return self._norm(x, self._factor(), self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the norm of residual + x, that sum); all of one shape and dtype."""
        return ops.add_rms_norm(x, residual, self._factor(), self.eps)

    def _factor(self) -> Tensor:
        return ops.shifted(self.weight, self.offset) if self.offset else self.weight


def make_norm(
    config: TransformerConfig, name: str, *, partial_gradient: bool, size: int = 0, scale: float = 1.0
) -> nn.Cell:
    """Return the norm that `config.normalization` names, over `size` (default hidden_size) features."""
    kinds = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
    if config.normalization not in kinds:
        raise ConfigError(f"normalization={config.normalization!r} does not exist; use {' or '.join(kinds)}")
    more = {"fused": config.apply_rmsnorm_fusion} if config.normalization == "RMSNorm" else {}
    return kinds[config.normalization](
        size or config.hidden_size,
        eps=config.norm_epsilon,
        scale=scale,
        zero_centered=config.apply_layernorm_1p,
        partial_gradient=partial_gradient,
        params_dtype=config.params_dtype,
        name=name,
        **more,
    )
