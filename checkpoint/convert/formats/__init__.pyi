from .registry import (
    format_named as format_named,
    recognise as recognise,
    sources as sources,
    targets as targets,
)
