from .incident_files import (
    found_in as found_in,
)
from .sentences import (
    report_lines as report_lines,
)
