"""MindFormers' AutoClass: the class that a name or a directory asks for."""

from __future__ import annotations

from pathlib import Path

import yaml

from parallel_core.api.configs import PretrainedConfig
from parallel_core.api.models import PreTrainedModel, model_class_of, weights_folder
from parallel_core.api.register import MindFormerRegister
from parallel_core.api.tokenizers import TOKENIZERS, PreTrainedTokenizer, Processor
from parallel_core.data.files import read_text
from parallel_core.errors import CheckpointError


class AutoConfig:
    """Settings of any model."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path) -> PretrainedConfig:
        """Return the settings of a preset, a directory or a `.yaml`; see `PretrainedConfig.from_pretrained`."""
        return PretrainedConfig.from_pretrained(pretrained_model_name_or_path)


class AutoModel:
    """Any model."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_dir: str | Path) -> PreTrainedModel:
        """Return the model of a directory with its weights; see `PreTrainedModel.from_pretrained`."""
        folder = weights_folder(pretrained_model_name_or_dir)
        config = AutoConfig.from_pretrained(folder)
        model = model_class_of(config)(config)
        model.load(folder)
        return model

    @staticmethod
    def from_config(config: PretrainedConfig | str | Path) -> PreTrainedModel:
        """Return a model with first values, of settings or of the `.yaml` that has them.

        The class is the one that has such models, or the registered one that the `.yaml` names as `model.arch.type`.

        Raises:
            ConfigError: nothing of that name is registered.
        """
        if isinstance(config, PretrainedConfig):
            return model_class_of(config)(config)
        settings = AutoConfig.from_pretrained(config)
        arch = (yaml.safe_load(read_text(str(config))).get("model") or {}).get("arch") or {}
        name = str(arch.get("type", ""))
        return AutoModel.of_class(name, settings) if name else model_class_of(settings)(settings)

    @staticmethod
    def of_class(name: str, config: PretrainedConfig) -> PreTrainedModel:
        """Return a model of a class by its name: this interface's, or a registered one.

        Raises:
            ConfigError: nothing of that name is registered.
        """
        kinds = {kind.__name__: kind for kind in PreTrainedModel.models}
        kind: type[PreTrainedModel] = kinds.get(name) or MindFormerRegister.get_cls("models", name)
        return kind(config)


class AutoTokenizer:
    """Any tokenizer."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_dir: str | Path) -> PreTrainedTokenizer:
        """Return the tokenizer whose files a directory has.

        Raises:
            CheckpointError: it has none's.
        """
        folder = weights_folder(pretrained_model_name_or_dir)
        for kind in TOKENIZERS:
            if all((folder / name).is_file() for name in kind.files):
                return kind.from_pretrained(folder)
        wanted = "; ".join(f"{' and '.join(kind.files)} ({kind.__name__})" for kind in TOKENIZERS)
        raise CheckpointError(f"{folder} has the files of no tokenizer: {wanted}")


class AutoProcessor:
    """Any processor."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_dir: str | Path) -> Processor:
        """Return the processor over a directory's tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_dir)
        found = (one for one in Processor.__subclasses__() if isinstance(tokenizer, one.tokenizer_class))
        return next(found)(tokenizer)
