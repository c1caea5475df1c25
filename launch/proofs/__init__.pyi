from .audit_run import (
    audit_run as audit_run,
    describe_audit as describe_audit,
)
from .bisect_runs import (
    bisect_runs as bisect_runs,
)
from .bisection_text import (
    describe_bisection as describe_bisection,
)
from .check import (
    check_layout as check_layout,
    print_certificate as print_certificate,
)
from .compare_runs import (
    compare_runs as compare_runs,
    describe_comparison as describe_comparison,
    lost_ranks as lost_ranks,
    train_without_faults as train_without_faults,
)
from .prove import (
    prove_checkpoints as prove_checkpoints,
)
from .replay import (
    describe_replay as describe_replay,
    replay_run as replay_run,
)
