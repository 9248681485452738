"""Configuration: the schema, Megatron's names for it, the rules across fields, and the readers of every input form."""
