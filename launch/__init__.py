"""The `holdfast` command, and how its workers are started on one machine, torchrun, Slurm or MPI.

May import trainer, checkpoint, elastic and parallel. Nothing imports it.
"""
