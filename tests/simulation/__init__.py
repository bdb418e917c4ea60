"""The road in one thread and no time at all: the real services between ports kept in memory."""
