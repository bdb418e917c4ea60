"""`python -m services.status` runs the status service."""

from services.common.process import main
from services.status.service import build

main("status", build)
