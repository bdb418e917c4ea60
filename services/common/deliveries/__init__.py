"""The row that decides about a task's mail: who may send it, and what became of it."""
