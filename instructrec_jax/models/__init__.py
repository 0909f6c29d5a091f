"""Linen language models over plain parameter dictionaries, with item and feature tokens."""
