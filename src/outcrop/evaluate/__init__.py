"""Numbers about a model: likelihood, and metrics of generated text."""
