"""`python -m services.validator` runs the validator service."""

from services.common.stage.service import run_stage
from services.common.stages import STAGES
from services.validator.service import build

run_stage(STAGES["validator"], build)
