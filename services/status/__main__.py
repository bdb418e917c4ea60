"""`python -m services.status` runs the status service."""

from services.common.stage.service import run_stage
from services.common.stages import STAGES
from services.status.service import build

run_stage(STAGES["status"], build)
