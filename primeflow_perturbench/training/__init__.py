"""What Lightning's trainer is given: learning-rate schedules, checkpoints, averaged weights, progress bars."""
