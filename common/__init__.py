"""What everything stands on: a run's files, results on disk, what every command does alike."""
