"""Text to token ids and back: tokenizer, chat templates and incremental detokenisation. Imports no torch."""
