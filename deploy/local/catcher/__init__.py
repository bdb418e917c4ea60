"""The mail server of the local stack: it keeps all that it is sent, and misbehaves when told to.

`faults` says what a recipient asks for, `control` what the control file does, `journal` keeps the mail,
`session` speaks SMTP. `python3 -m deploy.local.catcher --help` starts one alone.
"""

__all__: list[str] = []
