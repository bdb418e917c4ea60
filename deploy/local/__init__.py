"""The whole system as ordinary processes of this user: `make setup`, then `python3 -m deploy.local up`.

The package has two halves. The installer (`setup`, `cache`, `debian`, `jars`, `database_tree`) runs on a bare
`python3` and imports the standard library only. The rest runs the stack and may use the project's
dependencies and the list of stages. It starts the services as processes and imports none of them.
"""

__all__: list[str] = []
