from .channel import (
    FairClock as FairClock,
    liveness_age_s as liveness_age_s,
    liveness_s as liveness_s,
    receive_message as receive_message,
    send_message as send_message,
)
from .faults import (
    Fault as Fault,
    FaultEffects as FaultEffects,
    FaultError as FaultError,
    FaultInjector as FaultInjector,
    ask_for as ask_for,
    cut_network as cut_network,
    fault_from_data as fault_from_data,
)
from .generation import (
    Generation as Generation,
    Identity as Identity,
    format_identities as format_identities,
    parse_identities as parse_identities,
    parse_identity as parse_identity,
)
from .hang import (
    HangJudge as HangJudge,
    HangLimits as HangLimits,
    Suspicion as Suspicion,
    Wait as Wait,
    is_excused as is_excused,
    wait_of as wait_of,
)
from .history import (
    CHANGES as CHANGES,
    MembershipHistory as MembershipHistory,
    change_events as change_events,
    history_of as history_of,
    newest_start as newest_start,
)
from .lighthouse import (
    Lighthouse as Lighthouse,
    LighthouseAway as LighthouseAway,
    answers as answers,
    await_lighthouse as await_lighthouse,
    coordination as coordination,
    heartbeat_ages as heartbeat_ages,
    lighthouse_key as lighthouse_key,
    lighthouse_url as lighthouse_url,
)
from .membership import (
    Membership as Membership,
)
from .membership_events import (
    MembershipEvent as MembershipEvent,
    MembershipEventKind as MembershipEventKind,
    event_from_data as event_from_data,
    event_to_data as event_to_data,
)
from .proxy import (
    report_on_behalf_of as report_on_behalf_of,
)
from .quorum_client import (
    MembershipSettings as MembershipSettings,
)
from .roll import (
    Roll as Roll,
    RunEnd as RunEnd,
)
from .store import (
    StoreClients as StoreClients,
)
from .watch import (
    BulletinFollower as BulletinFollower,
    HeartbeatWatch as HeartbeatWatch,
)
from .worker_spec import (
    WorkerSpec as WorkerSpec,
)
