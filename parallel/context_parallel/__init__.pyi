from .operators import ContextParallel as ContextParallel
