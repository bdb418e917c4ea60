"""Kafka for all services: client settings, publishing, headers, topics, administration. It knows no stage."""
