"""What a stage of training will take, in memory and time, before it begins."""
