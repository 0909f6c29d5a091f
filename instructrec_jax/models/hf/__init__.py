"""Published models: fetched, converted from GGUF, and their configs and tensors read and written in the Hugging Face layout."""
