"""The solved start: fresh attention found layer by layer on a calibration set, before any training."""
