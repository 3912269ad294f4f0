"""PyTorch checkpoints to ours by declarative tables, and parity with recorded PyTorch outputs."""
