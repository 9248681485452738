"""What a run tells TensorBoard, Weights & Biases and MLflow: Megatron-LM's names for its numbers."""
