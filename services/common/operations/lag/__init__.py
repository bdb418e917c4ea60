"""Lag: how far each stage is behind.

`monitor` is the whole measurement. `sampler` asks Kafka, `domains` and the outbox's figures ask the database
too, and `report` says what the figures mean.
"""
