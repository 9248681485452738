"""Rules of training on conversations."""

from __future__ import annotations

from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.vocabulary import DATA_SOURCES
from parallel_core.errors import ConfigError

CONVERSATION_CHECKS = Rules()
_TEMPLATES = ("sft_tokenizer_prompt_format", "chat_template")
_NOT_WITH = {
    "mock_data": "conversations are read from files; give data_path",
    "eod_mask_loss": "the loss is on the assistant's tokens, the end of an answer among them; leave it out",
    "mtp_num_layers": "further tokens would be predicted from one conversation into the next; leave it out",
    "legacy_tokenizer": "a legacy class may put tokens around texts, which is the template's; leave it out",
}


@CONVERSATION_CHECKS
def conversations(r: Resolution) -> None:
    """Conversations have files, a tokenizer and a template; templates belong to conversations."""
    if not r["sft"]:
        for name in _TEMPLATES:
            if r.is_given(name) and r[name] != "default":
                r.fail(name, "is how conversations are written; give sft, or leave it out")
        return
    for name, why in _NOT_WITH.items():
        if r[name]:
            r.fail(f"sft {name}", why)
    if not any(r[name] for name in DATA_SOURCES):
        r.fail("sft", "needs conversations: give data_path FILE.jsonl")
    if r["dataloader_type"] == "external":
        r.fail("sft dataloader_type", "batches of one's own are what they are; leave one out")
    if r["tokenizer_type"] in (None, "NullTokenizer"):
        r.fail("sft tokenizer_type", "conversations are texts; name their tokenizer")
        return
    _check_template(r)


def _check_template(r: Resolution) -> None:
    from parallel_core.data.chat import HOW_TO_NAME_ONE, require_jinja2, template_text, tokenizer_folders

    if r["chat_template"] and r["sft_tokenizer_prompt_format"] != "default":
        r.fail(" ".join(_TEMPLATES), "name two templates; give one of them")
        return
    folders = tokenizer_folders(r["tokenizer_model"], r["vocab_file"])
    try:
        require_jinja2()
        text, _ = template_text(folders, r["sft_tokenizer_prompt_format"], r["chat_template"] or "")
    except ConfigError as error:
        r.fail("sft", str(error))
        return
    if text is None and folders:
        where = ", ".join(folders)
        r.fail("sft sft_tokenizer_prompt_format", f"there is no chat template in {where}; {HOW_TO_NAME_ONE}")
