from .appended_file import (
    AppendedFile as AppendedFile,
    Tail as Tail,
)
from .console_log import (
    ConsoleLog as ConsoleLog,
)
from .disk_queue import (
    DiskWord as DiskWord,
)
from .evidence import (
    Evidence as Evidence,
    LastOperation as LastOperation,
    ThreadStack as ThreadStack,
    ask_for_stacks as ask_for_stacks,
    evidence_name as evidence_name,
    frames_of_error as frames_of_error,
    memory_of as memory_of,
    native_stacks as native_stacks,
    own_threads as own_threads,
    parsed_stacks as parsed_stacks,
    read_evidence as read_evidence,
    stacks_on_signal as stacks_on_signal,
    threads_of as threads_of,
    write_evidence as write_evidence,
)
from .foreign_lines import (
    content_of as content_of,
    is_event as is_event,
    json_lines as json_lines,
    rising_steps as rising_steps,
    set_foreign_lines_aside as set_foreign_lines_aside,
    step_of as step_of,
)
from .interrupts import (
    SAVING as SAVING,
    Interrupts as Interrupts,
)
from .log_file import (
    LogFile as LogFile,
)
from .process_end import (
    exit_code_of as exit_code_of,
    leave as leave,
)
from .process_start import (
    begin_process as begin_process,
    name_process as name_process,
    unwind_when_told as unwind_when_told,
)
from .standard_streams import (
    outlive_readers as outlive_readers,
    stream_error as stream_error,
)
from .terminal import (
    plain_console as plain_console,
    plain_text as plain_text,
    say as say,
    tell as tell,
    write as write,
)
from .waiting import (
    TELL_AFTER_S as TELL_AFTER_S,
    Waiting as Waiting,
    tell_person as tell_person,
)
from .whole_files import (
    WholeFiles as WholeFiles,
    write_whole as write_whole,
)
