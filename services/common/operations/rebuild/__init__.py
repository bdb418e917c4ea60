"""Rebuild: fold all event topics into new task tables, compare them with the present ones, and swap them.

`run` is the whole rebuild and `report` what it says. `event_reader` reads the topics into a `folded_batch`,
which `writer` writes into a `shadow_table`. `copy_rows` adds what no topic holds, `diff` compares, and
`swap_tables` swaps. docs/adr/0011 says what can be rebuilt from what.
"""
