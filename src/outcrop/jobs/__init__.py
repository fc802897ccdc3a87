"""Durable execution: from a row to a finished row."""
