"""The `holdfast` command, and how its workers are started on one machine, torchrun, Slurm or MPI.

May import every other folder; nothing imports it.
"""
