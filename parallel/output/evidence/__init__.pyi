from .native_stacks import (
    native_stacks as native_stacks,
)
from .process_facts import (
    memory_of as memory_of,
    threads_of as threads_of,
)
from .record import (
    Evidence as Evidence,
    LastOperation as LastOperation,
    ThreadStack as ThreadStack,
    evidence_name as evidence_name,
    read_evidence as read_evidence,
    write_evidence as write_evidence,
)
from .stacks import (
    ask_for_stacks as ask_for_stacks,
    frames_of_error as frames_of_error,
    own_threads as own_threads,
    parsed_stacks as parsed_stacks,
    stacks_on_signal as stacks_on_signal,
)
