"""Evaluation: figures read off generated frames."""
