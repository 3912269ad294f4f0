"""Data: sources of clips and prompts."""
