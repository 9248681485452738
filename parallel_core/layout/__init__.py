"""Where everything is, as pure values: ranks, layers, parameters in buffers, parts of tensors. No MindSpore."""
