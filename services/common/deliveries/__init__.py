"""Deliveries: who may send a task's mail, and what became of it."""
