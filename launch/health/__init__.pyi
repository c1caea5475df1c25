from .job import (
    check_job as check_job,
)
from .node import (
    NodeSettings as NodeSettings,
    check_node as check_node,
    folders_of as folders_of,
)
from .report import (
    JobReport as JobReport,
    rows_of as rows_of,
)
