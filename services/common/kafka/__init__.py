"""Kafka for all services: client settings, publishing, headers, topics and administration.

It does not know the stage runtime (services/common/stage), which is built on it.
"""
