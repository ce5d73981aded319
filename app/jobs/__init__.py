"""The job's life: submitted, queued, run in steps, watched, cancelled, taken up again after a crash."""
