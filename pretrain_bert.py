"""Train BERT: `bash pretrain_bert.sh` on several processes, `python pretrain_bert.py` on one.

The arguments are those of `pretrain_gpt.py`; `--bert-no-binary-head`, `--mask-prob` and `--short-seq-prob` are
Megatron-LM's. The data is that of `tools/preprocess_data.py --split-sentences --tokenizer-type BertWordPieceLowerCase`,
or with `--bert-head question_answering` a folder with SQuAD v1.1's train-v1.1.json.
"""

from __future__ import annotations

from parallel_core.launch.entry import run_as_rank
from parallel_core.training import pretrain
from parallel_core.training.encoder_steps import encoder_forward_step
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import BertModel


def model_provider_func(pre_process: bool, post_process: bool, stage: ModelStage) -> BertModel:
    """Return the part of the model that one pipeline stage holds."""
    return BertModel(stage)


def main() -> None:
    """Train as the command line says."""
    pretrain(
        None, model_provider_func, forward_step_func=encoder_forward_step, args_defaults={"bert_head": "pretraining"}
    )


if __name__ == "__main__":
    run_as_rank(main)
