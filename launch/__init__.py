"""The `holdfast` command, and the start of workers on one machine or under torchrun, Slurm or MPI.

May import trainer, checkpoint, elastic and parallel. Nothing imports it.
"""
