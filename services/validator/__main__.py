"""`python -m services.validator` runs the validator service."""

from services.common.process import main
from services.validator.service import build

main("validator", build)
