"""What `tools/preprocess_data.py` and `tools/train_tokenizer.py` are made of: text in, token files out."""
