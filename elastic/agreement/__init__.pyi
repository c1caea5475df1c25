from .acceptor_file import (
    AcceptorFile as AcceptorFile,
)
from .answers import (
    aware as aware,
    generation_of as generation_of,
    misses_answer as misses_answer,
    needs_another as needs_another,
)
from .attendance import (
    Attendance as Attendance,
)
from .reports import (
    AcceptorState as AcceptorState,
    Report as Report,
    opened_report as opened_report,
    sealed_report as sealed_report,
)
from .rule import (
    PassedOver as PassedOver,
    Verdict as Verdict,
    advance as advance,
)
