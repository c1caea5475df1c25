from .registry import (
    SOURCES as SOURCES,
    TARGETS as TARGETS,
    format_named as format_named,
)
