"""Experts in place of a layer's MLP: router, experts, shared expert, and the record of an iteration's routing."""
