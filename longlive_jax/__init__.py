"""Real-time, interactive, long video generation in JAX."""
