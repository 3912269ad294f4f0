"""The networks: pure maths, no input or output of files."""
