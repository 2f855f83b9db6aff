"""How the embedded pair was made: corpus, tokenizer, target, draft, card."""
