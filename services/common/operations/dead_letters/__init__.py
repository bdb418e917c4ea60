"""Dead letters: find them, show them, redrive their records, purge them.

`dead_letter` says what a record on a dead-letter topic is and `resolution` which ones are done; both are
pure. `reader` reads the topics, and `redrive` redrives and purges.
"""
