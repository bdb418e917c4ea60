"""The stage runtime: reads a stage's topics, runs its handler, publishes what comes of it, commits."""
