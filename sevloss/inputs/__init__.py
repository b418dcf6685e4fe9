"""What comes from outside: tables, checkpoints, tokenizer files, raw Arabic text."""
