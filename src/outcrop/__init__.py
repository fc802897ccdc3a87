"""Outcrop: Amazon Bedrock's model customization on your own machines."""

__version__ = "0.1.0"
