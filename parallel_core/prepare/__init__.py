"""Data preparation: text in, token files and tokenizers out; each command is a module with Megatron's arguments."""
