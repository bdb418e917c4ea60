"""The whole system as ordinary processes of this user: `make setup`, then `python3 -m deploy.local up`.

Two halves. What installs (`setup`, `cache`, `debian`, `jars`, `database_tree`) runs on a bare `python3` and
imports the standard library only. What runs the stack (`__main__` and the rest) may use the project's own
dependencies and the list of stages, and starts the services as processes: nothing here imports a service.
"""

__all__: list[str] = []
