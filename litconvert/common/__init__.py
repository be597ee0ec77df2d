"""What every room may use: files, devices, processes, the Hub, seeds."""
