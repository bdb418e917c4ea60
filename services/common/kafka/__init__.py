"""Kafka for all services: client settings, publishing, headers, topics and administration.

It imports no stage. The stage runtime (services/common/stage) is built on it.
"""
