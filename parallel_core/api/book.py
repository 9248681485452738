"""MindFormers' book: the names that its classes know, by family."""

from __future__ import annotations

from collections import OrderedDict

from parallel_core.api.configs import PretrainedConfig

_PREFIXES = {"qa": "qa", "txtcls": "txtcls"}


def _family(name: str) -> str:
    return next((kind for kind in _PREFIXES if kind in name.split("_")), name.split("_")[0])


class MindFormerBook:
    """Lists of names; a class of one's own may add to them by `presets` of its configuration."""

    @staticmethod
    def _by_family() -> OrderedDict[str, list[str]]:
        found: OrderedDict[str, list[str]] = OrderedDict()
        for kind in PretrainedConfig.families.values():
            for name in kind.presets:
                found.setdefault(_family(name), []).append(name)
        return found

    @classmethod
    def get_config_support_list(cls) -> OrderedDict[str, list[str]]:
        """Return the names of configurations by family."""
        return cls._by_family()

    @classmethod
    def get_model_support_list(cls) -> OrderedDict[str, list[str]]:
        """Return the names of models by family."""
        return cls._by_family()

    @classmethod
    def get_tokenizer_support_list(cls) -> OrderedDict[str, list[str]]:
        """Return the names whose tokenizers there are, by family."""
        return cls._by_family()

    @classmethod
    def get_processor_support_list(cls) -> OrderedDict[str, list[str]]:
        """Return the names whose processors there are, by family."""
        return cls._by_family()

    @classmethod
    def get_pipeline_support_task_list(cls) -> OrderedDict[str, list[str]]:
        """Return the tasks of `pipeline`, with the names of models for each."""
        names = cls._by_family()
        words = [name for family, found in names.items() if family not in ("qa", "txtcls", "bert") for name in found]
        return OrderedDict(
            text_generation=words, question_answering=names.get("qa", []), text_classification=names.get("txtcls", [])
        )

    @classmethod
    def get_trainer_support_task_list(cls) -> OrderedDict[str, list[str]]:
        """Return the tasks of `Trainer`, with the names of models for each."""
        return cls.get_pipeline_support_task_list()
