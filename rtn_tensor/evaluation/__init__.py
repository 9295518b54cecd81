"""What a quantized model still does: perplexity, zero-shot tasks, and the text that it writes."""
