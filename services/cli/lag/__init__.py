"""How far each stage is behind: what is read from Kafka, and what it means."""
