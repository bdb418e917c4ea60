"""Replay: produce a topic's records to it again, but only those that have something left to do.

`options` is what a replay is asked for. `decide` says what happens to a record, by its task's `task_state`.
`records` reads and rewrites records, and `store` keeps a replay's progress. `run` is the whole replay, and
`preview` counts what one would do. docs/adr/0010 says why it works this way.
"""
