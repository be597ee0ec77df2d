"""What `litconvert env --check` tries on this machine, a file for each subject; `litconvert.gpu_check` runs it all."""
