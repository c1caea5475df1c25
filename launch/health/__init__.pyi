from .admission import (
    NodeRefused as NodeRefused,
    own_report as own_report,
    read_health as read_health,
    require_health as require_health,
    write_health as write_health,
)
from .job import (
    check_job as check_job,
)
from .node import (
    NodeSettings as NodeSettings,
    check_node as check_node,
    folders_of as folders_of,
)
from .report import (
    HealthReport as HealthReport,
    JobReport as JobReport,
    rows_of as rows_of,
)
