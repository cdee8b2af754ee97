"""Starts the processes of a cluster on this machine, watches over them, and leaves none behind."""
