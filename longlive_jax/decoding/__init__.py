"""Decoding: one block, the scan over blocks, prompt switches. Pure functions of a state; no files, no clocks."""
