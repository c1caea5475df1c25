from .report import (
    plan_report as plan_report,
)
