"""Replay: a topic's records are produced to it again, those that may work and no others.

`decide` says what becomes of a record, `selection` which ones are meant, `span` from where to where, `pace`
how fast; all four are pure. `standings` reads how the tasks stand, `source` and `sink` are Kafka, `store` is
the table of replays, and `run` puts them together. docs/adr/0010 says why it works as it does.
"""
