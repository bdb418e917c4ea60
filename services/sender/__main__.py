"""`python -m services.sender` runs the sender service."""

from services.common.process import main
from services.sender.service import build

main("sender", build)
