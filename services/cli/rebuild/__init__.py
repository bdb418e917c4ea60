"""The task table made anew from the topics, compared with the one that is there, and put in its place.

`folding` and `deliveries` are pure; `writing` fills tables beside the originals (`pairs`), `carrying` adds
what no topic holds, `comparing` finds what differs, `swapping` exchanges them, and `run` puts it all
together. docs/adr/0011 says what can be rebuilt from what.
"""
