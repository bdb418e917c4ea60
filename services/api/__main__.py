"""`python -m services.api`."""

from services.api.service import build
from services.common.process import main

if __name__ == "__main__":
    main("api", build)
