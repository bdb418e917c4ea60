"""The dead letters of every stage: read, shown, sent back to their topics, done away with.

`letter` and `marker` are pure: what a record on a dead-letter topic is. `board` reads the topics, `pick` says
which letters are meant, `back` where their records go, `source` reads what a letter does not carry, `resolve`
replays and purges.
"""
