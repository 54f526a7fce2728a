"""What is trained and measured on: corpora, tokenizers, packing."""
