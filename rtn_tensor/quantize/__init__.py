"""Which weights of a model are quantized, how, and the quantizing of them."""
