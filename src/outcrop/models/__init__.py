"""Base models: the catalogue, weights, tokenizers, adapters."""
