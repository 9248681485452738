"""MindFormers' book: the names that its classes know, by family."""

from __future__ import annotations

from collections import OrderedDict

from parallel_core.api.configs import PretrainedConfig

_TASKS = ("qa", "txtcls")


def _family(name: str) -> str:
    """Return the family of a preset: its task where its name has one, else its first word."""
    words = name.split("_")
    return next((task for task in _TASKS if task in words), words[0])


class MindFormerBook:
    """Lists of names; a class of one's own may add to them by `presets` of its configuration."""

    @classmethod
    def get_config_support_list(cls) -> OrderedDict[str, list[str]]:
        """Return the names by family; configurations, models, tokenizers and processors have the same."""
        found: OrderedDict[str, list[str]] = OrderedDict()
        for kind in PretrainedConfig.families.values():
            for name in kind.presets:
                found.setdefault(_family(name), []).append(name)
        return found

    get_model_support_list = get_tokenizer_support_list = get_processor_support_list = get_config_support_list

    @classmethod
    def get_pipeline_support_task_list(cls) -> OrderedDict[str, list[str]]:
        """Return the tasks of `pipeline`, with the names of models for each."""
        names = cls.get_config_support_list()
        words = [name for family, found in names.items() if family not in (*_TASKS, "bert") for name in found]
        return OrderedDict(
            text_generation=words, question_answering=names.get("qa", []), text_classification=names.get("txtcls", [])
        )

    @classmethod
    def get_trainer_support_task_list(cls) -> OrderedDict[str, list[str]]:
        """Return the tasks of `Trainer`, with the names of models for each."""
        return cls.get_pipeline_support_task_list()
