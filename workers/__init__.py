"""The bodies of the jobs."""
