"""What a model says of given text: log-probabilities, perplexity of a file, and choices among answers (C3)."""
