"""`python -m services.sender` runs the sender service."""

from services.common.stage.service import run_stage
from services.common.stages import STAGES
from services.sender.service import build

run_stage(STAGES["sender"], build)
